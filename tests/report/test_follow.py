"""Runs that are read as they grow, here and in a bucket."""

import shutil
import tarfile
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.io.objects import ObjectStore
from pitstop.io.remote import Remote
from pitstop.io.upload import Uploader
from pitstop.report import follow as following
from pitstop.report.follow import Followed, follow

from .running import NOW, events, write_events, write_run

SECONDS = 60.0
"""Longer than anything takes here."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", 20, durable={"step": 10, "time": NOW})


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look is one into the bucket."""
    monkeypatch.setattr(following, "BUCKET_SECONDS", 0.0)


def upload(url: str, run: Path, sequence: int) -> None:
    """Keeps a copy of a run, as training does."""
    remote = Remote(url)
    uploader = Uploader(remote, remote.claim())
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    uploader.offer(files, sequence=sequence, step=10 * sequence, epoch=0.5, top1=None)
    assert uploader.wait(SECONDS), uploader.problem
    uploader.close()


def last_step(run: Followed) -> int:
    return run.look().events[-1]["step"]


def test_what_is_recorded_is_read(run: Path, tmp_path: Path) -> None:
    look = follow(str(run), tmp_path / "scratch").look()
    assert look.state["status"] == "running"
    assert [event["kind"] for event in look.events].count("val") == 2
    assert (len(look.starts), look.seconds, look.lost) == (2, 900, (2, 2))
    assert look.spent == pytest.approx(0.9)
    assert look.saved is not None
    assert (look.saved.step, look.durable) == (10, following.Mark(10, NOW))
    assert not (tmp_path / "scratch").exists()


def test_a_run_grows(run: Path, tmp_path: Path) -> None:
    followed = follow(str(run), tmp_path / "scratch")
    assert last_step(followed) == 20
    with (run / "events.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 30}\n{"kind": "train", "st')
        file.flush()
        assert last_step(followed) == 30
        file.write('ep": 40}\n')
    assert last_step(followed) == 40


def test_a_run_that_went_back_is_read_anew(run: Path, tmp_path: Path) -> None:
    followed = follow(str(run), tmp_path / "scratch")
    assert last_step(followed) == 20
    write_events(run / "events.jsonl", events(15))
    assert last_step(followed) == 15
    write_events(run / "events.jsonl", [event | {"momentum": 0.5} for event in events(60)])
    train = [event for event in followed.look().events if event["kind"] == "train"]
    assert [event["step"] for event in train] == list(range(5, 65, 5))
    assert {event["momentum"] for event in train} == {0.5}


def test_damaged_lines_are_left_out(run: Path, tmp_path: Path) -> None:
    for name in ("events.jsonl", "ledger.jsonl"):
        with (run / name).open("a") as file:
            file.write('\x00\x00\n7\n{"step": 1}\n')
    (run / "checkpoints/y.json").write_text("{")
    (run / "run.json").write_text("{")
    look = follow(str(run), tmp_path / "scratch").look()
    assert (look.state, look.events[-1]["step"], len(look.starts)) == ({}, 20, 2)
    assert look.saved is not None
    assert look.saved.step == 10


@pytest.fixture(params=["bucket", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind."""
    if request.param == "bucket":
        return f"{request.getfixturevalue('bucket')}/mine"
    return str(tmp_path / "there")


@pytest.mark.usefixtures("at_once")
def test_the_newest_copy_of_a_run_is_read(place: str, run: Path, tmp_path: Path) -> None:
    upload(place, run, 1)
    scratch = tmp_path / "scratch"
    followed = follow(place, scratch)
    look = followed.look()
    assert (look.name, look.events[-1]["step"], len(look.starts)) == (place, 20, 2)
    assert look.durable == look.saved
    assert look.durable is not None
    assert look.durable.step == 10
    assert not [p for p in scratch.rglob("*") if p.suffix in (".pt", ".safetensors")]
    write_events(run / "events.jsonl", events(60))
    upload(place, run, 5)
    look = followed.look()
    assert look.durable is not None
    assert (look.events[-1]["step"], look.durable.step, look.problem) == (60, 50, None)


@pytest.mark.usefixtures("at_once")
def test_what_is_here_is_not_downloaded_again(
    place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(place, run, 1)
    got: list[str] = []
    get = ObjectStore.get

    def counting(store: ObjectStore, key: str) -> bytes:
        got.append(key.rpartition("/")[2])
        return get(store, key)

    monkeypatch.setattr(ObjectStore, "get", counting)
    followed = follow(place, tmp_path / "scratch")
    followed.look()
    assert "events.jsonl" in got
    got.clear()
    followed.look()
    assert set(got) <= {"manifest.json", "claim.json"}
    write_events(run / "events.jsonl", events(60))
    upload(place, run, 2)
    got.clear()
    followed.look()
    assert {"events.jsonl", "ledger.jsonl"} & set(got) == {"events.jsonl"}


def test_a_bucket_is_not_asked_all_the_time(tmp_path: Path, run: Path) -> None:
    place = str(tmp_path / "there")
    upload(place, run, 1)
    followed = follow(place, tmp_path / "scratch")
    before = followed.look()
    upload(place, run, 2)
    assert followed.look() is before


@pytest.mark.usefixtures("at_once")
def test_a_bucket_that_is_lost_leaves_what_was_seen(tmp_path: Path, run: Path) -> None:
    place = tmp_path / "there"
    upload(str(place), run, 1)
    followed = follow(str(place), tmp_path / "scratch")
    assert followed.look().problem is None
    shutil.rmtree(place)
    place.mkdir()
    look = followed.look()
    assert look.events[-1]["step"] == 20
    assert look.problem is not None
    assert str(place) in look.problem


def test_a_folder_that_holds_a_run_as_it_is(bucket: str, run: Path, tmp_path: Path) -> None:
    store = Remote(bucket).store
    for path in run.rglob("*"):
        if path.is_file():
            store.put(f"mine/{path.relative_to(run)}", path)
    look = follow(f"{bucket}/mine", tmp_path / "scratch").look()
    assert look.events[-1]["step"] == 20
    assert look.saved == following.Mark(10, None)


def test_a_tar_file_of_a_run(run: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "run.tar.gz", "w:gz") as archive:
        for path in run.iterdir():
            archive.add(path, path.name)
    look = follow(str(tmp_path / "run.tar.gz"), tmp_path / "scratch").look()
    assert look.events[-1]["step"] == 20


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is no directory"):
        follow(str(tmp_path / "nowhere"), tmp_path / "scratch")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match=r"photos: holds no run"):
        follow(str(tmp_path / "photos"), tmp_path / "scratch").look()
    with pytest.raises(InputError, match=r"nowhere: is not a directory"):
        follow(f"file://{tmp_path}/nowhere", tmp_path / "scratch")
    assert not (tmp_path / "nowhere").exists()
