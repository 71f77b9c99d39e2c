"""torch's DataLoader: what is common to the contenders that stand on it."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from peers.task import RATIO, SCALE, Batches


def augmentation(resolution: int) -> v2.Compose:
    """Returns RandomResizedCrop, antialiased, and flip, of uint8 tensors [3, H, W]."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(resolution, SCALE, RATIO, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )


class Augmented:
    """From encoded bytes to an augmented tensor: torchvision's fastest way.

    It is a class so that worker processes can be sent it.
    """

    def __init__(self, resolution: int) -> None:
        self.augment = augmentation(resolution)

    def __call__(self, data: bytes) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.augment(decode_jpeg(encoded, ImageReadMode.RGB))


def decode_file(path: str | Path) -> torch.Tensor:
    """Returns the pixels of a JPEG file, uint8 [3, H, W]."""
    image = decode_jpeg(read_file(str(path)), ImageReadMode.RGB)
    assert isinstance(image, torch.Tensor)
    return image


def images_of(loader: DataLoader) -> Batches:
    """Yields the images of a DataLoader's (images, labels); its processes end with it."""
    iterator = iter(loader)
    try:
        for images, _ in iterator:
            yield images
    finally:
        del iterator
