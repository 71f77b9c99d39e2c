"""A trained model in the form that others read: safetensors, ONNX, a PyTorch file, a timm folder.

What is written is read again by a process of its own, as its users would do it, and must give the
logits of the original; what does not is removed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from pitstop import __version__
from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe
from pitstop.engine.evaluate import described, protocols, side
from pitstop.engine.predict import find_weights
from pitstop.engine.run import load_model

Format = Literal["safetensors", "onnx", "torch", "timm"]

FILES: dict[Format, str] = {
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "torch": "model.pt",
}
"""The formats of one file, with its name in a folder; a timm folder has several."""

TOLERANCE = 1e-4
"""How far a logit may lie from the original's, over the largest of the original's.

Other kernels sum in another order: that makes 1e-6 or so. A wrong weight makes 1e-2 and more.
"""

NEEDED_FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Original:
    """The model to export."""

    model: nn.Module
    """float32, on the CPU, in evaluation mode."""
    recipe: Recipe
    """With the normalisation and the protocol."""
    classes: tuple[str, ...]
    stated: dict[str, Any]
    """The run's run.json; empty where only a weights file was named."""
    which: str

    @property
    def resolution(self) -> int:
        """Pixels, at which the run was evaluated."""
        return side(protocols(self.recipe)[0])

    def description(self) -> dict[str, Any]:
        """Returns what it takes to use the weights, as the header of pitstop's own files has it."""
        kept = self.recipe.model_dump(mode="json", include={"name", "model", "mean", "std", "eval"})
        return {**kept, "precision": "fp32", "classes": [*self.classes]}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the state dict, contiguous."""
        state = self.model.state_dict()
        return {name: tensor.contiguous() for name, tensor in state.items()}


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its logits are from the original's (see `TOLERANCE`)."""

    path: Path
    difference: float


def export(place: Path, format: Format, out: Path | None, *, which: str = "best") -> Exported:
    """Writes a trained model, reads it again in another process, and compares the logits.

    Args:
        place: a run directory, or a .safetensors file that pitstop wrote.
        format: `timm` writes a folder.
        out: a file, or a folder for it; None for a name after the run, here.
        which: of a run, the `best` or the `last` weights.

    Raises:
        InputError: the model cannot be had in this format; nothing is left behind.
    """
    missing = [name for name in NEEDED_FOR_ONNX if find_spec(name) is None]
    if format == "onnx" and missing:
        raise InputError(
            f"--format onnx: {' and '.join(missing)} not installed: pip install 'pitstop[export]'"
        )
    original = _original(place, which)
    target = _target(format, out or Path(_default_name(place, format)))
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
        written = Path(scratch) / FILES.get(format, "timm")
        _WRITERS[format](original, written)
        difference = _difference(original, format, written, Path(scratch))
        if not difference <= TOLERANCE:  # which also refuses what is no number
            raise InputError(
                f"--format {format}: the logits of what was written differ from the original's by "
                f"{difference:.2g} of the largest: removed it: take another format"
            )
        _put_in_place(written, target)
    return Exported(target, difference)


def _original(place: Path, which: str) -> Original:
    weights, stated = find_weights(place, which)
    circumstance = {"device": "cpu", "precision": "fp32", "compile": False}
    model, recipe, classes = load_model(weights, {}, circumstance)
    return Original(model.eval(), recipe, tuple(classes), stated, which)


def _default_name(place: Path, format: Format) -> str:
    name = place.resolve().name.removesuffix(".safetensors")
    return f"{name}-timm" if format == "timm" else name + Path(FILES[format]).suffix


def _target(format: Format, out: Path) -> Path:
    """Returns the file or, for timm, the folder to be written."""
    if format == "timm":
        holds_others = out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists()
        if out.is_file() or holds_others:
            raise InputError(
                f"{out}: is {'a file' if out.is_file() else 'not empty'}: name a folder"
            )
        return out
    suffix = Path(FILES[format]).suffix
    if out.is_dir() or not out.suffix:
        return out / FILES[format]
    if out.suffix != suffix:
        raise InputError(f"{out}: a file of --format {format} ends in {suffix}")
    return out


def _put_in_place(written: Path, target: Path) -> None:
    if written.is_file():
        written.replace(target)
        return
    target.mkdir(exist_ok=True)
    for file in written.iterdir():
        file.replace(target / file.name)


# Writing


def _write_safetensors(original: Original, path: Path) -> None:
    save_file(original.tensors(), path, {"pitstop": json.dumps(original.description())})


def _write_torch(original: Original, path: Path) -> None:
    torch.save({"state_dict": original.tensors(), **original.description()}, path)


def _write_onnx(original: Original, path: Path) -> None:
    """Writes a graph from `images`, normalised, float32 [N, 3, R, R], to `logits` [N, C]."""
    size = original.resolution
    try:
        program = torch.onnx.export(
            original.model,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props["pitstop"] = json.dumps(original.description())
        program.save(path)
    except Exception as error:  # of the exporter, as varied as the models
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(
            f"--format onnx: torch does not export {original.recipe.model.name}: {why}: take "
            "another format"
        ) from error


def _write_timm(original: Original, path: Path) -> None:
    """Writes a folder for `timm.create_model("local-dir:...")` and the Hugging Face hub."""
    spec = original.recipe.model
    if spec.blurpool or not type(original.model).__module__.startswith("timm."):
        what = "blurpool" if spec.blurpool else f"the model {spec.name}"
        raise InputError(f"--format timm: timm has not {what}: take safetensors, torch or onnx")
    path.mkdir()
    save_file(original.tensors(), path / "model.safetensors", {"format": "pt"})
    config = json.dumps(_timm_config(original), indent=2)
    (path / "config.json").write_text(config + "\n", encoding="utf-8")
    (path / "README.md").write_text(_card(original), encoding="utf-8")


def _timm_config(original: Original) -> dict[str, Any]:
    """Returns what timm reads of a folder: the model's arguments, the classes, how images come."""
    recipe, spec = original.recipe, protocols(original.recipe)[0]
    known: dict[str, Any] = getattr(original.model, "pretrained_cfg", {})
    about_model = {
        key: known[key] for key in ("first_conv", "classifier", "fixed_input_size") if key in known
    }
    return {
        "architecture": recipe.model.name.partition(".")[0],  # without the tag of its weights
        "num_classes": len(original.classes),
        "num_features": getattr(original.model, "num_features", None),
        "label_names": [*original.classes],
        "model_args": recipe.model.kwargs,
        "pretrained_cfg": {
            **about_model,
            "num_classes": len(original.classes),
            "input_size": [3, original.resolution, original.resolution],
            "crop_pct": spec.crop_ratio,
            "crop_mode": "center",
            "interpolation": spec.interpolation,
            "mean": [*recipe.mean],
            "std": [*recipe.std],
        },
    }


def _card(original: Original) -> str:
    """Returns the model card: what it is, how good it is by which protocol, how to use it."""
    recipe, spec = original.recipe, protocols(original.recipe)[0]
    trained: dict[str, Any] = original.stated.get("recipe") or {}
    figures = original.stated.get("best" if original.which == "best" else "metrics")
    name = trained.get("name") or recipe.name or recipe.model.name
    shown = ", ".join(original.classes[:20]) + (", ..." if len(original.classes) > 20 else "")
    accuracy = "Not known: only the weights were at hand when this was written."
    if figures:
        accuracy = (
            f"top-1 {figures['top1']:.2f}%, top-5 {figures['top5']:.2f}% on the validation images "
            f"({described(figures['protocol'])})."
        )
    epochs = f"{trained['epochs']:g} epochs of " if "epochs" in trained else ""
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- pitstop
---

# {name}

`{recipe.model.name}`, trained to tell {len(original.classes)} classes apart: {shown}.

## Accuracy

{accuracy}

## Images

RGB, resized so that the crop is {spec.crop_ratio:g} of the short side ({spec.interpolation}), the \
center {original.resolution} x {original.resolution} pixels of it, scaled to 0 to 1, less the mean \
{[*recipe.mean]} and over the standard deviation {[*recipe.std]}. `config.json` says the same to \
timm.

## Use

```python
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config)
image = transform(Image.open("photo.jpg").convert("RGB"))
probabilities = model(image[None]).softmax(1)
print(model.pretrained_cfg["label_names"][probabilities.argmax()])
```

## Training

{epochs}the recipe `{trained.get("name", "of an unknown run")}` of pitstop {__version__}. The \
logits of this folder were compared with the original's.
"""


_WRITERS: dict[Format, Callable[[Original, Path], None]] = {
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "torch": _write_torch,
    "timm": _write_timm,
}


# Reading again

_WITH_TORCH = """
import torch
{load}
def logits(images):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(images)).numpy()
"""

_READERS: dict[Format, str] = {
    "safetensors": _WITH_TORCH.format(
        load="""
from pitstop.engine.run import load_model
model, _, _ = load_model(path, {}, {"device": "cpu", "precision": "fp32", "compile": False})
"""
    ),
    "torch": _WITH_TORCH.format(
        load="""
from pitstop.core.recipe import Model
from pitstop.nn import models
saved = torch.load(path, weights_only=True)
model = models.build(Model(**saved["model"]), len(saved["classes"]), seed=0)
model.load_state_dict(saved["state_dict"])
"""
    ),
    "timm": _WITH_TORCH.format(
        load="""
import timm
model = timm.create_model(f"local-dir:{path}", pretrained=True)
"""
    ),
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
def logits(images):
    return session.run(["logits"], {"images": images})[0]
""",
}
"""How each format is read by whoever gets it: from `path` to `logits`, a function of images."""

_PROGRAM = """
import sys
import numpy as np
path, probe, answer = sys.argv[1:]
{reader}
images = np.load(probe)
np.save(answer, np.concatenate([logits(images), logits(images[:1])]))
"""


def _difference(original: Original, format: Format, written: Path, scratch: Path) -> float:
    """Returns how far the logits of what was written are from the original's.

    A process of its own reads it and answers for a batch, and for an image alone.

    Raises:
        InputError: it does not load.
    """
    size = original.resolution
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 3, size, size), dtype=np.float32)
    probe, answer = scratch / "probe.npy", scratch / "answer.npy"
    np.save(probe, images)
    program = _PROGRAM.format(reader=_READERS[format])
    read = subprocess.run(
        [sys.executable, "-P", "-c", program, str(written), str(probe), str(answer)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if read.returncode != 0:
        why = (read.stderr.strip().splitlines() or [f"exit code {read.returncode}"])[-1]
        raise InputError(
            f"--format {format}: what was written does not load ({why}): removed it: take another "
            "format"
        )
    with torch.no_grad():
        batch, alone = (original.model(torch.from_numpy(x)).numpy() for x in (images, images[:1]))
    return _distance(np.concatenate([batch, alone]), np.load(answer))


def _distance(expected: np.ndarray, found: np.ndarray) -> float:
    """Returns the largest difference over the largest number expected."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())
