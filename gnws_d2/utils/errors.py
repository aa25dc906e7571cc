"""A user's mistake, and how the command line tells of it."""

import functools
import logging
import os
import sys
from collections.abc import Callable

from torch.multiprocessing import ProcessExitedException


class UserError(Exception):
    """
    A mistake in what the user gave: a file, a config key, an argument. The message is one sentence
    that says what is wrong, where, and what to do; :func:`exit_on_user_error` prints it alone.
    """

    def __init__(self, message: str):
        # torch.utils.data re-raises a loader worker's error with its traceback before the message.
        message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(" ".join(message.splitlines()))  # names in a file may have any characters


def exit_on_user_error(main: Callable) -> Callable:
    """
    Decorate the main function of a script, in the launching process and in the launched ones, so
    that a :class:`UserError` ends it with one line on stderr and exit status 2.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
        try:
            return main(*args, **kwargs)
        except UserError as e:
            print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr, flush=True)
            sys.exit(2)
        except ProcessExitedException as e:  # the launched process has already said why
            sys.exit(e.exit_code)

    return wrapper


def _without_traceback(record: logging.LogRecord) -> bool:
    # Detectron2's training loop logs every exception with its traceback.
    if record.exc_info and isinstance(record.exc_info[1], UserError):
        record.msg, record.exc_info = str(record.exc_info[1]), None
    return True
