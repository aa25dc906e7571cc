"""Detectron2's hooks for checkpoints, and those for a scheduler's warning and training in sight."""

import json
import logging
import math
import os
import re
import signal
import sys
import threading
from types import FrameType
from typing import Any

import matplotlib
import numpy as np
from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..data import read_image
from ..utils.errors import UserError
from ..utils.visualizer import draw_objects
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


class DrawPredictions(HookBase):
    """
    After each evaluation, pictures of a few images of a dataset for TensorBoard: the ground truth
    on the left, what the model found on the right.

    It goes after the hook that evaluates, on the main process.
    """

    _NUM_IMAGES = 4
    _THRESHOLD = 0.5  # of the score

    def __init__(self, period: int, dataset_name: str, results_json: str):
        """
        Args:
            period: of the evaluation (``TEST.EVAL_PERIOD``).
            dataset_name: a registered dataset.
            results_json: the results of the last evaluation on it, by :class:`COCOEvaluator`.
        """
        self._period, self._dataset_name, self._results_json = period, dataset_name, results_json

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if (
            self._period > 0
            and next_iter % self._period == 0
            and next_iter != self.trainer.max_iter
        ):
            self._draw()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._draw()

    def _draw(self) -> None:
        if not os.path.isfile(self._results_json):  # of another evaluator
            return
        dataset = DatasetCatalog.get(self._dataset_name)
        metadata = MetadataCatalog.get(self._dataset_name)
        records = dataset[:: math.ceil(len(dataset) / self._NUM_IMAGES)]
        with open(self._results_json) as f:
            results = [result for result in json.load(f) if result["score"] >= self._THRESHOLD]
        classes = metadata.thing_classes
        ids = metadata.get("thing_dataset_id_to_contiguous_id") or range(len(classes))
        colors = matplotlib.color_sequences["tab10"]
        for record in records:
            image = read_image(record["file_name"], "RGB")
            pictures = []
            for objects, contiguous in (
                (record.get("annotations", []), range(len(classes))),
                ([r for r in results if r["image_id"] == record["image_id"]], ids),
            ):
                found = [contiguous[o["category_id"]] for o in objects]
                labels = [
                    f"{classes[i]} {o['score']:.0%}" if "score" in o else classes[i]
                    for i, o in zip(found, objects)
                ]
                of_class = [colors[i % len(colors)] for i in found]
                pictures.append(draw_objects(image, objects, labels, of_class))
            name = f"{self._dataset_name}/{os.path.basename(record['file_name'])}"
            picture = np.concatenate(pictures, axis=1).transpose(2, 0, 1)
            self.trainer.storage.put_image(name, picture)


class WandbRun(HookBase):
    """
    A run of Weights & Biases with all that is written for TensorBoard, by its own integration. A
    training that is resumed goes on with the same one.

    It goes after the hook that writes, on the main process.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: of the run, with a ``WANDB.PROJECT``.
        """
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
