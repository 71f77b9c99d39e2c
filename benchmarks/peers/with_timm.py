"""timm's create_loader, without the normalisation that it does after loading.

Its worker processes collate uint8 batches; the iterator around them (`PrefetchLoader`), which
normalises on the device, is left out.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from functools import partial

import torch
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader

from peers.task import COPIES, RATIO, SCALE, Pipeline, Task
from peers.torch_loader import images_of

PACKAGES = ("timm", "torchvision", "torch", "pillow")


def prepare(task: Task) -> None:
    """The original files are read."""


def opened(task: Task) -> Pipeline:
    data = create_dataset("", str(task.images))
    data.reader.samples = data.reader.samples * COPIES
    prefetcher = create_loader(
        data,
        input_size=(3, task.resolution, task.resolution),
        batch_size=task.batch_size,
        is_training=True,
        scale=SCALE,
        ratio=RATIO,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=task.cores,
        persistent_workers=False,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    return partial(images_of, prefetcher.loader)
