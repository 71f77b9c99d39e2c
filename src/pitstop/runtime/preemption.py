"""Preemption: the news that the process must end soon. It only sets a flag."""

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Watches for SIGTERM and SIGINT while it is entered.

    The first signal asks for a stop at the next step; a second SIGINT (Ctrl-C twice) interrupts at
    once. Whoever loops polls `requested`.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a stop has been asked for."""
        return self.reason is not None

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
