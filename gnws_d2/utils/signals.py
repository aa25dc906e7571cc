"""SIGTERM and SIGINT as a flag of the process, which is read between steps and between images."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from detectron2.utils import comm

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received = 0


class Stopped(BaseException):
    """Raised in all processes, by :func:`stop_together`, to leave an evaluation."""


@contextlib.contextmanager
def catch_signals() -> Iterator[None]:
    """Catch both signals until the end of the context. Does nothing outside the main thread."""
    global _received
    _received = 0
    if threading.current_thread() is not threading.main_thread():  # signals are for the main one
        yield
        return
    handlers = {signum: signal.signal(signum, _handle) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _handle(signum: int, frame: FrameType | None) -> None:
    global _received
    _received = signum


def received_signal() -> int:
    """Return the number of the last signal that :func:`catch_signals` has caught; 0 for none."""
    return _received


def stop_together() -> None:
    """Raise :class:`Stopped` in all processes if one of them has received a signal."""
    signals = comm.all_gather(_received)
    if any(signals):
        raise Stopped(max(signals))
