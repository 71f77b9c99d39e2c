"""Weights to start from: a run's, a .safetensors file's, those of an object in a bucket, timm's.

They travel as the bytes of a .safetensors file, which one rank reads and gives to the others.
Nothing is unpickled.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as safetensors_bytes
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import Model
from pitstop.io.objects import open_store
from pitstop.io.run_directory import RunDirectory
from pitstop.nn.models import classifier

TIMM = "timm"
"""`model.weights: timm` are the pretrained ones of `model.name`."""

SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
KNOWN = f"name a run, a {SUFFIX} file, its URL in a bucket, or {TIMM}"


@dataclass(frozen=True)
class Weights:
    """A state dict, on the CPU."""

    origin: str
    """As the recipe names it."""
    tensors: dict[str, torch.Tensor]
    classes: tuple[str, ...] | None
    """None where the file does not name them: it is not pitstop's."""


def read(spec: Model) -> bytes:
    """Returns the weights that a recipe's `model` names, as the content of a .safetensors file.

    Of a run they are the best, or the last where none has been evaluated yet: the EMA's, if it has
    one.

    Raises:
        InputError: they are not there, cannot be reached, or are a pickle.
    """
    name = str(spec.weights)
    if name == TIMM:
        return _read_timm(spec)
    if PurePath(name).suffix in PICKLES:
        raise InputError(
            f"model.weights: {name}: is a pickle, which may run code: convert it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
        )
    if "://" in name:
        folder, _, key = name.rpartition("/")
        if not key.endswith(SUFFIX):
            raise InputError(f"model.weights: {name}: name a {SUFFIX} file in the bucket")
        try:
            return open_store(folder).get(key)
        except InputError as error:
            raise InputError(f"model.weights: {error}") from None
    try:
        return _file(Path(name).expanduser()).read_bytes()
    except OSError as error:
        raise InputError(f"model.weights: {name}: cannot be read: {error.strerror}") from None


def _file(path: Path) -> Path:
    if path.is_dir():
        run = RunDirectory(path)
        saved = [file for which in ("best", "last") if (file := run.weights(which)).exists()]
        if not saved:
            raise InputError(f"model.weights: {path}: holds no weights of a run: {KNOWN}")
        return saved[0]
    if not path.exists():
        raise InputError(f"model.weights: {path}: does not exist: {KNOWN}")
    return path


def _read_timm(spec: Model) -> bytes:
    """Returns timm's pretrained weights, downloaded unless they are in the cache."""
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(spec.name, pretrained=True, **spec.kwargs)
    except Exception as error:  # of the hub, the network, the model
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(
            f"model.weights: timm's for {spec.name} are not to be had: {why}: check the name and "
            f"the network, or name a run or a {SUFFIX} file"
        ) from None
    state = model.state_dict()
    return safetensors_bytes(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    )


def parse(data: bytes, origin: str) -> Weights:
    """Returns the weights in what `read` returned.

    Raises:
        InputError: it is no whole safetensors file.
    """
    try:
        tensors = tensors_of(data)
    except SafetensorError as error:
        raise InputError(
            f"model.weights: {origin}: is not a whole {SUFFIX} file ({error}): {KNOWN}"
        ) from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stated = header.get("__metadata__", {}).get("pitstop")
    classes = tuple(json.loads(stated)["classes"]) if stated else None
    return Weights(origin, tensors, classes)


def load(model: nn.Module, weights: Weights, classes: Sequence[str]) -> str:
    """Puts weights into a model; its head stays new where it is for other classes.

    All other tensors must be there, of the same shape, and no more. A head is for other classes
    where they are more or fewer, or where the weights name them and the names differ, in their
    order too.

    Args:
        classes: the names of those to be trained.

    Returns:
        What to say of the head.

    Raises:
        InputError: naming the first tensor that does not fit.
    """
    heads = _names_of_heads(model)

    def in_head(name: str) -> bool:
        return name.startswith(heads)

    own = model.state_dict()
    head = {name: tensor for name, tensor in own.items() if in_head(name)}
    stays, why = _head_fits(head, weights, classes)
    given = {n: t for n, t in weights.tensors.items() if stays or not in_head(n)}
    kept = {} if stays else head
    _refuse_others(own, {**given, **kept}, weights.origin, type(model).__name__)
    model.load_state_dict({**given, **kept})
    return f"weights of {weights.origin}: {why}"


def _names_of_heads(model: nn.Module) -> tuple[str, ...]:
    heads = classifier(model)
    return tuple(
        f"{name}." for name, layer in model.named_modules() if any(layer is h for h in heads)
    )


def _head_fits(
    head: dict[str, torch.Tensor], weights: Weights, classes: Sequence[str]
) -> tuple[bool, str]:
    """Tells whether the head of the weights is for these classes, and what to say of it."""
    here = f"{len(classes):,} here"
    widths = [
        len(weights.tensors[name])
        for name, own in head.items()
        if own.ndim > 1 and name in weights.tensors
    ]
    if head and not widths:
        return False, f"head reset: they have none; {here}"
    if any(width != len(classes) for width in widths):
        return False, f"head reset: {widths[0]:,} classes there, {here}"
    if weights.classes is None:
        return True, f"head kept: {len(classes):,} classes, whose names they do not tell"
    if weights.classes != tuple(classes):
        return False, f"head reset: {len(classes):,} classes there too, of other names or order"
    return True, f"head kept: the same {len(classes):,} classes"


def _refuse_others(
    own: dict[str, torch.Tensor], given: dict[str, torch.Tensor], origin: str, model: str
) -> None:
    """Raises InputError for the first tensor that only one has, or that has another shape.

    Counts of batches may be missing, as in state dicts of old: nothing reads them.
    """
    for name in [*own, *given]:
        shapes = [_shape(tensors, name) for tensors in (given, own)]
        if shapes[0] != shapes[1] and not name.endswith("num_batches_tracked"):
            raise InputError(
                f"model.weights: {origin}: not of this model ({model}): {name} is {shapes[0]} "
                f"there and {shapes[1]} here: take model.name and model.kwargs of the weights"
            )


def _shape(tensors: dict[str, torch.Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "missing"
