"""What a run is asked to watch over besides its training."""

from dataclasses import dataclass
from pathlib import Path

from pitstop.core.errors import InputError


@dataclass(frozen=True)
class Safeguards:
    """Of money, durability and preemption; None is for not at all.

    Raises:
        InputError: one of them wants another.
    """

    remote: str | None = None
    """The URL of a bucket, or a directory, for a copy of the run."""
    max_durable_age: float | None = None
    """Minutes: a run ends when its last durable checkpoint in the bucket is older."""
    price: float | None = None
    """Dollars an hour, of all machines."""
    max_cost: float | None = None
    """Dollars, of all starts of the run."""
    max_fruitless_starts: int | None = 5
    """So many starts in a row that save nothing are enough."""
    preemption_file: Path | None = None
    """Its appearance asks for a stop."""
    preemption_command: str | None = None
    """Its exit code 0 does."""

    def __post_init__(self) -> None:
        if self.max_cost is not None and self.price is None:
            raise InputError("--max-cost: give --price too, in dollars an hour")
        if self.max_durable_age is not None and self.remote is None:
            raise InputError("--max-durable-age: is of the checkpoints in a bucket: give --remote")
