"""Hooks for checkpoints, signals, and Weights & Biases."""

import glob
import logging
import math
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..utils.errors import UserError
from .train_loop import FiniteTrainer


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's hook whose ``max_to_keep`` counts the checkpoints from before a resume, too."""

    def before_train(self) -> None:
        super().before_train()
        pattern = os.path.join(glob.escape(self.checkpointer.save_dir), f"model_{'[0-9]' * 7}.pth")
        self.recent_checkpoints = sorted(glob.glob(pattern))


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook that remembers the best metric when a run is resumed."""

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
    Stop a run on SIGTERM, which schedulers send before they end a job, and on Ctrl-C: write a
    checkpoint at the end of the iteration and exit with status 143 or 130 in all processes. During
    an evaluation, write it at once.

    Goes before the hook that evaluates.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, checkpointer: Checkpointer, loop: FiniteTrainer):
        self._checkpointer, self._loop = checkpointer, loop
        self._in_step = True
        self._stopping = False

    def before_train(self) -> None:
        # Signals are for the main thread of a process.
        if threading.current_thread() is threading.main_thread():
            self._previous = [signal.signal(s, self._handle) for s in self._SIGNALS]

    def after_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in zip(self._SIGNALS, self._previous):
                signal.signal(signum, handler)

    def before_step(self) -> None:
        self._in_step = True

    def after_step(self) -> None:
        if self._loop.stop_signal:
            self._stop(self._loop.stop_signal, synchronize=True)
        self._in_step = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._loop.received_signal = signum
        if not self._in_step and not self._stopping:
            self._stop(signum)

    def _stop(self, signum: int, synchronize: bool = False) -> None:
        self._stopping = True
        name = f"model_{self.trainer.iter:07d}"
        if not self._checkpointer.get_checkpoint_file().endswith(f"{name}.pth"):
            self._checkpointer.save(name, iteration=self.trainer.iter)
        logging.getLogger(__name__).warning(
            f"Stopped by {signal.Signals(signum).name} after iteration {self.trainer.iter}, with a "
            "checkpoint: --resume continues."
        )
        if synchronize:  # no process ends before the checkpoint is written
            comm.synchronize()
        sys.exit(128 + signum)


class WandbRun(HookBase):
    """
    Log a run to Weights & Biases by its own TensorBoard integration. A resumed training continues
    the same run.

    Goes after the hook that writes, on the main process.
    """

    def __init__(self, cfg: CfgNode):
        self._cfg = cfg
        self._id: str | None = None

    def before_train(self) -> None:
        import wandb

        try:
            run = wandb.init(
                project=self._cfg.WANDB.PROJECT,
                name=os.path.basename(os.path.abspath(self._cfg.OUTPUT_DIR)),
                dir=self._cfg.OUTPUT_DIR,
                config=self._cfg,
                id=self._id,
                resume="allow",
                sync_tensorboard=True,
            )
        except wandb.Error as e:
            raise UserError(f"WANDB.PROJECT {self._cfg.WANDB.PROJECT}: {e}") from e
        self._id = run.id

    def after_train(self) -> None:
        import wandb

        wandb.finish(exit_code=int(self.trainer.iter + 1 < self.trainer.max_iter))

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._id = state_dict["id"]
