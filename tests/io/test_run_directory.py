"""The run directory."""

import time

import pytest

from pitstop.core.errors import InputError
from pitstop.io.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "runs" / "demo")


def begun(run: RunDirectory, text: str = "{}\n") -> RunDirectory:
    """A run with a record."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.events.write_text(text)
    return run


def test_there_is_nothing_where_no_run_was(run):
    assert run.read() is None
    assert run.set_aside() is None
    assert not run.path.exists()


def test_fields_are_written_one_over_the_other(run):
    run.write(status="running", step=3, metrics={"top1": 1.0, "top5": 2.0})
    run.write(status="finished", metrics={"top1": 9.0})
    assert run.read() == {"status": "finished", "step": 3, "metrics": {"top1": 9.0}}


def test_a_damaged_run_json_is_no_hindrance_and_is_written_anew(run):
    begun(run).run_json.write_text("{")
    assert run.read() is None
    run.write(status="running")
    assert run.read() == {"status": "running"}


def test_every_file_of_a_run_has_its_own_place_within(run):
    places = [run.run_json, run.events, run.csv, run.text, run.checkpoints, run.plots]
    places += [run.weights(which, raw=raw) for which in ("best", "last") for raw in (False, True)]
    assert len(set(places)) == len(places)
    assert all(place.parent == run.path for place in places)
    assert run.weights("best").name == "best.safetensors"


def test_a_run_that_is_being_written_is_refused_by_name(run):
    refused = pytest.raises(InputError, match=r"demo: another process.*--out")
    with run.lock(), refused, run.lock():
        pytest.fail("a second lock was had")
    with run.lock():
        assert run.path.is_dir()


def test_a_run_set_aside_is_whole_under_a_name_with_the_time(run):
    begun(run, "old\n").write(status="finished")
    aside = run.set_aside()
    assert aside is not None
    assert not run.path.exists()
    assert aside.parent == run.path.parent
    assert aside.name.startswith(f"demo-{time.strftime('%Y')}")
    assert RunDirectory(aside).events.read_text() == "old\n"
    assert RunDirectory(aside).read() == {"status": "finished"}


def test_runs_set_aside_in_the_same_second_are_both_kept(run, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    aside = [begun(run, "first\n").set_aside(), begun(run, "second\n").set_aside()]
    assert [RunDirectory(path).events.read_text() for path in aside] == ["first\n", "second\n"]


def test_a_folder_of_something_else_is_left_alone(run):
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"demo: is not empty and holds no run.*--out"):
        run.set_aside()
    assert (run.path / "thesis.tex").read_text() == "years"


def test_a_file_in_the_place_of_the_run_is_bad_input(run):
    run.path.parent.mkdir(parents=True)
    run.path.write_text("a file")
    with pytest.raises(InputError, match="demo"):
        run.set_aside()


def test_an_empty_folder_is_not_in_the_way(run):
    run.path.mkdir(parents=True)
    run.set_aside()
    assert not run.path.exists()


def test_a_run_that_was_killed_before_its_first_record_is_not_in_the_way(run):
    with run.lock():
        pass
    run.set_aside()
    assert not run.events.exists()
