"""A dataset of 60 + 21 digits, and runs that take seconds."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.safeguards import Safeguards
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.digits import digits_source
from pitstop.engine import train as engine
from pitstop.engine.guard import Guard
from pitstop.engine.outcome import Outcome
from pitstop.engine.resume import Wish
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.devices import Device
from pitstop.runtime.preemption import Preemption
from pitstop.runtime.ranks import Ranks

TINY = {
    "name": "tiny",
    "epochs": 4,
    "batch_size": 15,
    "grad_accum_steps": 2,
    "lr": 0.05,
    "lr_schedule": "onecycle",
    "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    "clip_grad_norm": 1.0,
    "label_smoothing": 0.1,
    "flip": "alternating",
    "ema": {"half_life": 5},
    "precision": "fp32",
    "model": {
        "name": "resnet18",
        "kwargs": {"layers": [1, 1, 0, 0], "channels": [8, 16, 16, 16], "drop_rate": 0.2},
    },
    "eval": {"crop_ratio": 1.0, "batch_size": 8},
    "phases": [
        {"duration": "50%", "resolution": 16, "mix": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}},
        {"duration": "rest", "resolution": 24, "data_fraction": 0.5, "batch_size": 10},
    ],
}
"""Everything that could keep a state: mixing, EMA, dropout, accumulation, a change of phase."""


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are computed faster by one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    source = digits_source()
    some = replace(source, train=source.train[::24], val=source.val[::17][:21])
    place = tmp_path_factory.mktemp("data") / "digits"
    pack(some, place, workers=1)
    return PackedDataset.open(place)


@pytest.fixture
def tiny() -> Callable[..., Recipe]:
    """Returns the tiny recipe, with the given keys changed."""
    return lambda **changes: parse_recipe({**TINY, **changes}, "tiny.yaml")


UNGUARDED = Safeguards(max_fruitless_starts=None)


class StopsAt(Preemption):
    """Asks for a stop when it is polled for the n-th time, as a signal at that moment would."""

    def __init__(self, poll: int | None = None) -> None:
        super().__init__()
        self.polls = 0
        self.stop = False
        self._poll = poll

    @property
    def requested(self) -> bool:
        self.polls += 1
        return self.stop or (self._poll is not None and self.polls >= self._poll)


class Trainer:
    """Runs the engine in this process."""

    def __init__(self, data: PackedDataset, recipe: Recipe, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.data = data
        self.recipe = recipe
        self.said = ""

    def __call__(
        self,
        out: Path,
        *,
        stop_at: int | None = None,
        steps: int | None = None,
        recipe: Recipe | None = None,
        safeguards: Safeguards = UNGUARDED,
        **wish: object,
    ) -> Outcome:
        """Trains until the end, the `stop_at`-th poll for a signal, or for so many steps."""
        console = Console(file=io.StringIO(), width=200)
        stops = StopsAt(stop_at)
        train_step = engine.train_step

        def counted(*arguments: object) -> torch.Tensor:
            self.steps += 1
            stops.stop = self.steps == steps
            return train_step(*arguments)  # pyright: ignore[reportArgumentType]

        self.steps = 0
        self._patch.setattr(engine, "train_step", counted)
        run = RunDirectory(out)
        try:
            with Guard(run, safeguards, starts_over=False, say=console.print) as guard:
                return engine.train(
                    Wish(recipe or self.recipe, **wish),  # pyright: ignore[reportArgumentType]
                    self.data,
                    run,
                    device=Device.choose("fp32", compile=False),
                    ranks=Ranks(),
                    workers=2,
                    preemption=stops,
                    console=console,
                    guard=guard,
                )
        finally:
            self._patch.setattr(engine, "train_step", train_step)
            self.polls = stops.polls
            self.said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def trainer(
    digits: PackedDataset, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    """Trains the tiny recipe on the tiny digits, without the child process that draws."""
    monkeypatch.setattr("pitstop.engine.journal.Plotter", NoPlotter)
    return Trainer(digits, tiny(), monkeypatch)


class NoPlotter:
    def __init__(self, run: RunDirectory) -> None: ...

    def update(self) -> None: ...

    def finish(self) -> None: ...
