"""Detectron2's default trainer and command line, with what GN+WS models need of them."""

import argparse
import contextlib
import errno
import importlib.metadata
import logging
import os
import weakref
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.engine import default_setup as _default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.config import BASE_KEY

from .. import model_zoo
from ..checkpoint import GNWSCheckpointer
from ..config import add_gnws_config
from ..data import OpenCVDatasetMapper, register_coco_datasets
from ..data.train_loader import TrainLoader, build_train_loader, derive_seed
from ..evaluation import COCOEvaluator
from ..utils.errors import UserError
from .benchmark import describe_machine
from .hooks import (
    BestCheckpointer,
    DrawPredictions,
    PeriodicCheckpointer,
    StopOnSignal,
    WandbRun,
)
from .train_loop import FiniteAMPTrainer, FiniteTrainer

# No config has more bytes, files in its chain of _BASE_, or aliases (*name): Detectron2 writes two,
# and many can stand for more than the memory holds.
_MAX_CONFIG_BYTES, _MAX_CONFIG_FILES, _MAX_CONFIG_ALIASES = 2**18, 100, 10


def get_config(args: argparse.Namespace) -> CfgNode:
    """
    Register the datasets and read the config that the command line names.

    Args:
        args: of ``train_net.py``.

    Returns:
        A frozen config.

    Raises:
        UserError: for a config file, key or value that Detectron2 does not take.
    """
    if not args.config_file:
        raise UserError("No config file: give one with --config-file, as configs/quick_start.yaml.")
    args.config_file = _find_config_file(args.config_file)  # Detectron2 logs its content
    register_coco_datasets(args.dataset)
    return load_config(args.config_file, args.opts)


def load_config(config_file: str, opts: list[str]) -> CfgNode:
    """
    Read a config without running code that it may ask for.

    Args:
        config_file: path of a YAML file, or the name of a config of :mod:`gnws_d2.model_zoo`.
        opts: KEY VALUE pairs that override it.

    Returns:
        A frozen config.

    Raises:
        UserError: for a config file, key or value that Detectron2 does not take; or for precomputed
            proposals, which Detectron2 reads as pickles.
    """
    config_file = _find_config_file(config_file)
    cfg = get_cfg()
    add_gnws_config(cfg)
    try:
        _check_config_file(config_file, [])
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except UserError:
        raise
    except Exception as e:  # Detectron2, yacs and YAML can fail in any way
        raise UserError(f"--config-file {config_file}: {_one_line(e)}") from e
    try:
        cfg.merge_from_list(opts)
    except Exception as e:
        raise UserError(
            f"Command line: {_one_line(e)} Options like --resume go before KEY VALUE pairs."
        ) from e
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            "MODEL.LOAD_PROPOSALS is set: files of proposals are pickles, which can run code when "
            "loaded. Set it to False."
        )
    cfg.freeze()
    return cfg


def _find_config_file(path_or_name: str) -> str:
    if not os.path.exists(path_or_name):
        with contextlib.suppress(RuntimeError):
            return model_zoo.get_config_file(path_or_name)
    return path_or_name


def _check_config_file(path: str, files: list[str]) -> None:
    """Detectron2 would fetch a `_BASE_`, follow it without end, or fail without naming it."""
    files.append(path)
    if len(files) > _MAX_CONFIG_FILES:
        raise UserError(
            f"--config-file {files[0]}: its _BASE_ leads to more than {_MAX_CONFIG_FILES} files, "
            f"the last of them {path}: does one lead back to itself?"
        )
    with open(path, "rb") as f:
        text = f.read(_MAX_CONFIG_BYTES + 1)
    if len(text) > _MAX_CONFIG_BYTES:
        raise UserError(f"The config file {path} is larger than {_MAX_CONFIG_BYTES} bytes.")
    try:
        events = yaml.parse(text) if b"*" in text else ()
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in events)
        if aliases > _MAX_CONFIG_ALIASES:
            raise UserError(
                f"The config file {path} has {aliases} aliases (*name), more than "
                f"{_MAX_CONFIG_ALIASES}: write them out."
            )
        content = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"The config file {path} is not valid: {_one_line(e)}") from e
    if not isinstance(content, dict):
        raise UserError(f"The config file {path} does not consist of KEY: VALUE lines.")
    bases = content.get(BASE_KEY, [])
    for base in bases if isinstance(bases, list) else [bases]:
        # As Detectron2 finds it.
        base_path = os.path.join(os.path.dirname(path), os.path.expanduser(str(base)))
        if not isinstance(base, str) or "://" in base or not os.path.isfile(base_path):
            raise UserError(
                f"The config file {path} has the _BASE_ {base}, which is no local file."
            )
        _check_config_file(base_path, files)


def _one_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = getattr(error, "strerror", None) or text or type(error).__name__
    return " ".join(text.split())[:500]


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Detectron2's :func:`default_setup`, with a log of this project, that tells of the version, the
    processor and the date too.

    Args:
        cfg: of :func:`get_config`.
        args: of ``train_net.py``.
    """
    _default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gnws_d2")
    version = importlib.metadata.version("gnws_d2")
    cpu = describe_machine(torch.device("cpu"))["cpu"]
    logger.info(f"gnws_d2 {version} on {cpu}, started {datetime.now():%Y-%m-%d %H:%M}")


def results_json(output_dir: str, cfg: CfgNode, dataset_name: str) -> str:
    """
    Args:
        output_dir: ``OUTPUT_DIR`` of a run.
        cfg: of the run.
        dataset_name: of ``DATASETS.TEST``.

    Returns:
        The file of the predictions on the dataset, in COCO's results format.
    """
    # Detectron2 would overwrite the results of one of several datasets by the next one's.
    name = dataset_name if len(cfg.DATASETS.TEST) > 1 else ""
    return os.path.join(output_dir, "inference", name, "coco_instances_results.json")


class Trainer(DefaultTrainer):
    """
    :class:`DefaultTrainer` with OpenCV's images and COCO's evaluation, that also trains with
    several processes on CPUs.
    """

    iter: int

    def __init__(self, cfg: CfgNode):
        # The same objects in the same order as in DefaultTrainer, which always wraps the model for
        # a GPU when there are several processes.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        ddp_args: dict[str, Any] = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_args)
        self.checkpointer = GNWSCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self._trainer = (FiniteAMPTrainer if cfg.SOLVER.AMP.ENABLED else FiniteTrainer)(
            model,
            data_loader,
            optimizer,
            skip=cfg.SOLVER.ON_NON_FINITE == "skip",
            last_checkpoint=self.checkpointer.get_checkpoint_file,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """
        Detectron2's, with the checkpoints of ``SOLVER.CHECKPOINT_KEEP`` and the best one, pictures
        of each evaluation, and Weights & Biases (``WANDB.PROJECT``).
        """
        cfg = self.cfg
        ret: list[HookBase] = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook = PeriodicCheckpointer(
                    self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP
                )
            if isinstance(hook, hooks.EvalHook):
                ret.append(StopOnSignal(self.checkpointer))
            ret.append(hook)
            if isinstance(hook, hooks.EvalHook) and cfg.TEST.EVAL_PERIOD and cfg.DATASETS.TEST:
                metric = "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"
                if len(cfg.DATASETS.TEST) > 1:
                    metric = f"{cfg.DATASETS.TEST[0]}/{metric}"
                ret.append(BestCheckpointer(cfg.TEST.EVAL_PERIOD, self.checkpointer, metric))
            if isinstance(hook, hooks.EvalHook) and comm.is_main_process():
                for name in cfg.DATASETS.TEST:
                    path = results_json(cfg.OUTPUT_DIR, cfg, name)
                    ret.append(DrawPredictions(cfg.TEST.EVAL_PERIOD, name, path))
        if cfg.WANDB.PROJECT and comm.is_main_process():
            ret.append(WandbRun(cfg))
        return ret

    def state_dict(self) -> dict[str, Any]:
        # After the last one Detectron2 counts one more, while the best checkpoint may be written.
        iteration = min(self.iter, self.max_iter - 1)
        data_loader = self.data_loader.state_dict(iteration + 1)
        return {**super().state_dict(), "iteration": iteration, "data_loader": data_loader}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Go on with the images, the augmentation and the proposals that would have come next. If the
        run had another number of processes or batch size, iterations are counted in batches of now,
        and the learning rate is that of now, as at the start of a run (``SOLVER.BASE_LR``).
        """
        base_lrs = list(self.scheduler.base_lrs)
        super().load_state_dict(state_dict)
        if "data_loader" not in state_dict:  # of stock Detectron2
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
        """
        Raises:
            UserError: if the disk is full; see :class:`FiniteTrainer`, :class:`TrainLoader`, too.
        """
        try:
            return super().train()
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            last = self.checkpointer.get_checkpoint_file()
            raise UserError(
                f"The disk of {self.cfg.OUTPUT_DIR} is full: free some space"
                + (f", and --resume goes on from {last}." if last else ".")
            ) from e

    def run_step(self) -> None:
        # Of the proposals that are sampled, so that they do not depend on where a run started.
        torch.manual_seed(derive_seed(self.data_loader.seed, comm.get_rank(), self.iter))
        super().run_step()
        if self.cfg.INPUT.ON_BAD_IMAGE == "skip":
            bad_images = sum(comm.all_gather(self.data_loader.num_bad_images))
            self.storage.put_scalar("bad_images", bad_images, smoothing_hint=False)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg, OpenCVDatasetMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        return build_detection_test_loader(
            cfg, dataset_name, mapper=OpenCVDatasetMapper(cfg, False)
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(
            dataset_name,
            ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",),
            os.path.dirname(results_json(cfg.OUTPUT_DIR, cfg, dataset_name)),
        )
