"""WebDataset: the originals in ten tar files of 100; decode_jpeg and the transforms v2."""

# pyright: reportMissingImports=false

from functools import partial

import webdataset as wds

from peers.task import Pipeline, Task, labelled, made_once
from peers.torch_loader import Augmented, images_of

PACKAGES = ("webdataset", "torchvision", "torch")
A_SHARD = 100


def prepare(task: Task) -> None:
    """Writes the tar files."""
    with made_once(task.cache / "webdataset") as out:
        if out is None:
            return
        out.mkdir()
        with wds.ShardWriter(str(out / "%05d.tar"), maxcount=A_SHARD) as writer:
            for file, label in labelled(task.images):
                writer.write({"__key__": file.stem, "jpg": file.read_bytes(), "cls": label})


def opened(task: Task) -> Pipeline:
    shards = sorted(str(path) for path in (task.cache / "webdataset").glob("*.tar"))
    data = (
        wds.WebDataset(shards, resampled=True)  # without end
        .shuffle(A_SHARD)
        .to_tuple("jpg", "cls")
        .map_tuple(Augmented(task.resolution), int)
        .batched(task.batch_size)
    )
    return partial(images_of, wds.WebLoader(data, batch_size=None, num_workers=task.cores))
