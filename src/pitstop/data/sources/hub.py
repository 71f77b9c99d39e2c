"""Datasets of the Hugging Face hub: hf://OWNER/NAME[@REVISION][/CONFIG].

Files go into the cache of huggingface_hub, which goes on with what is there; a token is taken from
the environment only (HF_TOKEN).
"""

import os
import re
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from glob import escape
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pitstop.core.errors import InputError
from pitstop.data.sources.base import Source
from pitstop.data.sources.layout import files_by_split, split_of
from pitstop.data.sources.parquet import parquet_source
from pitstop.data.sources.tar import tar_source

HUB = "hf://"

_CONVERTED = "refs/convert/parquet"
"""Where the hub keeps the Parquet files that it makes of other formats."""


class _Address(NamedTuple):
    repository: str
    revision: str | None
    config: str | None


class _Files(NamedTuple):
    revision: str
    """A commit."""
    names: list[str]


def hub_source(spec: str) -> Source:
    """Returns the images of a dataset of the hub, in Parquet files or WebDataset's tar files.

    The files of the splits that are used are downloaded if they are not in the cache.

    Raises:
        InputError: `spec` is not of this form, the dataset cannot be reached, or is of no known
            layout.
    """
    address = _parse(spec)
    files = _list(spec, address)
    chosen = _of_config(spec, files.names, address.config)
    splits = files_by_split(spec, chosen)
    wanted = [*splits.train, *splits.val]
    folder = _download(spec, address, files.revision, wanted)
    if wanted[0].endswith(".tar"):
        return tar_source([folder / name for name in wanted], spec)
    key = blake2b("\0".join([spec, files.revision, *wanted]).encode(), digest_size=32).hexdigest()
    return parquet_source(folder, wanted, spec, key)


def _parse(spec: str) -> _Address:
    rest = spec.removeprefix(HUB).removeprefix("datasets/").strip("/")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(refs/\w+/\w+|[^/]+))?(?:/(.+))?", rest)
    if match is None:
        raise InputError(f"{spec}: write it as hf://OWNER/NAME[@REVISION][/CONFIG]")
    return _Address(*match.groups())


def _token() -> str | bool:
    """Returns the token of the environment, or what keeps the hub's library from looking on."""
    return os.environ.get("HF_TOKEN") or False


def _list(spec: str, address: _Address) -> _Files:
    """Returns the data files of a dataset, or of what the hub has made of them."""
    api = huggingface_hub.HfApi(token=_token())
    for revision in [address.revision] if address.revision else [None, _CONVERTED]:
        try:
            with _explained(spec):
                info = api.dataset_info(address.repository, revision=revision)
        except InputError:
            if revision != _CONVERTED:
                raise
            break
        names = [file.rfilename for file in info.siblings or ()]
        for ending in (".parquet", ".tar"):
            found = [name for name in names if name.endswith(ending)]
            if found:
                return _Files(info.sha or revision or "main", found)
    raise InputError(f"{spec} has no Parquet files: download it, and name a class folder")


def _of_config(spec: str, names: Iterable[str], config: str | None) -> list[str]:
    """Returns the files of a configuration: those in its folder."""
    by_config: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        top, slash, _ = name.partition("/")
        own = slash and top != "data" and split_of(top) is None
        by_config[top if own else ""].append(name)
    known = sorted(name for name in by_config if name)
    if config is not None and config not in by_config:
        hint = f": take one of {', '.join(known)}" if known else ": leave it out"
        raise InputError(f"{spec} has no configuration {config!r}{hint}")
    if config is None and not by_config[""] and len(known) > 1:
        raise InputError(
            f"{spec} has several configurations: add one of {', '.join(known)}, as in "
            f"{spec.rstrip('/')}/{known[0]}"
        )
    return by_config[config or ("" if by_config[""] else known[0])]


def _download(spec: str, address: _Address, revision: str, names: Sequence[str]) -> Path:
    """Returns the folder in the cache that has the files."""
    with _explained(spec):
        return Path(
            huggingface_hub.snapshot_download(
                address.repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[escape(name) for name in names],
                token=_token(),
            )
        )


@contextmanager
def _explained(spec: str) -> Generator[None]:
    """Turns what the hub's library raises into an InputError."""
    try:
        yield
    except GatedRepoError:
        fix = "accept its terms on its page, and set HF_TOKEN"
        raise InputError(f"{spec} is gated: {fix}") from None
    except RepositoryNotFoundError:
        fix = "check the name, or set HF_TOKEN if it is private"
        raise InputError(f"{spec} is not on the hub: {fix}") from None
    except RevisionNotFoundError:
        raise InputError(f"{spec}: there is no such revision: check it") from None
    except HFValidationError:
        raise InputError(f"{spec}: write it as hf://OWNER/NAME[@REVISION][/CONFIG]") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{spec}: HF_HUB_OFFLINE is set: unset it") from None
    except Exception as error:  # its HTTP client is another one in each major version
        text = re.sub(r"\?\S+", "", " ".join(str(error).split()))  # addresses may be signed
        reason = text[:200] or type(error).__name__
        raise InputError(
            f"{spec} was not downloaded ({reason}): check the network, and try again"
        ) from None
