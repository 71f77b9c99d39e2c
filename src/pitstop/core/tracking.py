"""Where a run's figures are sent besides its own records."""

from collections.abc import Iterable
from dataclasses import dataclass

from pitstop.core.errors import InputError

TRACKERS = ("wandb", "tensorboard", "mlflow")


@dataclass(frozen=True)
class Tracking:
    """The trackers that are told of a run.

    Raises:
        InputError: there is no such tracker, or none is to be told.
    """

    trackers: tuple[str, ...] = ()
    project: str | None = None
    """wandb's project, mlflow's experiment; None is `pitstop`."""
    name: str | None = None
    """The run's name there; None is that of its directory."""

    def __post_init__(self) -> None:
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise InputError(f"--track {tracker}: is none of {', '.join(TRACKERS)}")
        for option, value in (("--track-project", self.project), ("--track-name", self.name)):
            if value is not None and not self.trackers:
                raise InputError(f"{option}: is for trackers: give --track too")
            if value is not None and not value.strip():
                raise InputError(f"{option}: is empty: give a name, or leave it out")


def parse_trackers(stated: Iterable[str]) -> tuple[str, ...]:
    """Returns the names in `--track` options, of which each may hold several, with commas."""
    names = (name.strip() for option in stated for name in option.split(","))
    return tuple(dict.fromkeys(names))
