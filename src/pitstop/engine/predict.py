"""What a trained model makes of images: of files, one by one, and of a whole validation split."""

import base64
import json
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.machine import cores
from pitstop.core.recipe import Eval, Recipe
from pitstop.data.convert import Settings, convert, why_bad
from pitstop.data.decode import decode
from pitstop.data.packed import PackedSplit
from pitstop.data.resize import resize_center_crop
from pitstop.data.sources.folder import FolderListing
from pitstop.data.sources.layout import EXTENSIONS
from pitstop.engine.evaluate import Evaluation, answers, evaluate, predict, protocols, side
from pitstop.engine.run import data_of, load_model, open_data
from pitstop.engine.step import Normalizer
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import write_text
from pitstop.report.predictions import PAIRS, PREDICTIONS, WORST
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

BATCH = 32
"""Files that go through the model at once."""

THUMBNAIL = 64
"""The longer side of a mistake's picture, in pixels."""

EACH = 3
"""Mistakes that are kept of each of the `PAIRS` of classes."""

_AS_THEY_ARE = Settings(short_side=None, quality=90)


# The model


@dataclass(frozen=True)
class Trained:
    """A model that answers, and what it takes to ask it."""

    weights: Path
    model: nn.Module
    """On the device, in evaluation mode."""
    recipe: Recipe
    """With the normalisation and the protocol."""
    classes: tuple[str, ...]
    device: Device
    stated: dict[str, Any]
    """The run's run.json; empty where only a weights file was named."""


def find_weights(place: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """Returns a run's weights, and its run.json; or a file itself, and nothing.

    Args:
        place: a run directory, or a .safetensors file that pitstop wrote.
        which: of a run, the `best` or the `last` weights.

    Raises:
        InputError: there is none.
    """
    if not place.exists():
        raise InputError(f"{place}: does not exist: name a run or a .safetensors file")
    if not place.is_dir():
        return place, {}
    run = RunDirectory(place)
    stated = run.read()
    if stated is None:
        raise InputError(f"{place}: holds no run.json: name a run or a .safetensors file")
    weights = run.weights(which)
    if not weights.exists():
        raise InputError(f"{place}: has no {which} weights: none have been saved yet")
    return weights, stated


def load(
    place: Path,
    *,
    which: str = "best",
    protocol: dict[str, Any] | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> Trained:
    """Returns a trained model, ready to be asked.

    Args:
        place, which: as for `find_weights`.
        protocol: overrides of the recipe's `eval`.
        precision: None for that of the training.
        device: as in a recipe.

    Raises:
        InputError: naming the file or key, and the fix.
    """
    weights, stated = find_weights(place, which)
    circumstance = {"device": device, "compile": False}
    circumstance |= {} if precision is None else {"precision": precision}
    model, recipe, classes = load_model(weights, protocol or {}, circumstance)
    chosen = Device.choose(recipe.precision, recipe.compile, recipe.threads, device=recipe.device)
    return Trained(weights, chosen.place(model).eval(), recipe, tuple(classes), chosen, stated)


# Files


@dataclass(frozen=True)
class Prediction:
    """What a model takes an image for: names of classes with probabilities, the likeliest first."""

    file: Path
    likeliest: tuple[tuple[str, float], ...]


def image_files(places: Sequence[Path]) -> list[Path]:
    """Returns the images at some places: files as they are, and those in folders, at any depth.

    Raises:
        InputError: a place is not there, or a folder without images.
    """
    files: list[Path] = []
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: does not exist: name an image or a folder of images")
        inside = FolderListing(place).images("") if place.is_dir() else None
        if inside == []:
            raise InputError(f"{place}: holds no images: they end in {' '.join(EXTENSIONS)}")
        files += [place] if inside is None else [place / name for name in inside]
    return files


def predictions(
    trained: Trained,
    files: Sequence[Path],
    *,
    top: int,
    workers: int,
    skipped: Callable[[Path, str], None],
) -> Generator[Prediction]:
    """Yields what a model takes images for, in their order; those that are damaged are left out.

    An image comes to the model as in an evaluation: converted as for a packed dataset, resized and
    normalised by the same code, and shown in the views of the protocol.

    Args:
        top: so many classes each, or all where there are fewer.
        workers: threads that decode.
        skipped: is told of each image that cannot be read, and why.
    """
    spec = protocols(trained.recipe)[0]
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for some, loading in _ahead(pool, partial(_pixels, spec=spec), files):
            loaded = [(file, each.result()) for file, each in zip(some, loading, strict=True)]
            good = [(file, pixels) for file, pixels in loaded if isinstance(pixels, torch.Tensor)]
            for file, why in loaded:
                if isinstance(why, str):
                    skipped(file, why)
            if good:
                chances = _probabilities(trained, torch.cat([pixels for _, pixels in good]), spec)
                for (file, _), row in zip(good, chances, strict=True):
                    yield Prediction(file, _likeliest(row, trained.classes, top))


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[Path], torch.Tensor | str], files: Sequence[Path]
) -> Iterator[tuple[Sequence[Path], list[Future[torch.Tensor | str]]]]:
    """Yields batches of files with what becomes of them; the next one's are being loaded."""
    ahead: deque[tuple[Sequence[Path], list[Future[torch.Tensor | str]]]] = deque()
    for start in range(0, len(files), BATCH):
        some = files[start : start + BATCH]
        ahead.append((some, [pool.submit(load, file) for file in some]))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _pixels(file: Path, spec: Eval) -> torch.Tensor | str:
    """Returns a file's image as the model is shown it, uint8 [1, 3, R, R]; or why it is bad."""
    try:
        stored = convert(file.read_bytes(), "val", _AS_THEY_ARE)
        image = decode(stored.pictures[0].data)
    except Exception as error:  # decoders raise nearly anything
        return why_bad(error)
    slot = torch.empty((1, side(spec), side(spec), 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    resize_center_crop(image, side(spec), spec.crop_ratio, slot, spec.interpolation)
    return slot


@torch.no_grad()
def _probabilities(trained: Trained, images: torch.Tensor, spec: Eval) -> torch.Tensor:
    """Returns the probabilities of the classes, float32 [B, C], on the CPU."""
    device = trained.device.torch_device
    normalize = Normalizer(trained.recipe, device)
    logits = predict(trained.model, normalize(images.to(device)), spec, trained.device)
    return logits.softmax(1).cpu()


def _likeliest(
    chances: torch.Tensor, classes: Sequence[str], top: int
) -> tuple[tuple[str, float], ...]:
    values, indices = chances.topk(min(top, len(classes)))
    chosen: list[int] = indices.tolist()
    likely: list[float] = values.tolist()
    return tuple((classes[index], chance) for index, chance in zip(chosen, likely, strict=True))


# A validation split


@dataclass(frozen=True)
class Assessment:
    """An evaluation, and what the model made of each image."""

    evaluation: Evaluation
    classes: tuple[str, ...]
    split: PackedSplit
    labels: np.ndarray
    """int64 [N]: the true classes."""
    answers: np.ndarray
    """int64 [N]: the classes that the model took them for."""
    probabilities: np.ndarray
    """float32 [N]: how sure it was."""

    def confusion(self) -> np.ndarray:
        """Returns how many images of each class (row) were taken for each (column): int64 [C, C].

        Its diagonal over all of it is the top-1 accuracy.
        """
        count = len(self.classes)
        pairs = self.labels * count + self.answers
        return np.bincount(pairs, minlength=count * count).reshape(count, count)

    def mistakes(self) -> np.ndarray:
        """Returns the rows of the mistakes to show, int64 [k], the surest first.

        They are the worst of all, and the worst of the pairs of classes confused most often.
        """
        wrong = np.flatnonzero(self.labels != self.answers)
        wrong = wrong[np.argsort(-self.probabilities[wrong], kind="stable")]
        shown = np.arange(len(wrong)) < WORST
        pairs = self.labels[wrong] * len(self.classes) + self.answers[wrong]
        for pair, _ in Counter(pairs.tolist()).most_common(PAIRS):
            shown[np.flatnonzero(pairs == pair)[:EACH]] = True
        return wrong[shown]


def examine(
    place: Path,
    data: str | None = None,
    *,
    which: str = "best",
    protocol: dict[str, Any] | None = None,
    precision: str | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> Assessment:
    """Evaluates weights on a dataset's validation images.

    By the recipe's `eval.also` too, but where `protocol` says otherwise.

    Args:
        place, which, protocol, precision, device: as for `load`.
        data: as `--data`; None for the data that the run was trained on.
        workers: threads that decode.

    Raises:
        InputError: naming the file, key or option, and the fix.
    """
    trained = load(place, which=which, protocol=protocol, precision=precision, device=device)
    data = data or data_of(trained.stated)
    if data is None:
        raise InputError("--data: say what to evaluate on; a weights file does not name it")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    workers = workers or cores()
    opened = open_data(data, workers, console)
    if opened.classes != trained.classes:
        raise InputError(
            f"{data}: its {len(opened.classes)} classes are not the {len(trained.classes)} that "
            f"{trained.weights} was trained on"
        )
    said: list[torch.Tensor] = []
    sure: list[torch.Tensor] = []

    def seen(logits: torch.Tensor, labels: torch.Tensor) -> None:
        answer, probability = answers(logits)
        said.append(answer)
        sure.append(probability)

    evaluation = evaluate(
        trained.model,
        opened.val,
        trained.recipe,
        trained.device,
        Ranks(),
        weights=trained.weights.name,
        workers=workers,
        also=lambda top1: not protocol,
        seen=seen,
    )
    assert evaluation is not None
    return Assessment(
        evaluation,
        opened.classes,
        opened.val,
        opened.val.labels.astype(np.int64),
        torch.cat(said).cpu().numpy(),
        torch.cat(sure).cpu().numpy(),
    )


def assess(
    run: Path,
    data: str | None = None,
    *,
    which: str = "best",
    device: str = "auto",
    workers: int | None = None,
) -> dict[str, Any]:
    """Evaluates a run's weights and writes what they make of each class into its directory.

    Args:
        run: a run directory.
        data, which, device, workers: as for `examine`.

    Returns:
        What predictions.json holds now: `classes`, `confusion` (a row a true class), `top1` in
        percent, its `protocol`, and `mistakes`, the surest first, with thumbnails.

    Raises:
        InputError: naming the file, key or option, and the fix.
    """
    found = examine(run, data, which=which, device=device, workers=workers)
    predicted = {
        "classes": [*found.classes],
        "confusion": found.confusion().tolist(),
        "top1": found.evaluation.top1,
        "protocol": found.evaluation.protocol,
        "mistakes": [
            {
                "label": int(found.labels[row]),
                "predicted": int(found.answers[row]),
                "probability": float(found.probabilities[row]),
                "jpeg": _thumbnail(found.split.read(row)),
            }
            for row in found.mistakes().tolist()
        ],
    }
    write_text(run / PREDICTIONS, json.dumps(predicted))  # on one line: it may be a million counts
    return predicted


def _thumbnail(data: bytes) -> str:
    """Returns an image as a small JPEG, in base64."""
    image = Image.fromarray(decode(data))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    out = BytesIO()
    image.save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()
