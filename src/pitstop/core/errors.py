"""Errors that end a command with one line."""


class InputError(ValueError):
    """The user's input is wrong.

    The message names the file or key and the fix. The command line prints it and exits with 2.
    """


class RankFailedError(RuntimeError):
    """Another rank has failed, and this one ends for it.

    The message names the rank, its machine and the cause; one of the ranks has it `shown`.
    """

    def __init__(self, message: str, exit_code: int, *, shown: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.shown = shown
