"""The one exception a user may meet."""


class InputError(ValueError):
    """Bad input from the user.

    The message is one line that names the file or key and the fix; the CLI prints it and exits 2.
    """
