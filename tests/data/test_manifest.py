import json
from pathlib import Path
from typing import Any

import pytest

from pitstop.core.errors import InputError
from pitstop.data.manifest import read_manifest
from pitstop.data.pack import pack
from pitstop.data.sources.folder import folder_source

MISSING = object()


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    pack(folder_source(folder), tmp_path / "packed", short_side=40, levels=(32,), workers=1)
    return tmp_path / "packed"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("digest", MISSING),
        ("digest", "x"),
        ("classes", 5),
        ("classes", []),
        ("classes", ["cat", 1]),
        ("skipped", MISSING),
        ("converted", None),
        ("made", MISSING),
        ("made.short_side", "x"),
        ("made.quality", True),
        ("made.levels", None),
        ("made.source", 1),
        ("splits", MISSING),
        ("splits", {"train": {}}),
        ("splits.val", []),
        ("splits.train.rows", "18"),
        ("splits.train.content", MISSING),
        ("splits.train.shards", []),
        ("splits.train.shards[0]", "train-00000.arrow"),
        ("splits.train.shards[0].file", "../../../etc/hostname"),
        ("splits.train.shards[0].file", "/etc/hostname"),
        ("splits.train.shards[0].file", "folder/train-00000.arrow"),
        ("splits.val.shards[0].rows", "18"),
        ("splits.val.shards[0].rows", 0),
        ("splits.val.shards[0].bytes", -1),
        ("splits.val.shards[0].sha256", None),
        ("splits.val.index.bytes", 0),
        ("splits.train.index", MISSING),
        ("splits.train.index.file", "../train.index.arrow"),
        ("splits.train.levels", {"small": {}}),
        ("splits.train.levels.32.shards", MISSING),
    ],
)
def test_what_is_missing_or_wrong_in_a_manifest_is_named_in_one_line(packed, place, value):
    damage(packed, place, value)
    with pytest.raises(InputError) as error:
        read_manifest(packed)
    what = f"is damaged ({place} is missing or wrong): pack again"
    assert str(error.value) == f"{packed / 'manifest.json'} {what}"


def test_a_level_of_other_rows_than_its_split_is_refused(packed):
    damage(packed, "splits.train.levels.32.shards[0].rows", 5)
    with pytest.raises(InputError, match=r"levels\.32: a shard is missing or wrong"):
        read_manifest(packed)


def damage(packed: Path, place: str, value: object) -> None:
    """Puts a value at a place, or takes away what is there."""
    file = packed / "manifest.json"
    manifest: Any = json.loads(file.read_text())
    *way, last = (
        int(step) if step == "0" else step for step in place.replace("[0]", ".0").split(".")
    )
    node = manifest
    for step in way:
        node = node[step]
    assert node[last] is not None
    if value is MISSING:
        del node[last]
    else:
        node[last] = value
    file.write_text(json.dumps(manifest))
