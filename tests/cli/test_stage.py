"""`pitstop data stage` on the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pitstop.data.pack import pack
from pitstop.data.sources.digits import digits_source
from pitstop.io.objects import open_store


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage") / "digits"
    pack(digits_source(), out, shard_bytes=50_000, workers=1)
    return out


@pytest.fixture
def url(bucket: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A packed dataset in a bucket."""
    monkeypatch.chdir(tmp_path)
    store = open_store(f"{bucket}/digits")
    for path in digits.iterdir():
        store.put(path.name, path)
    return f"{bucket}/digits"


def test_it_says_what_it_copied_and_then_that_all_is_there(command: Callable, url: str) -> None:
    said = command("data", "stage", url, "here")
    assert said.code == 0
    assert said.out.startswith("here: 9 files, 0.4 MB; 9 copied, 0.4 MB in ")
    assert said.out.endswith(" MB/s\n")
    assert said.err == ""
    assert command("data", "stage", url, "here").out == "here: 9 files, 0.4 MB; all there\n"


def test_json_is_one_object_and_nothing_else(command: Callable, url: str, digits: Path) -> None:
    said = command("data", "stage", url, "here", "--json")
    answer = json.loads(said.out)
    size = sum(path.stat().st_size for path in digits.glob("*.arrow"))
    assert answer["path"] == "here"
    assert answer["files"] == answer["copied_files"] == len([*digits.glob("*.arrow")])
    assert answer["bytes"] == answer["copied_bytes"] == size
    assert answer["mb_per_second"] > 0
    assert said.err == ""


def test_a_slow_mount_is_staged_for_a_recipe(
    command: Callable, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "here"
    options = ("--recipe", "demo", "--set", "data_fraction=0.1")
    assert command("data", "stage", digits, out, *options).code == 0
    assert {path.name for path in digits.iterdir()} <= {path.name for path in out.iterdir()}


def test_what_is_wrong_is_one_line_without_secrets(
    refused: Callable[..., str], url: str, aws: pytest.MonkeyPatch
) -> None:
    lines = [refused("data", "stage", "s3://no-such-bucket", "here")]
    assert lines[-1].startswith("s3://no-such-bucket/manifest.json: there is no such bucket")
    lines.append(refused("data", "stage", url + "x", "here"))
    assert lines[-1].startswith(f"{url}x: has no manifest.json")
    lines.append(refused("data", "stage", "nowhere", "here"))
    assert lines[-1].startswith("nowhere: is not a directory")
    lines.append(refused("data", "stage", url, "here", "--recipe", "demmo"))
    assert "demo" in lines[-1]
    lines.append(refused("data", "stage", url, "here", "--set", "epochs=3"))
    assert lines[-1] == "--set changes a recipe: give --recipe too"
    lines.append(refused("data", "stage", url, "/proc/here"))
    assert lines[-1].startswith("/proc/here: cannot be written")
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    lines.append(refused("data", "stage", url, "here"))
    assert "the server was not reached" in lines[-1]
    assert not any("secret" in line or "AKIA" in line for line in lines)
    assert not Path("here").exists()
