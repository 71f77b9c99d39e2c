"""pitstop in Python: a run in three lines, what it left, and the plan."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitstop.api import Run, plan, train
from pitstop.core.errors import InputError

TINY = {
    "epochs": 2,
    "workers": 2,
    "model.kwargs": {"layers": [1, 1, 0, 0], "channels": [8, 16, 16, 16]},
    "phases": [
        {"name": "a", "duration": "50%", "resolution": 12, "data_fraction": 0.2},
        {"name": "b", "resolution": 16, "data_fraction": 0.2},
    ],
}
"""The demo recipe in half a second."""


class NoPlotter:
    """Stands for the child process that draws."""

    def __init__(self, run: object) -> None: ...

    def update(self) -> None: ...

    def finish(self) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all runs, with a cache of its own and no plots; one thread computes."""
    import torch

    folder = tmp_path_factory.mktemp("api")
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PITSTOP_CACHE", str(folder / "cache"))
        patch.setattr("pitstop.engine.journal.Plotter", NoPlotter)
        yield folder
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return train("demo", **TINY)


def test_importing_pitstop_imports_nothing_and_train_no_torch():
    code = """
import sys
import pitstop
assert pitstop.__version__
light = {"pydantic", "numpy", "yaml", "rich"} & set(sys.modules)
assert not light, light
from pitstop import Run, train
heavy = {"torch", "torchvision", "timm", "pyarrow", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_name_that_pitstop_lacks_is_an_attribute_error():
    import pitstop

    with pytest.raises(AttributeError, match="'pitstop' has no attribute 'trian'"):
        pitstop.trian  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


def test_a_run_tells_what_its_directory_does(run: Run, place: Path):
    assert run.path == Path("runs/demo")
    assert run.status == "finished"
    with (place / "runs/demo/training_log.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    assert [str(row.val_top1) for row in run.history] == [row["val_top1"] for row in logged]
    assert run.metrics.step == int(logged[-1]["step"])
    assert run.metrics.top1 == pytest.approx(float(logged[-1]["val_top1"]), abs=5e-4)
    assert run.metrics.protocol["images"] == 359
    assert run.best.top1 == pytest.approx(max(row.val_top1 for row in run.history), abs=5e-4)
    assert run.weights.is_file()


def test_the_same_call_goes_on_with_the_run_and_a_changed_one_does_not(run: Run):
    before = run.metrics
    assert train("demo", **TINY).metrics == before
    with pytest.raises(InputError, match="label_smoothing"):
        train("demo", **TINY, label_smoothing=0.2)


def test_the_plan_is_that_of_the_run(run: Run):
    planned = plan("demo", **TINY)
    assert planned.last == run.metrics.step
    assert len(planned.evaluations) == len(run.history)


def test_settings_may_be_dotted_and_data_be_counted():
    planned = plan("standard", data="digits", **{"phases.0.resolution": 96, "batch_size": 64})
    assert planned.num_samples == 1438
    assert [segment.resolution for segment in planned.segments] == [96, 224]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda: train("dmeo"), "did you mean 'demo'"),
        (lambda: train("demo", epoch=3), "unknown key 'epoch'; did you mean 'epochs'"),
        (lambda: train("standard"), "names no data: give data="),
        (lambda: plan("standard"), "give samples= or data="),
        (lambda: Run(Path("nothing")).status, "nothing: holds no run.json"),
        (lambda: Run(Path("begun")).metrics, "begun: has not been evaluated yet"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(wrong, expected: str, place: Path):
    (place / "begun").mkdir(exist_ok=True)
    (place / "begun/run.json").write_text('{"status": "running", "metrics": null}')
    with pytest.raises(InputError, match=expected):
        wrong()
