"""Hooks for checkpoints, signals, validation loss, and Weights & Biases."""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..data import OpenCVDatasetMapper
from ..utils.errors import UserError
from .train_loop import FiniteTrainer


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """
    Detectron2's hook whose ``max_to_keep`` also counts the checkpoints from before a resume, but
    none of another run that used the same directory.
    """

    def after_step(self) -> None:
        super().after_step()
        # Detectron2 removes one at a time; after a resume there may be more.
        while self.max_to_keep and len(self.recent_checkpoints) > self.max_to_keep:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.recent_checkpoints.pop(0))

    def state_dict(self) -> dict[str, Any]:
        names = [os.path.basename(path) for path in self.recent_checkpoints]
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        if (iteration + 1) % self.period == 0:  # it may be the one that is being written
            names.append(f"{self.file_prefix}_{iteration:07d}.pth")
        return {"recent_checkpoints": list(dict.fromkeys(names))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = [*state_dict["recent_checkpoints"]]
        last = os.path.basename(self.checkpointer.get_checkpoint_file())
        # The one of a signal counts, too, but not model_final, or a damaged one after this one.
        if last <= f"{self.file_prefix}_{self.trainer.iter:07d}.pth":
            names.append(last)
        paths = [os.path.join(self.checkpointer.save_dir, name) for name in dict.fromkeys(names)]
        self.recent_checkpoints = list(filter(os.path.isfile, paths))


class EarlyStop(BaseException):
    """Raised in all processes when AP has not got better for ``SOLVER.PATIENCE`` evaluations."""


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook that remembers the best metric when a run is resumed, and stops early."""

    best_metric: float | None

    def __init__(self, *args: Any, patience: int = 0):
        """
        Args:
            args: see :class:`detectron2.engine.hooks.BestCheckpointer`.
            patience: ``SOLVER.PATIENCE``.
        """
        super().__init__(*args)
        self._patience, self._num_worse = patience, 0

    def after_step(self) -> None:
        super().after_step()
        next_iter = self.trainer.iter + 1
        if not self._patience or next_iter % self._period or next_iter == self.trainer.max_iter:
            return
        # Only the main process knows AP.
        if any(comm.all_gather(self._num_worse >= self._patience)):
            self._checkpointer.save("model_final", iteration=self.trainer.iter)
            self._logger.info(
                f"{self._val_metric} has not got better in {self._patience} evaluations: training "
                f"ends after iteration {self.trainer.iter} (SOLVER.PATIENCE)."
            )
            raise EarlyStop

    def _best_checking(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, None))
        self._num_worse += comm.is_main_process()
        if not value > (-math.inf if self.best_metric is None else self.best_metric):
            return
        # After the last iteration Detectron2 counts one more.
        self._num_worse = 0
        self.best_metric, self.best_iter = value, min(iteration, self.trainer.max_iter - 1)
        self._checkpointer.save(self._file_prefix, iteration=self.best_iter)
        self._logger.info(f"{self._val_metric} {value:.3f} is the best so far.")

    def state_dict(self) -> dict[str, Any]:
        best = {"best_metric": self.best_metric, "best_iter": self.best_iter}
        return {**best, "num_worse": self._num_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]
        self._num_worse = state_dict.get("num_worse", 0) * comm.is_main_process()


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
        self._previous: list[Any] = []  # stays empty if a hook before this one fails

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


def validation_loss(cfg: CfgNode, model: nn.Module) -> dict[str, dict[str, float]]:
    """
    Return ``{"validation": losses}``, the mean over the images of ``DATASETS.TEST`` of each loss
    and of their sum, ``total_loss``. All processes call it, and share the images.

    Args:
        model: in training mode, without DistributedDataParallel.
    """
    mapper = OpenCVDatasetMapper(cfg, True)
    mapper.augmentations = OpenCVDatasetMapper(cfg, False).augmentations
    records = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
    loader = build_detection_test_loader(
        records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    losses: list[dict[str, float]] = []
    with torch.no_grad(), EventStorage(1):  # not in that of the training
        for batch in loader:
            torch.manual_seed(0)  # of the proposals that are sampled
            losses.append({name: loss.item() for name, loss in model(batch).items()})
    losses = [loss for part in comm.all_gather(losses) for loss in part]
    mean = {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
    return {"validation": {"total_loss": sum(mean.values()), **mean}}


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

        error = sys.exc_info()[1]
        wandb.finish(exit_code=int(error is not None and not isinstance(error, EarlyStop)))

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._id = state_dict["id"]
