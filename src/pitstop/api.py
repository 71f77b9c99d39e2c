"""pitstop in Python: train a recipe, read what a run left, look at a plan.

`train` and `Run` are in `pitstop` too. What is wrong raises `pitstop.core.errors.InputError`, a
ValueError whose message names the file or key and the fix.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe, load_recipe
from pitstop.core.timeline import Timeline
from pitstop.io.records import Row, read_events, rows
from pitstop.io.run_directory import RunDirectory


@dataclass(frozen=True)
class Metrics:
    """An evaluation of all validation images, each counted once.

    `top1` and `top5` are percentages, `loss` is the mean cross entropy; after `step` steps, which
    are `epoch` epochs. `protocol` says how it was measured; `also` has the same by others.
    """

    top1: float
    top5: float
    loss: float
    epoch: float
    step: int
    protocol: dict[str, Any]
    also: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


@dataclass(frozen=True)
class Run:
    """A run, as its directory tells it now; anybody's, not only one that `train` returned."""

    path: Path

    @property
    def status(self) -> str:
        """`finished`, `interrupted`, ...: see docs/run-directory.md.

        Raises:
            InputError: the directory holds no run.
        """
        return self._stated()["status"]

    @property
    def metrics(self) -> Metrics:
        """The last evaluation.

        Raises:
            InputError: the directory holds no run, or one that has not been evaluated yet.
        """
        return self._evaluation("metrics")

    @property
    def best(self) -> Metrics:
        """The evaluation with the highest top-1; raises as `metrics` does."""
        return self._evaluation("best")

    @property
    def history(self) -> list[Row]:
        """The rows of training_log.csv, one an evaluation."""
        return list(rows(read_events(self._directory.events)))

    @property
    def weights(self) -> Path:
        """The weights of `best`: a safetensors file, there as soon as there is a `best`."""
        return self._directory.weights("best")

    @property
    def _directory(self) -> RunDirectory:
        return RunDirectory(Path(self.path))

    def _stated(self) -> dict[str, Any]:
        stated = self._directory.read()
        if stated is None:
            raise InputError(f"{self.path}: holds no run.json: name the directory of a run")
        return stated

    def _evaluation(self, which: str) -> Metrics:
        evaluation = self._stated().get(which)
        if evaluation is None:
            raise InputError(f"{self.path}: has not been evaluated yet: train it further")
        known = {each.name for each in fields(Metrics)}
        return Metrics(**{key: value for key, value in evaluation.items() if key in known})


def train(
    recipe: str | Path = "demo",
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    start_over: bool = False,
    rebase: bool = False,
    remote: str | None = None,
    **settings: Any,
) -> Run:
    """Trains a recipe, as `pitstop train` does; the same call goes on with a run that was stopped.

    It trains on one device, in this process; started by torchrun, with the other ranks. Ctrl-C
    saves, and returns a run whose `status` is `interrupted`.

    Args:
        recipe: a bundled recipe's name, or a YAML file.
        data: what to train on, if not the recipe's: a packed dataset, a class folder, `digits`.
        out: the run directory; `runs/NAME` by default.
        start_over: rename a run that is in the way, instead of going on with it.
        rebase: go on with a changed recipe from here.
        remote: URL of a folder of a bucket in which a copy of the run is kept.
        settings: keys of the recipe: `epochs=4`, `mix=None`, `**{"phases.1.resolution": 192}`.

    Raises:
        InputError: naming the file or key, and the fix.
        RankFailedError: another rank failed.
    """
    loaded = _load(recipe, data, settings)
    if loaded.data is None:
        raise InputError(f"recipe {loaded.name} names no data: give data=")

    from pitstop.core.safeguards import Safeguards
    from pitstop.engine.resume import Wish
    from pitstop.engine.run import run_training

    path = Path(out) if out is not None else Path("runs") / loaded.name.replace("/", "-")
    run_training(
        Wish(loaded, rebase=rebase),
        path,
        start_over=start_over,
        safeguards=Safeguards(remote=remote),
    )
    return Run(path)


def plan(
    recipe: str | Path = "demo",
    *,
    samples: int | None = None,
    data: str | Path | None = None,
    **settings: Any,
) -> Timeline:
    """Returns the plan of a run: what `train` would do, asked of the same object.

    A learning rate that is to be searched for is the recipe's declared fallback.

    Args:
        recipe: a bundled recipe's name, or a YAML file.
        samples: training images; if None, those of the data are counted.
        data: as of `train`.
        settings: as of `train`.

    Raises:
        InputError: naming the file or key, and the fix.
    """
    loaded = _load(recipe, data, settings)
    if samples is None:
        if loaded.data is None:
            raise InputError(f"recipe {loaded.name} names no data: give samples= or data=")

        from pitstop.data.resolve import count_training_images

        samples = count_training_images(loaded.data, say=print)
    return Timeline.planned(loaded, samples)


def _load(recipe: str | Path, data: str | Path | None, settings: dict[str, Any]) -> Recipe:
    """Returns the recipe with the settings, and with the data where it is named."""
    named = {} if data is None else {"data": str(data)}
    return load_recipe(str(recipe), settings | named)
