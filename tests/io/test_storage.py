"""Durable files: whole or not there, also through SIGKILL."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.errors import InputError
from pitstop.io.storage import (
    PARTIAL,
    atomic_write,
    locked,
    read_json,
    sha256,
    write_json,
    write_text,
)

WRITE_AND_HANG = """
import sys
from pathlib import Path
from pitstop.io.storage import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"new" * 100_000)
    file.flush()
    print("half way", flush=True)
    sys.stdin.read()
"""
LOCK_AND_HANG = """
import sys
from pathlib import Path
from pitstop.io.storage import locked
with locked(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def process(script: str, path: Path):
    """A process that has said where it is and goes no further; killed at the end at the latest."""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline()
        try:
            yield running
        finally:
            running.kill()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.txt"


def beside(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def failing_write(path: Path, error: BaseException) -> None:
    with atomic_write(path) as file:
        file.write(b"half")
        raise error


# Atomic writes


def test_a_file_appears_with_all_that_was_written(path):
    with atomic_write(path) as file:
        file.write(b"one")
        file.write(b"two")
        assert not path.exists()
    assert path.read_bytes() == b"onetwo"
    assert beside(path) == [path.name]


def test_an_old_file_is_replaced_and_not_written_over(path):
    write_text(path, "long old content")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "long old content"
    assert path.read_text() == "new"


def test_folders_on_the_way_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "file.txt", "new")
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), SystemExit()])
def test_a_block_that_raises_leaves_what_was_there(path, error):
    write_text(path, "old")
    with pytest.raises(type(error)):
        failing_write(path, error)
    assert path.read_text() == "old"
    assert beside(path) == [path.name]


def test_a_first_write_that_raises_leaves_nothing(path):
    with pytest.raises(RuntimeError):
        failing_write(path, RuntimeError())
    assert beside(path) == []


def test_sigkill_in_the_middle_leaves_what_was_there_and_the_next_write_works(path):
    write_text(path, "old")
    with process(WRITE_AND_HANG, path) as writer:
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
    assert path.read_text() == "old"
    assert set(beside(path)) <= {path.name, path.name + PARTIAL}
    write_text(path, "new")
    assert path.read_text() == "new"
    assert beside(path) == [path.name]


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(path, monkeypatch):
    done: list[int | str] = []
    fsync, replace = os.fsync, Path.replace

    def traced_fsync(descriptor):
        status = os.fstat(descriptor)
        done.append(status.st_size if stat.S_ISREG(status.st_mode) else "directory")
        fsync(descriptor)

    def traced_replace(self, target):
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "replace", traced_replace)
    write_text(path, "12345")
    assert done == [5, "rename", "directory"]


# JSON and checksums


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.floats(-1, 1)))
)
def test_json_is_read_back_as_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert json.loads(path.read_text()) == value


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe\x00", b"{} {}"])
def test_json_that_is_no_mapping_is_called_damaged(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.txt: is damaged"):
        read_json(path)


def test_json_that_is_not_there_is_an_os_error(path):
    with pytest.raises(FileNotFoundError):
        read_json(path)


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 5000])
def test_sha256_is_that_of_the_content(path, content):
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


# Locks


def hold(path: Path) -> None:
    with locked(path, "busy: wait"):
        pass


def test_a_second_process_is_refused_until_the_first_one_dies(path):
    with process(LOCK_AND_HANG, path) as holder:
        with pytest.raises(InputError, match="busy: wait"):
            hold(path)
        holder.kill()
        holder.wait()
        hold(path)


def test_a_lock_ends_with_its_block_also_by_an_error(path):
    hold(path)
    with pytest.raises(RuntimeError), locked(path, "busy"):
        raise RuntimeError
    hold(path)


def test_a_lock_excludes_within_one_process_too(path):
    with locked(path, "busy: wait"), pytest.raises(InputError, match="busy"):
        hold(path)


def test_locks_of_other_paths_do_not_matter(tmp_path):
    with locked(tmp_path / "a" / ".lock", "busy"), locked(tmp_path / "b" / ".lock", "busy"):
        assert (tmp_path / "a").is_dir()
