"""FFCV. Variants: `500`, its usual ImageNet file; `341`, a file of JPEGs only.

500: the longest side at most 500 px, half of the images raw, the others JPEG of quality 90, which
is what its ImageNet script writes. 341: all JPEG of quality 90.
"""

# pyright: reportMissingImports=false

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder

from peers.task import COPIES, RATIO, SCALE, Batches, Pipeline, Task, made_once

PACKAGES = ("ffcv", "numpy", "numba", "torch")

FILES = {
    "500": {"write_mode": "proportion", "max_resolution": 500, "compress_probability": 0.5},
    "341": {"write_mode": "jpg", "max_resolution": 341},
}


def prepare(task: Task) -> None:
    """Writes the file."""
    with made_once(task.cache / f"ffcv-{task.variant}.beton") as out:
        if out is None:
            return
        data = ImageFolder(str(task.images))
        image = RGBImageField(**FILES[task.variant], jpeg_quality=90)
        writer = DatasetWriter(str(out), {"image": image, "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset(data)


def opened(task: Task) -> Pipeline:
    side = task.resolution
    decoder = RandomResizedCropRGBImageDecoder((side, side), SCALE, RATIO)
    file = str(task.cache / f"ffcv-{task.variant}.beton")
    every = np.arange(len(ImageFolder(str(task.images))))
    loader = Loader(
        file,
        task.batch_size,
        num_workers=task.cores,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(every, COPIES),
        drop_last=True,
        pipelines={
            "image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        },
    )

    def batches() -> Batches:
        iterator = iter(loader)
        try:
            for images, _ in iterator:
                yield images
        finally:
            iterator.terminate_event.set()
            iterator.join()  # it makes a few batches more, which nobody else's turn should pay
            iterator.close()

    return batches
