"""How many images a second a model trains on: published figures, and what follows from them.

At a size that nobody has measured, a figure of the same GPU and model goes with the number of
pixels: the MACs of an image do, and training takes 6 FLOPs a MAC at any size. A model without a
figure is compared with ResNet-50: by timm's figures on an RTX 3090 where these have it, else by
FLOPs.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, TypeAdapter

from pitstop.core.errors import InputError
from pitstop.core.recipe import Model
from pitstop.io.cache import cache_directory
from pitstop.plan.calibration import Calibration, Speed

REFERENCE = "resnet50"
"""Every GPU has a figure of it."""

PIXELS = 224
"""The side at which the MACs of models are listed."""

SCALING = 0.95
"""Of a GPU's rate, what is left of it where several in a machine average their gradients."""

SAME_COST = ("drop_path_rate", "drop_rate", "zero_init_last", "num_classes")
"""Arguments of timm's models that do not change their MACs, or hardly."""


@dataclass(frozen=True)
class Figure:
    """A number and where it is from, in words: `published: ...`, `assumed: ...`."""

    value: float
    source: str


class Size(BaseModel, frozen=True, extra="forbid"):
    """What a model is to a machine."""

    gmacs: float
    """Billions of multiply-adds of a forward pass of an image of 224 px."""
    parameters: float
    """Millions."""
    rtx3090: float | None = None
    """Images a second in training on an RTX 3090 at 224 px; None: nobody has published it."""


def images_per_second(gpu: str, model: str, resolution: int, *, gpus: int = 1) -> Figure:
    """Returns what one of so many GPUs in a machine trains on.

    Args:
        gpu: a key of rates.yaml, such as `A100`.
        model: as `model_key` names it.
        resolution: the side in pixels.

    Raises:
        InputError: nothing is known of the model.
    """
    anchors = _anchors(gpu)
    own = [anchor for anchor in anchors if anchor.model == model]
    known = own or [anchor for anchor in anchors if anchor.model == REFERENCE]
    figure = _at({a.resolution: _in_company(a, gpus) for a in known}, resolution)
    if own:
        return figure
    ratio = _speed_of(model)
    return Figure(figure.value * ratio.value, f"{figure.source}, {ratio.source}")


def measured_images_per_second(
    calibration: Calibration, speeds: Iterable[Speed], model: str, resolution: int
) -> Figure:
    """Returns what the calibrated machine as a whole does, by those of its measured `speeds`.

    Phases of one size may differ in speed: then it is that of the slowest.

    Raises:
        InputError: nothing is known of the model.
    """
    speeds = list(speeds)
    own = [speed for speed in speeds if speed.model == model]
    source = f"measured: pitstop calibrate, {calibration.date}"
    known = [speed for speed in speeds if speed.model == (model if own else speeds[0].model)]
    slowest_last = sorted(known, key=lambda speed: -speed.images_per_second)
    rates = {s.resolution: Figure(s.images_per_second, source) for s in slowest_last}
    figure = _at(rates, resolution)
    if own:
        return figure
    other = known[0].model
    ratio = model_size(other).gmacs / model_size(model).gmacs
    return Figure(figure.value * ratio, f"{figure.source}, of {other}, by FLOPs to {model}")


def _at(known: Mapping[int, Figure], resolution: int) -> Figure:
    """Returns the rate at a size from those at others.

    Between two sizes it is on the straight line of the logarithms; beyond them it goes with the
    number of pixels, as the FLOPs do.
    """
    if resolution in known:
        return known[resolution]
    below = max((size for size in known if size < resolution), default=None)
    above = min((size for size in known if size > resolution), default=None)
    if below is not None and above is not None:
        low, high = known[below], known[above]
        share = math.log(resolution / below) / math.log(above / below)
        sources = dict.fromkeys((low.source, high.source))
        return Figure(
            low.value ** (1 - share) * high.value**share,
            f"{'; '.join(sources)}; {resolution} px lies between",
        )
    size = below or above
    assert size is not None
    return Figure(
        known[size].value * (size / resolution) ** 2,
        f"{known[size].source}, by FLOPs from {size} to {resolution} px",
    )


def model_key(model: Model) -> str:
    """Returns the name by which a model's rates and FLOPs are kept: with what changes its shape."""
    own = {name: value for name, value in model.kwargs.items() if name not in SAME_COST}
    return model.name + (json.dumps(own, sort_keys=True) if own else "")


def footprints_file() -> Path:
    """Returns where counted MACs and parameters are kept, by `MODEL@PIXELS`.

    `{"resnet18@224": {"gmacs": 1.82, "params": 11689512}}`: billions of multiply-adds of a forward
    pass of an image of that size, and the number of parameters. MODEL is that of `model_key`.
    """
    return cache_directory() / "footprints.json"


def model_size(model: str) -> Size:
    """Returns what is listed of a model, or what was counted on this machine.

    Raises:
        InputError: neither.
    """
    listed = _file().models.get(model)
    counted = None if listed else _counted(model)
    size = listed or counted
    if size is None:
        raise InputError(
            f"model {model}: how much it computes is not known: count it with `pitstop plan RECIPE "
            "--memory`, or take one of " + ", ".join(_file().models)
        )
    return size


def _speed_of(model: str) -> Figure:
    """Returns how many times as fast as the reference a model trains on any GPU."""
    size, reference = model_size(model), _file().models[REFERENCE]
    if size.rtx3090 is not None and reference.rtx3090 is not None:
        ratio = size.rtx3090 / reference.rtx3090
        return Figure(ratio, f"x {ratio:.2f} for {model} (published: timm, RTX 3090)")
    ratio = reference.gmacs / size.gmacs
    return Figure(ratio, f"x {ratio:.2f} for {model} (by its FLOPs)")


def _counted(model: str) -> Size | None:
    """Returns what footprints.json has of a model, by the largest images."""
    try:
        counted = _FOOTPRINTS.validate_json(footprints_file().read_bytes())
    except (OSError, ValueError):  # a cache: what cannot be read is not there
        return None
    own = {key.removeprefix(f"{model}@"): one for key, one in counted.items()}
    sides = [int(side) for side in own if side.isdecimal()]
    if not sides:
        return None
    one = own[str(max(sides))]
    return Size(gmacs=one.gmacs * (PIXELS / max(sides)) ** 2, parameters=one.params / 1e6)


class _Footprint(BaseModel, frozen=True):
    gmacs: float
    params: float


_FOOTPRINTS = TypeAdapter(dict[str, _Footprint])


class _Anchor(BaseModel, frozen=True, extra="forbid"):
    model: str
    resolution: int
    images_per_second: float
    gpus: int
    source: str


class _Like(BaseModel, frozen=True, extra="forbid"):
    gpu: str
    factor: float
    because: str


class _File(BaseModel, frozen=True, extra="forbid"):
    gpus: dict[str, list[_Anchor]]
    like: dict[str, _Like]
    models: dict[str, Size]


@cache
def _file() -> _File:
    text = Path(__file__).with_name("rates.yaml").read_text(encoding="utf-8")
    return _File.model_validate(yaml.safe_load(text))


def _anchors(gpu: str) -> list[_Anchor]:
    file = _file()
    if gpu in file.gpus:
        return file.gpus[gpu]
    like = file.like[gpu]
    return [
        anchor.model_copy(
            update={
                "images_per_second": anchor.images_per_second * like.factor,
                "source": f"{anchor.source}, {like.because}",
            }
        )
        for anchor in file.gpus[like.gpu]
    ]


def _in_company(anchor: _Anchor, gpus: int) -> Figure:
    """Returns the rate of each of so many GPUs in a machine."""
    if gpus <= anchor.gpus:
        return Figure(anchor.images_per_second, anchor.source)
    source = f"{anchor.source}, x {SCALING:g} on several GPUs (assumed)"
    return Figure(anchor.images_per_second * SCALING, source)
