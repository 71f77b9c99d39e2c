"""`pitstop watch`."""

import json
import time
from pathlib import Path

import pytest

from ..report.running import write_run

pytestmark = pytest.mark.usefixtures("place")

ENTERS, LEAVES = "\x1b[?1049h", "\x1b[?1049l"
"""What turns a terminal's second screen on and off."""


@pytest.fixture(autouse=True)
def size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")


def test_one_screen_is_printed_and_nothing_is_written(command, content, place):
    write_run(place / "one", 60)
    write_run(place / "two", 20)
    before = content(place)
    said = command("watch", "one", "two", "--once")
    assert (said.code, said.err) == (0, "")
    assert content(place) == before
    assert not list(place.glob("*/.lock"))
    rows = said.out.splitlines()
    assert len(rows) <= 23
    assert {"one", "two"} <= set(rows[0].split())
    assert "\x1b" not in said.out


def test_into_a_pipe_one_screen_is_printed(command, place):
    write_run(place / "run", 20)
    assert "step 20/80" in command("watch", "run").out


@pytest.mark.usefixtures("terminal")
def test_it_follows_the_run_to_its_end(command, place, monkeypatch):
    run = write_run(place / "run", 20)
    stated = json.loads((run / "run.json").read_text())

    def sleep(seconds: float) -> None:
        finished = stated | {"status": "finished", "exit_code": 0}
        (run / "run.json").write_text(json.dumps(finished))

    monkeypatch.setattr(time, "sleep", sleep)
    said = command("watch", "run")
    assert said.code == 0
    watching, after = said.out.split(LEAVES)
    assert ENTERS in watching
    assert "finished" not in watching
    assert "finished" in after


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_ends_the_watching_and_the_terminal_is_as_before(command, place, monkeypatch):
    write_run(place / "run", 20)

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    said = command("watch", "run")
    assert (said.code, said.err) == (0, "")
    assert said.out.index(ENTERS) < said.out.index(LEAVES)


@pytest.mark.usefixtures("terminal")
def test_a_run_that_is_over_is_printed(command, place):
    write_run(place / "run", 80, status="finished", exit_code=0)
    said = command("watch", "run")
    assert ENTERS not in said.out
    assert "finished" in said.out


def test_a_place_without_a_run_is_refused(refused, place):
    (place / "empty").mkdir()
    assert "nowhere: is no directory" in refused("watch", "nowhere")
    assert "empty: holds no run" in refused("watch", "empty")
    assert "RUN" in refused("watch")
    assert [path.name for path in Path().iterdir()] == ["empty"]
