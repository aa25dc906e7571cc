"""Hooks for checkpoints, signals, validation loss, and Weights & Biases."""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..data import OpenCVDatasetMapper
from ..data.workers import StoppableLoader
from ..utils.signals import Stopped, stop_together


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's hook, whose ``max_to_keep`` also counts those from before a resume."""

    def after_step(self) -> None:
        super().after_step()
        # Detectron2 removes one at a time; after a resume there may be more.
        while self.max_to_keep and len(self.recent_checkpoints) > self.max_to_keep:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.recent_checkpoints.pop(0))

    def state_dict(self) -> dict[str, Any]:
        return {"recent_checkpoints": list(map(os.path.basename, self.recent_checkpoints))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = [*state_dict["recent_checkpoints"]]
        names.append(f"{self.file_prefix}_{self.trainer.iter:07d}.pth")  # this state is from it
        paths = [os.path.join(self.checkpointer.save_dir, name) for name in dict.fromkeys(names)]
        self.recent_checkpoints = list(filter(os.path.isfile, paths))


class EvalHook(hooks.EvalHook):
    """
    Detectron2's hook that stops on a signal between two images. With a `max_share`, the period is
    multiplied after the first evaluation, so that evaluations take that share of the time that the
    iterations take. Checkpoints record whether the evaluation after their iteration was still to be
    done.
    """

    done = 0  # the number of iterations before the last evaluation
    is_due = False  # whether training begins with an evaluation

    def __init__(self, *args: Any, max_share: float = 0):
        super().__init__(*args)
        self._max_share = max_share
        self._cost = 0.0  # the time of an evaluation by that of an iteration, once it is known
        self._start = math.nan

    def before_step(self) -> None:
        if math.isnan(self._start):
            self._start = time.perf_counter()

    def _do_eval(self) -> None:
        start = time.perf_counter()
        try:
            super()._do_eval()
            stop_together()
        except Stopped as e:
            _stop(self.trainer, *e.args)
        self.done = min(self.trainer.iter + 1, self.trainer.max_iter)
        iterations = self.done - self.trainer.start_iter
        if self._max_share and not self._cost and iterations and self.done < self.trainer.max_iter:
            seconds, before = time.perf_counter() - start, self._period
            self._cost = comm.all_gather(seconds * iterations / (start - self._start))[0]
            self._multiply_period()
            if self._period > before:
                logging.getLogger(__name__).info(
                    f"The evaluation took {seconds:.1f} s, as long as {self._cost:.0f} iterations: "
                    f"from now on, one each {self._period} iterations and at the end "
                    f"(TEST.MAX_TIME_SHARE {self._max_share:g})."
                )

    def _multiply_period(self) -> None:
        if self._max_share and self._period > 0:
            self._period *= max(1, math.ceil(self._cost / (self._max_share * self._period)))

    def after_train(self) -> None:
        try:
            super().after_train()
        except SystemExit:  # Detectron2 would leave out the hooks that come after this one
            later = self.trainer._hooks[self.trainer._hooks.index(self) + 1 :]
            for hook in later:
                hook.after_train()
            raise

    def state_dict(self) -> dict[str, Any]:
        next_iter = self.trainer.iter + 1
        period = self._period and next_iter % self._period == 0
        return {"is_due": bool(period and next_iter != self.done), "cost": self._cost}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.is_due, self._cost = state_dict["is_due"], state_dict.get("cost", 0.0)
        self._multiply_period()  # the period and the share may be others than before


class EarlyStop(BaseException):
    """Raised in all processes when AP has not improved for ``SOLVER.PATIENCE`` evaluations."""


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook that remembers the best metric when a run is resumed, and stops early."""

    best_metric: float | None

    def __init__(self, evaluation: EvalHook, *args: Any, patience: int = 0):
        super().__init__(evaluation._period, *args)
        self._evaluation, self._patience, self._num_worse = evaluation, patience, 0

    def after_step(self) -> None:
        if self._evaluation.done == self.trainer.iter + 1 != self.trainer.max_iter:
            self.check()

    def check(self) -> None:
        """Save the best checkpoint if the metric has improved; raise :class:`EarlyStop`."""
        self._best_checking()
        # Only the main process knows AP.
        if self._patience and any(comm.all_gather(self._num_worse >= self._patience)):
            self._checkpointer.save("model_final", iteration=self.trainer.iter)
            self._logger.info(
                f"{self._val_metric} has not improved for {self._patience} evaluations: stopping "
                f"after iteration {self.trainer.iter} (SOLVER.PATIENCE)."
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


class InterruptedEvaluation(HookBase):
    """
    Begin a resumed run with the evaluation during which it was stopped, so that the best AP and
    ``SOLVER.PATIENCE`` are those of an uninterrupted run. This hook comes last.
    """

    def __init__(self, evaluation: EvalHook, best: BestCheckpointer | None):
        self._evaluation, self._best = evaluation, best

    def before_train(self) -> None:
        trainer = self.trainer
        if not self._evaluation.is_due or trainer.start_iter >= trainer.max_iter:
            return
        logging.getLogger(__name__).info("First, the evaluation that was interrupted.")
        trainer.iter = trainer.storage.iter = trainer.start_iter - 1
        self._evaluation._do_eval()
        if self._best is not None:
            self._best.check()
        trainer.iter = trainer.storage.iter = trainer.start_iter


class StopOnSignal(HookBase):
    """
    Stop on SIGTERM, which schedulers send before they end a job, and on Ctrl-C: write a checkpoint
    after the iteration and exit with status 143 or 130. This hook comes before the one that
    evaluates.
    """

    def after_step(self) -> None:
        if stop_signal := self.trainer._trainer.stop_signal:  # of FiniteTrainer
            _stop(self.trainer, stop_signal)


def _stop(trainer: Any, signum: int) -> NoReturn:
    """Write a checkpoint, unless this iteration has one, and exit. All processes call it."""
    name = f"model_{trainer.iter:07d}"
    last = os.path.basename(trainer.checkpointer.get_checkpoint_file())
    if trainer.iter < trainer.max_iter and last != f"{name}.pth":
        trainer.checkpointer.save(name, iteration=trainer.iter)
    logging.getLogger(__name__).warning(
        f"Stopped by {signal.Signals(signum).name} after iteration "
        f"{min(trainer.iter, trainer.max_iter - 1)}, with a checkpoint: --resume continues."
    )
    comm.synchronize()  # no process ends before the checkpoint is written
    sys.exit(128 + signum)


def validation_loss(cfg: CfgNode, model: nn.Module) -> dict[str, dict[str, float]]:
    """
    Return ``{"validation": losses}``: the means over the images of ``DATASETS.TEST`` of each loss
    of a model in training mode, and of their sum, ``total_loss``. All processes call it.
    """
    mapper = OpenCVDatasetMapper(cfg, True)
    mapper.augmentations = OpenCVDatasetMapper(cfg, False).augmentations
    mapper.recompute_boxes = False  # as it is in training for what a crop has cut
    records = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
    workers = cfg.DATALOADER.NUM_WORKERS
    loader = build_detection_test_loader(records, mapper=mapper, num_workers=workers)
    losses: list[dict[str, float]] = []
    with torch.no_grad(), EventStorage(1):  # the storage of the training stays as it is
        for batch in StoppableLoader(loader):
            torch.manual_seed(0)  # the same proposals are sampled each time
            try:
                losses.append({name: loss.item() for name, loss in model(batch).items()})
            except FloatingPointError:  # of an average of the weights: see _nan_if_diverged
                losses.append({"loss of the proposals": math.nan})
    stop_together()
    losses = [loss for part in comm.all_gather(losses) for loss in part]
    names = dict.fromkeys(name for loss in losses for name in loss)  # diverged ones lack some
    mean = {n: sum(loss.get(n, math.nan) for loss in losses) / len(losses) for n in names}
    return {"validation": {"total_loss": sum(mean.values()), **mean}}


class WandbRun(HookBase):
    """
    Log a run to Weights & Biases through its TensorBoard integration. A resumed training continues
    the same run there. For the main process, after the hook that writes metrics.
    """

    def __init__(self, cfg: CfgNode):
        self._cfg = cfg
        self._id: str | None = None

    def before_train(self) -> None:
        import wandb

        run = wandb.init(
            project=self._cfg.WANDB.PROJECT,
            name=os.path.basename(os.path.abspath(self._cfg.OUTPUT_DIR)),
            dir=self._cfg.OUTPUT_DIR,
            config=self._cfg,
            id=self._id,
            resume="allow",
            sync_tensorboard=True,
        )
        self._id = run.id

    def after_train(self) -> None:
        import wandb

        error = sys.exc_info()[1]
        wandb.finish(exit_code=int(error is not None and not isinstance(error, EarlyStop)))

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._id = state_dict["id"]
