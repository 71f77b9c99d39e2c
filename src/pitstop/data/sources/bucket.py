"""Class folders in a bucket, read where they are."""

from functools import partial
from hashlib import blake2b

from pitstop.core.errors import InputError
from pitstop.data.sources.base import Source, constant_reader
from pitstop.data.sources.layout import PathListing, class_folders
from pitstop.io.objects import ObjectStore, open_store

_NEEDS_DISK = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".parquet")


def bucket_source(url: str) -> Source:
    """Returns the images of class folders below a URL; `layout` has the layouts.

    Raises:
        InputError: the bucket cannot be listed, or holds something else.
    """
    store = open_store(url)
    objects = {found.key: found for found in store.list()}
    if not objects:
        raise InputError(f"{url} has no objects: check the name")
    _refuse_others(url, list(objects))
    found = class_folders(PathListing(url.rstrip("/"), objects))
    digest = blake2b(url.rstrip("/").encode(), digest_size=32)
    for item in sorted((*found.train, *found.val)):
        one = objects[item.name]
        digest.update(f"\0{one.key}\0{one.size}\0{one.etag}".encode())
    key = digest.hexdigest()
    reader = constant_reader(partial(_read, store))
    return Source(url, found.classes, found.train, found.val, key, found.notes, reader)


def _refuse_others(url: str, keys: list[str]) -> None:
    if "train-00000.arrow" in keys:
        raise InputError(f"{url} is a packed dataset in a bucket: pitstop data stage {url} DIR")
    other = next((key for key in sorted(keys) if key.lower().endswith(_NEEDS_DISK)), None)
    if other is not None:
        raise InputError(
            f"{url} has {other}, which is not read in a bucket: download it, and name its folder"
        )


def _read(store: ObjectStore, name: str) -> bytes:
    return store.get(name)
