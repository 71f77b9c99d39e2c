"""MosaicML streaming: the originals in MDS shards; decode_jpeg and the transforms v2."""

# pyright: reportMissingImports=false

from functools import partial
from typing import Any

from streaming import MDSWriter, Stream, StreamingDataset
from torch.utils.data import DataLoader

from peers.task import COPIES, Pipeline, Task, labelled, made_once
from peers.torch_loader import Augmented, images_of

PACKAGES = ("mosaicml-streaming", "torchvision", "torch")


class Images(StreamingDataset):
    """Augmented images with their labels."""

    def __init__(self, task: Task) -> None:
        stream = Stream(local=str(task.cache / "streaming"), repeat=COPIES)
        super().__init__(streams=[stream], shuffle=True, batch_size=task.batch_size)
        self.augmented = Augmented(task.resolution)

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return self.augmented(sample["image"]), sample["label"]


def prepare(task: Task) -> None:
    """Writes the shards."""
    with made_once(task.cache / "streaming") as out:
        if out is None:
            return
        with MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}) as writer:
            for file, label in labelled(task.images):
                writer.write({"image": file.read_bytes(), "label": label})


def opened(task: Task) -> Pipeline:
    loader = DataLoader(Images(task), task.batch_size, num_workers=task.cores, drop_last=True)
    return partial(images_of, loader)
