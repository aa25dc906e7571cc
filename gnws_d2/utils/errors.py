"""A user's mistake, a run that ends, and how the command line tells of them."""

import functools
import logging
import os
import sys
import time
from collections.abc import Callable

import torch.distributed as dist


class UserError(Exception):
    """
    A mistake in what the user gave: a file, a config key, an argument. The message is one sentence
    that says what is wrong, where, and what to do; :func:`exit_on_user_error` prints it alone.
    """

    exit_status = 2

    def __init__(self, message: str):
        # torch.utils.data re-raises a loader worker's error with its traceback before the message.
        message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(" ".join(message.splitlines()))  # names in a file may have any characters


class RunError(UserError):
    """What ended a run, and is no mistake of the user's: a process or a machine that died."""

    exit_status = 1

    def __init__(self, message: str):
        Exception.__init__(self, message)  # which may be a traceback, of many lines


class PeerError(RunError):
    """The end of a process that lost the connection to another, whose end is the cause."""


def exit_on_user_error(main: Callable) -> Callable:
    """
    Decorate the main function of a script, so that a :class:`UserError` ends it with one line on
    stderr and exit status 2, and a :class:`RunError` with what it says and 1.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        log_without_traceback()
        try:
            return main(*args, **kwargs)
        except UserError as e:
            if dist.is_torchelastic_launched() and int(os.environ["LOCAL_RANK"]) > 0:
                # All processes of a machine find the same mistake. The first one tells of it, and
                # torchrun ends the others.
                time.sleep(3)
            say(f"error: {e}")
            if dist.is_initialized():
                os._exit(e.exit_status)  # to destroy process groups may hang when another is gone
            sys.exit(e.exit_status)

    return wrapper


def say(message: str) -> None:
    """Print a line on stderr, after the name of the script."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)


def log_without_traceback() -> None:
    """Keep the tracebacks of what :func:`exit_on_user_error` tells of out of the training log."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    # Detectron2's training loop logs every exception with its traceback.
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError):
        record.msg, record.exc_info = str(error), None
    return not is_peer_error(error)


def is_peer_error(error: BaseException | None) -> bool:
    """
    Returns:
        Whether a collective failed because another process has ended or does not answer.
    """
    # Of Gloo there is only the text.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def error_of_traceback(text: str, who: str) -> RunError | UserError:
    """
    Args:
        text: the traceback of a launched process, as :mod:`torch.multiprocessing` reports it.
        who: the process.

    Returns:
        The error that `text` ends with, if it is one of the above, else a :class:`RunError` with
        all of `text`.
    """
    name, _, message = text.rstrip().rpartition("\n")[2].partition(": ")
    for error in (PeerError, RunError):
        if name == f"{error.__module__}.{error.__qualname__}":
            return error(message)
    if name.startswith(f"{__package__.partition('.')[0]}."):  # a UserError, or a kind of it
        return UserError(message)
    return RunError(f"The {who} failed:\n{text.rstrip()}")
