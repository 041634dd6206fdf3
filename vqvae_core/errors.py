"""The one family of errors that a user can fix."""


class InputError(ValueError):
    """Something outside the program is not as it must be: an artifact, a source, a folder, a setting.

    The message is one line that says what was expected, what was there and what to do. Command lines print it
    without a traceback and exit with 2.
    """


class StoppedError(RuntimeError):
    """Training was asked to stop, and did so after a checkpoint."""
