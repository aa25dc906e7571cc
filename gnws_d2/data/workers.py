"""Worker processes of data loaders that leave signals to the process that started them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import cv2
from torch.utils.data import DataLoader

from ..utils.process import end_with_parent
from ..utils.signals import received_signal

_HAS_SIGWAITINFO = hasattr(signal, "sigwaitinfo")  # not on macOS and Windows
_SIGNALS = {signal.SIGINT, signal.SIGTERM} if _HAS_SIGWAITINFO else {signal.SIGINT}
_CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # not on Windows


def iterate(loader: DataLoader) -> Iterator[Any]:
    """
    Iterate over `loader` with workers that ignore SIGTERM and SIGINT. Schedulers and terminals send
    these signals to all processes of a job, but the process that started the workers decides when
    to stop, and needs them until then.

    In a process of Detectron2's launcher, workers are forked, as elsewhere on Linux. With the
    launcher's start method each worker would import PyTorch again, in every evaluation.
    """
    loader.worker_init_fn = _init_worker
    launched = multiprocessing.parent_process() is not None
    if launched and loader.num_workers > 0 and sys.platform == "linux":
        loader.multiprocessing_context = "fork"
    method = getattr(loader.multiprocessing_context, "_start_method", None)
    # Workers inherit the mask, so that they ignore signals from the start. Python's resource
    # tracker, which all start methods except fork use, resets the mask when it starts.
    if _CAN_BLOCK and (method or multiprocessing.get_start_method()) != "fork":
        resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS) if _CAN_BLOCK else None
    num_threads = cv2.getNumThreads()
    if loader.num_workers > 0:
        # A forked worker would wait forever for the end of OpenCV's threads, which it lacks.
        cv2.setNumThreads(1)
    try:
        batches = iter(loader)
    finally:
        cv2.setNumThreads(num_threads)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    yield from batches


class StoppableLoader:
    """Iterate over the loader of an evaluation, and end early after a signal."""

    def __init__(self, loader: DataLoader):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in iterate(self._loader):
            if received_signal():
                return
            yield batch


def _init_worker(worker_id: int) -> None:
    end_with_parent()  # PyTorch checks only every five seconds whether the parent is alive
    if _CAN_BLOCK:  # a fork server may have been started without the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if not _HAS_SIGWAITINFO:
        return
    parent = multiprocessing.parent_process()
    parent_pid = parent.pid if parent else os.getppid()

    def wait() -> None:
        # The process that started the workers sends SIGTERM to the remaining ones when it ends.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
