"""Packings that are killed, stopped, or run out of something; then the same packing again."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.data import converters
from pitstop.data import pack as packing
from pitstop.data.pack import PackingStoppedError, pack, pack_once
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.digits import digits_source
from pitstop.data.sources.folder import folder_source

SHARD_BYTES = 20_000
"""Some 140 digits: the 1,797 make 11 shards for training and 3 for validation."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict[str, bytes]:
    """The digits, packed without disturbance."""
    out = tmp_path_factory.mktemp("calm") / "packed"
    pack(digits_source(), out, workers=1, shard_bytes=SHARD_BYTES, levels=(4,))
    return packed_files(out)


def packed_files(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def pack_digits(out: Path, **options) -> packing.PackReport:
    return pack(digits_source(), out, workers=2, shard_bytes=SHARD_BYTES, levels=(4,), **options)


PACK_DIGITS = """
import sys
from pathlib import Path
from pitstop.data import converters
from pitstop.data.pack import pack
from pitstop.data.sources.digits import digits_source
converters.FEW = int(sys.argv[2])
pack(digits_source(), Path(sys.argv[1]), workers=2, shard_bytes=20_000, levels=(4,),
     progress=lambda done, total: print(done, flush=True))
"""


@contextmanager
def packing_process(out: Path, few: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PACK_DIGITS, str(out), str(few)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        yield it


def wait_for(process: subprocess.Popen[str], seen: Callable[[int], bool]) -> None:
    """Waits until a process has said a number."""
    assert process.stdout is not None
    assert any(seen(int(line)) for line in process.stdout)


def converting(pid: int) -> list[int]:
    """The processes that convert for `pid`; a test's process may have other children."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in lists for child in path.read_text().split()]
    return [c for c in children if "converters" in Path(f"/proc/{c}/cmdline").read_text()]


@pytest.mark.parametrize("few", [0, 2000], ids=["processes", "threads"])
def test_killed_it_goes_on_behind_the_finished_shards(tmp_path, calm, few):
    journal = tmp_path / ".packed.packing/journal"
    with packing_process(tmp_path / "packed", few) as process:
        wait_for(process, lambda done: (journal / "train-00002.json").exists())
        process.send_signal(signal.SIGKILL)
    with pytest.raises(InputError):
        PackedDataset.open(tmp_path / "packed")
    finished = len(list(journal.glob("*.json")))
    seen = []
    report = pack_digits(tmp_path / "packed", progress=lambda done, total: seen.append(done))
    assert seen == list(range(report.resumed, 1798))
    assert report.resumed >= 100 * finished
    assert packed_files(tmp_path / "packed") == calm
    assert {path.name for path in tmp_path.iterdir()} == {"packed", ".packed.lock"}


@pytest.mark.parametrize("kill_after", [1, 1500, 1797])
def test_killed_at_any_time_the_result_is_the_same(tmp_path, calm, kill_after):
    with packing_process(tmp_path / "packed", 2000) as process:
        wait_for(process, lambda done: done == kill_after)
        process.send_signal(signal.SIGKILL)
    pack_digits(tmp_path / "packed")
    assert packed_files(tmp_path / "packed") == calm


def test_killed_at_the_very_end_it_is_packed_anew(tmp_path, calm, monkeypatch):
    """The dataset is in its place, the journal is still there."""
    with monkeypatch.context() as patch:
        patch.setattr(packing, "sync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack_digits(tmp_path / "packed")
    assert (tmp_path / ".packed.packing/journal/train-00000.json").exists()
    assert packed_files(tmp_path / "packed") == calm
    pack_digits(tmp_path / "packed")
    assert packed_files(tmp_path / "packed") == calm
    assert not (tmp_path / ".packed.packing").exists()


def interrupt(path: Path) -> None:
    if path.name != "remarks.csv" and not path.name.startswith("packed"):
        raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_processes_end_with_the_one_that_packs(tmp_path):
    with packing_process(tmp_path / "packed", 0) as process:
        wait_for(process, lambda done: True)
        assert len(converting(process.pid)) == 2
        process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        assert process.stderr.read() == ""  # which ends when the last of them has closed it


def test_stopped_it_goes_on(tmp_path, calm):
    done = []
    with pytest.raises(PackingStoppedError):
        pack_digits(
            tmp_path / "packed",
            progress=lambda count, _: done.append(count),
            should_stop=lambda: len(done) == 700,
        )
    assert done[-1] == 700
    assert not (tmp_path / "packed").exists()
    assert pack_digits(tmp_path / "packed").resumed > 400
    assert packed_files(tmp_path / "packed") == calm


def test_stopped_before_a_shard_is_finished_nothing_is_left(folder, tmp_path):
    done = []
    with pytest.raises(PackingStoppedError):
        pack(
            folder_source(folder),
            tmp_path / "packed",
            workers=2,
            progress=lambda count, _: done.append(count),
            should_stop=lambda: len(done) == 3,
        )
    assert done == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"photos", ".packed.lock"}


@pytest.mark.parametrize("change", ["source", "settings", "version"])
def test_another_packing_starts_anew(tmp_path, monkeypatch, change):
    done = []
    with pytest.raises(PackingStoppedError):
        pack_digits(
            tmp_path / "packed",
            progress=lambda count, _: done.append(count),
            should_stop=lambda: len(done) == 700,
        )
    assert (tmp_path / ".packed.packing/journal/train-00000.json").exists()
    source, options = digits_source(), {"levels": (4,)}
    match change:
        case "source":
            source = replace(source, key="another", train=source.train[:-100])
        case "settings":
            options = {"levels": (5,)}
        case "version":
            monkeypatch.setattr(packing, "__version__", "another")
    out = tmp_path / "packed"
    report = pack(source, out, workers=2, shard_bytes=SHARD_BYTES, **options)
    assert report.resumed == 0
    assert len(PackedDataset.open(out).train) == len(source.train)


def test_bad_images_are_listed_again_when_it_goes_on(folder, tmp_path, photo):
    for index in range(40):
        photo(40, 50, index).save(folder / f"train/cat/more{index}.jpg")
    (folder / "train/cat/bad.jpg").write_bytes(b"bad")
    (folder / "val/cat/bad.jpg").write_bytes(b"bad")
    photo(40, 50).save(folder / "train/dog/odd.gif")
    source, options = folder_source(folder), {"workers": 2, "shard_bytes": 3000}
    calm = pack(source, tmp_path / "calm", **options)
    for stop_at in (10, len(source.train) + 3, 59):
        done = []
        with pytest.raises(PackingStoppedError):
            pack(
                source,
                tmp_path / "packed",
                progress=lambda count, _, done=done: done.append(count),
                should_stop=lambda done=done, stop_at=stop_at: done[-1:] == [stop_at],
                **options,
            )
    report = pack(source, tmp_path / "packed", **options)
    assert report.resumed > 40
    assert (report.skipped, report.converted) == (calm.skipped, calm.converted)
    assert len(report.skipped) == 2
    assert packed_files(tmp_path / "packed") == packed_files(tmp_path / "calm")


def test_what_a_source_unpacks_is_kept_until_the_end(tmp_path):
    source = digits_source()
    unpacked = []

    def unpack(folder: Path) -> Callable[[str], bytes]:
        if not (folder / "images").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "images").write_text("")
            unpacked.append(folder)
        return source.open(folder)

    sequential = replace(source, open=unpack)
    with pytest.raises(PackingStoppedError):
        pack(sequential, tmp_path / "packed", workers=1, should_stop=lambda: True)
    pack(sequential, tmp_path / "packed", workers=1)
    assert unpacked == [tmp_path / ".packed.packing/source"]
    assert not (tmp_path / ".packed.packing").exists()


def test_a_source_that_fails_to_answer_does_not_cost_what_is_done(tmp_path, calm):
    source = digits_source()
    read = source.open(tmp_path)
    reads = []

    def unreachable(name: str) -> bytes:
        reads.append(name)
        if len(reads) > 900:
            raise InputError("s3://bucket: the server was not reached: check the network")
        return read(name)

    options = {"workers": 2, "shard_bytes": SHARD_BYTES, "levels": (4,)}
    with pytest.raises(InputError, match="the server was not reached"):
        pack(replace(source, open=lambda _: unreachable), tmp_path / "packed", **options)
    assert pack_digits(tmp_path / "packed").resumed > 400
    assert packed_files(tmp_path / "packed") == calm


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_is_killed_for_lack_of_memory(tmp_path, calm, monkeypatch):
    monkeypatch.setattr(converters, "FEW", 0)

    def kill_one(done: int, total: int) -> None:
        if done == 700:
            os.kill(converting(os.getpid())[0], signal.SIGKILL)

    with pytest.raises(InputError, match=r"was killed, for lack of memory .* fewer --workers"):
        pack_digits(tmp_path / "packed", progress=kill_one)
    assert converting(os.getpid()) == []
    assert pack_digits(tmp_path / "packed").resumed > 400
    assert packed_files(tmp_path / "packed") == calm


@pytest.mark.root
def test_on_a_full_disk_it_goes_on_when_there_is_space(tmp_path, calm):
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small disk needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.raises(InputError) as error:
            pack_digits(disk / "packed")
        assert "cannot be written (No space left on device): free some space" in str(error.value)
        assert "\n" not in str(error.value)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert pack_digits(disk / "packed").resumed > 100
        assert packed_files(disk / "packed") == calm
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_once_is_enough(tmp_path, photo, folder):
    source, out, said = folder_source(folder), tmp_path / "packed", []
    first = pack_once(source, out, workers=1, say=said.append, levels=(30,))
    before = packed_files(out)
    assert first is not None
    assert pack_once(source, out, workers=2, say=said.append, levels=(30,)) is None
    with pytest.raises(InputError, match=r"another packed dataset .*levels 30.*--force"):
        pack_once(source, out, workers=1, say=said.append)
    assert packed_files(out) == before
    assert pack_once(source, out, workers=1, say=said.append, replace=True) is not None
    assert list(PackedDataset.open(out).train.levels) == []
    photo(20, 20).save(folder / "train/cat/new.jpg")
    with pytest.raises(InputError, match="another packed dataset"):
        pack_once(folder_source(folder), out, workers=1, say=said.append)
    assert said == []
