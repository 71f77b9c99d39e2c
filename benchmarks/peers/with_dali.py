"""NVIDIA DALI on the CPU: its decoder decodes only what the random crop needs, then it resizes.

Variants: `originals`; `256` and `400`, files of that short side, JPEG quality 90. The resize is
DALI's plain bilinear one: its antialiased one is slower.
"""

# pyright: reportMissingImports=false

from pathlib import Path

from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from peers.task import RATIO, SCALE, Batches, Pipeline, Task, labelled, made_once

PACKAGES = ("nvidia-dali-cuda120",)


def folder(task: Task) -> Path:
    if task.variant == "originals":
        return task.images
    return task.cache / f"short-side-{task.variant}"


def prepare(task: Task) -> None:
    """Writes the smaller files."""
    with made_once(folder(task)) as out:
        if out is None:
            return
        for file, _ in labelled(task.images):
            place = out / file.parent.name
            place.mkdir(parents=True, exist_ok=True)
            shrink(file, int(task.variant), place / file.name)


def shrink(file: Path, short_side: int, out: Path) -> None:
    """Writes a copy of an image whose short side is at most so many pixels."""
    with Image.open(file) as image:
        factor = min(1, short_side / min(image.size))
        width, height = (round(side * factor) for side in image.size)
        smaller = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    smaller.save(out, "JPEG", quality=90)


def opened(task: Task) -> Pipeline:
    files, labels = zip(*labelled(folder(task)), strict=True)

    @pipeline_def(batch_size=task.batch_size, num_threads=task.cores, device_id=None)
    def pipeline():
        data, _ = fn.readers.file(
            files=[str(file) for file in files], labels=list(labels), random_shuffle=True
        )
        images = fn.decoders.image_random_crop(
            data, random_area=SCALE, random_aspect_ratio=RATIO, num_attempts=10
        )
        side = task.resolution
        images = fn.resize(
            images,
            size=(side, side),
            interp_type=types.DALIInterpType.INTERP_LINEAR,
            antialias=False,
        )
        return fn.flip(images, horizontal=fn.random.coin_flip())

    def batches() -> Batches:
        pipe = pipeline()
        pipe.build()
        while True:
            (images,) = pipe.run()
            yield images.as_array()

    return batches
