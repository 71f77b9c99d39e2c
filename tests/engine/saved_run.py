"""A run directory as training leaves it, of a tiny model that tells digits apart by chance."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pitstop.core.recipe import Model
from pitstop.data.packed import PackedDataset
from pitstop.nn import models

MODEL: dict[str, Any] = {
    "name": "resnet18",
    "kwargs": {"layers": [1, 1, 0, 0], "channels": [8, 8, 8, 8], "zero_init_last": False},
}
EVAL = {
    "crop_ratio": 0.9,
    "resolution": 20,
    "flip_average": True,
    "batch_size": 8,
    "also": [{"resolution": 16}],
}


def save_run(path: Path, data: PackedDataset, model: dict[str, Any] | None = None) -> Path:
    """Writes best.safetensors, run.json and a ledger of a model that nobody trained."""
    described = MODEL | (model or {})
    made = models.build(Model(**described), len(data.classes), seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made.train()(torch.randn(16, 3, 24, 24))  # statistics of its own
        for layer in models.classifier(made):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight)
    header = {
        "name": "tiny",
        "model": described,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "eval": EVAL,
        "precision": "fp32",
        "classes": list(data.classes),
    }
    path.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    save_file(tensors, path / "best.safetensors", {"pitstop": json.dumps(header)})
    figures = {"top1": 12.5, "top5": 50.0, "protocol": {"resolution": 20, "images": 21}}
    stated = {"data": {"packed": str(data.path)}, "best": figures, "recipe": {"name": "tiny"}}
    (path / "run.json").write_text(json.dumps(stated))
    (path / "ledger.jsonl").write_text('{"kind": "start", "id": "the-only-one"}\n')
    return path
