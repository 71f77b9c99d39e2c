"""torchvision: ImageFolder and DataLoader.

Variants: `pil`, the usual pipeline of PIL and the transforms v1; `tensor`, decode_jpeg and the
transforms v2 on uint8 tensors, antialiased.
"""

from functools import partial

from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from peers.task import COPIES, RATIO, SCALE, Pipeline, Task
from peers.torch_loader import augmentation, decode_file, images_of

PACKAGES = ("torchvision", "torch", "pillow")


def prepare(task: Task) -> None:
    """The original files are read."""


def opened(task: Task) -> Pipeline:
    if task.variant == "pil":
        usual = transforms.Compose(
            [
                transforms.RandomResizedCrop(task.resolution, SCALE, RATIO),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )
        data = ImageFolder(str(task.images), usual)
    else:
        data = ImageFolder(str(task.images), augmentation(task.resolution), loader=decode_file)
    data.samples = data.samples * COPIES
    loader = DataLoader(data, task.batch_size, shuffle=True, num_workers=task.cores)
    return partial(images_of, loader)
