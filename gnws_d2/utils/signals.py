"""SIGTERM and SIGINT as a flag of the process, which is read between steps and between images."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from detectron2.utils import comm

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received = 0


class Stopped(BaseException):
    """Raised in all processes by :func:`stop_together`, with the number of the signal."""


def _remember(signum: int, frame: FrameType | None) -> None:
    global _received
    _received = signum


@contextlib.contextmanager
def catch_signals(handler: Callable[[int, FrameType | None], None] = _remember) -> Iterator[None]:
    """
    Handle both signals in the context: by default, remember the last one until the context ends
    (:func:`received_signal`). Do nothing outside the main thread, which receives all signals.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signum: signal.signal(signum, handler) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, before in handlers.items():
            signal.signal(signum, before)
        _received = 0  # an evaluation after it in the same process goes on


def received_signal() -> int:
    """Return the number of the last signal in the current :func:`catch_signals`; 0 for none."""
    return _received


def stop_together() -> None:
    """Raise :class:`Stopped` in all processes if any of them has received a signal."""
    signals = comm.all_gather(_received)
    if any(signals):
        raise Stopped(max(signals))
