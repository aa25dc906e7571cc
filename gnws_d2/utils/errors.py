"""Errors that end a command with one sentence instead of a traceback."""

import contextlib
import os
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A mistake in the input. The message is a sentence: what is wrong, where, and what to do."""

    exit_status = 2

    def __init__(self, message: str):
        # A loader worker's error arrives with its traceback before the message.
        message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        # Names in a file may hold control characters, which a terminal would obey.
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class RunError(UserError):
    """A failure that is not the user's mistake. The message may have several lines."""

    exit_status = 1

    def __init__(self, message: str):
        Exception.__init__(self, message)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End a script with one line for a :class:`UserError`, or after Ctrl-C (exit status 130)."""
    try:
        yield
    except UserError as e:
        print_error(f"error: {e}")
        sys.exit(e.exit_status)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(130)


def print_error(message: str) -> None:
    """Print a line on stderr, prefixed with the name of the script."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
