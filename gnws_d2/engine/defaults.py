"""Detectron2's default trainer for GN+WS models."""

import contextlib
import copy
import logging
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import GNWSCheckpointer
from ..checkpoint.files import THRESHOLD_FILE
from ..config import flatten_config
from ..data import OpenCVDatasetMapper
from ..data.coco import dataset_classes
from ..data.train_loader import TrainLoader, build_train_loader, derive_seed
from ..data.workers import StoppableLoader
from ..evaluation import build_evaluator
from ..layers import fold_for_inference
from ..modeling import checkpoint_activations
from ..prediction.test_time_augmentation import with_tta
from ..utils.errors import UserError
from ..utils.signals import catch_signals
from .hooks import (
    BestCheckpointer,
    EarlyStop,
    EvalHook,
    InterruptedEvaluation,
    PeriodicCheckpointer,
    StopOnSignal,
    WandbRun,
    validation_loss,
)
from .run_record import RunRecord
from .train_loop import FiniteTrainer


class Trainer(DefaultTrainer):
    """
    :class:`DefaultTrainer` with OpenCV's image pipeline and COCO evaluation, that also trains on
    CPUs, and resumes exactly where it stopped.
    """

    iter: int

    def __init__(self, cfg: CfgNode):
        # As in DefaultTrainer, which wraps the model for a GPU if there are several processes.
        TrainerBase.__init__(self)
        config = cfg.dump()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING:
            checkpoint_activations(model.backbone)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self.averaged: AveragedModel | None = None
        if decay := cfg.SOLVER.EMA_DECAY:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        ddp_args: dict[str, Any] = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_args)
        self.checkpointer = GNWSCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            classes=dataset_classes(cfg.DATASETS.TRAIN[0]),
            config=config,
            averaged=self.averaged,
            trainer=weakref.proxy(self),
        )
        self._trainer = FiniteTrainer(
            model,
            data_loader,
            optimizer,
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "",
            skip=cfg.SOLVER.ON_NON_FINITE == "skip",
            last_checkpoint=self.checkpointer.get_checkpoint_file,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Add to Detectron2's hooks, and replace some of them by those of this project."""
        cfg = self.cfg
        ret: list[HookBase] = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.PeriodicCheckpointer):
                period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP or None
                hook = PeriodicCheckpointer(self.checkpointer, period, max_to_keep=keep)
            if not isinstance(hook, hooks.EvalHook):
                ret.append(hook)
                continue
            share = cfg.TEST.MAX_TIME_SHARE
            evaluation = EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate, max_share=share)
            best = None
            ret += [StopOnSignal(), evaluation]
            if cfg.TEST.EVAL_PERIOD and cfg.DATASETS.TEST:
                metric = "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"
                if len(cfg.DATASETS.TEST) > 1:
                    metric = f"{cfg.DATASETS.TEST[0]}/{metric}"
                patience = cfg.SOLVER.PATIENCE
                best = BestCheckpointer(evaluation, self.checkpointer, metric, patience=patience)
                ret.append(best)
        if comm.is_main_process():
            if cfg.WANDB.PROJECT:
                ret.append(WandbRun(cfg))
            ret.append(RunRecord(cfg.OUTPUT_DIR, evaluation, best))
        return [*ret, InterruptedEvaluation(evaluation, best)]

    def _evaluate(self) -> dict[str, Any]:
        model: Any = self.averaged or self.model
        model = getattr(model, "module", model)  # of DistributedDataParallel or AveragedModel
        self._last_eval_results = self.test(self.cfg, model)
        if not self.cfg.TEST.VALIDATION_LOSS:
            return self._last_eval_results
        return {**self._last_eval_results, **validation_loss(self.cfg, model)}

    def resume_or_load(self, resume: bool = True) -> None:
        """See :class:`DefaultTrainer`. A new training ignores the files of an earlier one."""
        checkpoint = self.checkpointer.get_checkpoint_file() if resume else ""
        super().resume_or_load(resume=resume)
        self._check_ranks_agree(os.path.basename(checkpoint) or "no checkpoint")
        if not resume and comm.is_main_process():
            # Else a restart before the first checkpoint would resume from another training.
            for name in ("last_checkpoint", THRESHOLD_FILE):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.cfg.OUTPUT_DIR, name))

    def _check_ranks_agree(self, checkpoint: str) -> None:
        start = {"the start": f"{checkpoint} at iteration {self.start_iter}"}
        first, *others = comm.all_gather(start | flatten_config(self.cfg))
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if value != other.get(name):
                    raise UserError(
                        f"Ranks 0 and {rank} differ in {name} ({value} and {other.get(name)}): "
                        "start all with the same config and an OUTPUT_DIR that all machines share."
                    )

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 has counted on when the best checkpoint is written after the last iteration.
        iteration = min(self.iter, self.max_iter - 1)
        return {
            **super().state_dict(),
            "_trainer": self._trainer.state_dict(),  # Detectron2 v0.6 leaves it out
            "iteration": iteration,
            "data_loader": self.data_loader.state_dict(iteration + 1),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Continue with the images, the augmentation and the proposals that would have come next. If
        the number of processes or the batch size has changed, iterations are counted in batches of
        the new size, and the learning rate follows the new config (``SOLVER.BASE_LR``).
        """
        base_lrs = list(self.scheduler.base_lrs)
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        if "data_loader" not in state_dict:  # a checkpoint of stock Detectron2
            return
        start_iter = self.data_loader.load_state_dict(state_dict["data_loader"])
        if start_iter != self.iter + 1:
            logging.getLogger(__name__).info(
                f"The {self.iter + 1} iterations so far, with another batch size, are "
                f"{start_iter} of {self.max_iter} with SOLVER.IMS_PER_BATCH "
                f"{self.cfg.SOLVER.IMS_PER_BATCH}."
            )
        self.iter = start_iter - 1
        self.scheduler.base_lrs, self.scheduler.last_epoch = base_lrs, start_iter
        for group, base_lr, lr in zip(
            self.optimizer.param_groups, base_lrs, self.scheduler.get_lr()
        ):
            group["initial_lr"], group["lr"] = base_lr, lr

    def train(self) -> dict[str, Any] | None:
        """See :class:`DefaultTrainer`."""
        try:
            with catch_signals():
                return super().train()
        except EarlyStop:
            return self._last_eval_results

    def run_step(self) -> None:
        # So that the sampled proposals do not depend on where a run started.
        torch.manual_seed(derive_seed(self.data_loader.seed, comm.get_rank(), self.iter))
        super().run_step()
        if self.averaged is not None:
            model: Any = self.model
            self.averaged.update_parameters(getattr(model, "module", model))

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """
        See :class:`DefaultTrainer`. Evaluates a copy of `model` with folded weights, with
        ``TEST.AUG.ENABLED`` by :class:`GeneralizedRCNNWithTTA`.
        """
        model = getattr(model, "module", model)  # of DistributedDataParallel
        model = fold_for_inference(copy.deepcopy(model))
        if cfg.TEST.AUG.ENABLED:
            model = with_tta(cfg, model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg, OpenCVDatasetMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        mapper = OpenCVDatasetMapper(cfg, False)
        if cfg.TEST.AUG.ENABLED:  # which resizes itself
            mapper.augmentations = T.AugmentationList([])
        return StoppableLoader(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)
