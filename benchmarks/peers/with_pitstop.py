"""pitstop. The variant is the short side of the packed images, then those of levels: `256+192`."""

from pathlib import Path

from peers.task import RATIO, SCALE, Batches, Pipeline, Task
from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.load import Loader
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.folder import folder_source

PACKAGES = ("pitstop", "simplejpeg", "torch", "numpy")


def packed(task: Task) -> Path:
    return task.cache / f"pitstop-{task.variant}"


def prepare(task: Task) -> None:
    """Packs anew each time: the packer may have changed."""
    source = folder_source(task.images.parent)
    short_side, *levels = (int(side) for side in task.variant.split("+"))
    pack(source, packed(task), short_side=short_side, levels=levels, workers=task.cores)


def timeline_for(task: Task, num_samples: int) -> Timeline:
    """Returns a long run with the augmentation that all contenders do."""
    stated = {
        "epochs": 100_000,
        "batch_size": task.batch_size,
        "resolution": task.resolution,
        "crop": {"scale": list(SCALE), "ratio": list(RATIO)},
        "flip": "random",
    }
    return Timeline(parse_recipe(stated, "benchmark"), num_samples=num_samples)


def opened(task: Task) -> Pipeline:
    data = PackedDataset.open(packed(task))
    timeline = timeline_for(task, len(data.train))

    def batches() -> Batches:
        with Loader(data.train, timeline, range(timeline.last), workers=task.cores) as loader:
            for batch in loader:
                yield batch.images

    return batches
