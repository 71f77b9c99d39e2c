"""LitData: the originals in its chunks; decode_jpeg and the transforms v2."""

# pyright: reportMissingImports=false

from functools import partial
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize

from peers.task import Pipeline, Task, labelled, made_once
from peers.torch_loader import Augmented, images_of

PACKAGES = ("litdata", "torchvision", "torch")

COPIES = 12
"""In its files: it has no way to go through a dataset many times in an epoch."""


class Images(StreamingDataset):
    """Augmented images with their labels."""

    def __init__(self, task: Task) -> None:
        super().__init__(str(task.cache / "litdata"), shuffle=True, drop_last=True)
        self.augmented = Augmented(task.resolution)

    def __getitem__(self, at: Any) -> Any:
        data, label = super().__getitem__(at)
        return self.augmented(data), label


def sample(item: tuple[str, int]) -> tuple[bytes, int]:
    file, label = item
    return Path(file).read_bytes(), label


def prepare(task: Task) -> None:
    """Writes the chunks."""
    with made_once(task.cache / "litdata") as out:
        if out is None:
            return
        items = [(str(file), label) for file, label in labelled(task.images)]
        optimize(sample, items * COPIES, str(out), chunk_bytes="64MB", num_workers=1)


def opened(task: Task) -> Pipeline:
    loader = StreamingDataLoader(
        Images(task), batch_size=task.batch_size, num_workers=task.cores, drop_last=True
    )
    return partial(images_of, loader)
