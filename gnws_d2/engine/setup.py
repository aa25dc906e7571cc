"""Detectron2's set-up of a process, with what GN+WS models need of it."""

import argparse
import atexit
import logging
import re
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup as _default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import choose_device, find_config_file, load_config
from ..data import register_coco_datasets
from ..modeling.backbone import check_keys
from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.process import end_with_parent, keep_freed_memory
from .launch import agree_on_kernels, check_ranks_agree, leave_process_group

_MAX_LINES = 40  # of a message on the console


def get_config(args: argparse.Namespace) -> CfgNode:
    """Read the config of the command line (:func:`load_config`), and register its datasets."""
    if not args.config_file:
        raise UserError("No config file: give --config-file, such as configs/quick_start.yaml.")
    args.config_file = find_config_file(args.config_file)
    cfg = load_config(args.config_file, args.opts, args.dataset)
    register_coco_datasets(cfg.DATASETS.COCO)
    if args.eval_only:
        choose_device(cfg)
    return cfg


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Detectron2's :func:`default_setup`, and what every process of a run needs: memory settings, an
    end with its launcher, and a check that all run the same. Long messages, such as the config and
    the model, go to log.txt alone, at the level DEBUG.
    """
    if cfg.MODEL.DEVICE == "cpu" and cfg.MODEL.GNWS.KERNELS != "reference":
        keep_freed_memory()
    if comm.get_world_size() > 1:
        end_with_parent()
        check_ranks_agree(cfg, args)
        atexit.register(leave_process_group)
    # As Detectron2 calls it below, for the same loggers.
    for name in ({"name": "fvcore"}, {}, {"name": "gnws_d2"}):
        logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), **name)
        for handler in logger.handlers:
            handler.addFilter(_demote_long_message)
            if getattr(handler, "stream", None) is sys.stdout:
                handler.addFilter(lambda record: record.levelno > logging.DEBUG)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_demote_traceback)
    runs_model = not (args.eval_only and cfg.TEST.PREDICTIONS)
    if runs_model and cfg.MODEL.DEVICE != "cpu" and check_keys(cfg) in ("auto", "triton"):
        agree_on_kernels(cfg, torch.empty(0, device=cfg.MODEL.DEVICE).device)
    config_file = Path(cfg.OUTPUT_DIR, "config.yaml")
    is_run = args.eval_only and Path(cfg.OUTPUT_DIR, "run.json").is_file()
    config_of_training = config_file.read_text() if is_run and config_file.is_file() else ""
    # Without the config file, whose content is part of the config.
    _default_setup(cfg, argparse.Namespace(**{**vars(args), "config_file": ""}))
    if config_of_training and comm.is_main_process():
        with atomic_write(str(config_file)) as f:
            f.write(config_of_training)


def _demote_long_message(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if record.levelno == logging.INFO and text.count("\n") > _MAX_LINES:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        record.msg, record.args = re.sub(r"\x1b\[[\d;]*m", "", text), ()  # colors of pygments
    return True


def _demote_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info:  # Python, or the launcher, prints the error on the console
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return True
