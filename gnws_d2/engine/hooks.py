"""Detectron2's hooks for checkpoints, and one for a scheduler's warning."""

import logging
import math
import os
import re
import signal
import sys
import threading
from types import FrameType
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from .launch import TERMINATED


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """
    Detectron2's, which keeps the newest checkpoints of a run, those from before it was resumed
    included (fvcore's ``max_to_keep`` forgets these).
    """

    def __init__(self, checkpointer: Checkpointer, period: int, keep: int):
        """
        Args:
            checkpointer, period: see Detectron2.
            keep: how many (``SOLVER.CHECKPOINT_KEEP``); 0 for all.
        """
        super().__init__(checkpointer, period)
        self._keep = keep

    def after_step(self) -> None:
        super().after_step()
        if self._keep and (self.trainer.iter + 1) % self.period == 0:
            ours = re.compile(rf"{self.file_prefix}_(\d{{7}})\.pth")
            iterations = {
                int(match[1]): path
                for path in self.checkpointer.get_all_checkpoint_files()
                if (match := ours.fullmatch(os.path.basename(path)))
            }
            for iteration in sorted(i for i in iterations if i <= self.trainer.iter)[: -self._keep]:
                os.remove(iterations[iteration])


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, which remembers the best metric when a run is resumed."""

    best_metric: float | None

    def _best_checking(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, None))
        if not value > (-math.inf if self.best_metric is None else self.best_metric):
            return
        # After the last iteration Detectron2 counts one more.
        self.best_metric, self.best_iter = value, min(iteration, self.trainer.max_iter - 1)
        self._checkpointer.save(self._file_prefix, iteration=self.best_iter)
        self._logger.info(f"{self._val_metric} {value:.3f} is the best so far.")

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]


class StopOnSignal(HookBase):
    """
    On SIGTERM, which schedulers send before they end a job, to any process of a run: write a
    checkpoint at the end of the iteration, and exit with status 143 in all of them. During an
    evaluation, at once.

    It goes before the hook that evaluates.
    """

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer
        self._requested = False
        self._in_step = True

    def before_train(self) -> None:
        # Signals are for the main thread of a process.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    def after_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def before_step(self) -> None:
        self._in_step = True

    def after_step(self) -> None:
        if any(comm.all_gather(self._requested)):
            self._stop()
        self._in_step = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._requested = True
        if not self._in_step:
            self._stop()

    def _stop(self) -> None:
        name = f"model_{self.trainer.iter:07d}"
        if not self._checkpointer.get_checkpoint_file().endswith(f"{name}.pth"):
            self._checkpointer.save(name, iteration=self.trainer.iter)
        logging.getLogger(__name__).warning(
            f"Stopped by SIGTERM after iteration {self.trainer.iter}, with a checkpoint of it: "
            "--resume goes on."
        )
        sys.exit(TERMINATED)
