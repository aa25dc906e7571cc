"""The config keys that this project adds to Detectron2's, and how a config file is read."""

import difflib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from .utils.errors import UserError

CONFIG_DIR = Path(__file__).parent / "model_zoo" / "configs"


def add_gnws_config(cfg: CfgNode) -> None:
    """
    Add the keys of this project to `cfg`, from Detectron2's ``get_cfg()``, so that config files of
    this project can be merged into it. The models also build from configs without them.
    """
    cfg.MODEL.GNWS = CfgNode()
    # Which operators run on a GPU. "auto": Triton kernels where they can run and PyTorch's own
    # operators elsewhere. "triton": stop if the kernels cannot run. "torch": PyTorch's own
    # operators. "reference": PyTorch's operators without fusion, also on a CPU. The results agree
    # up to rounding.
    cfg.MODEL.GNWS.KERNELS = "auto"
    # Whether a model without MODEL.WEIGHTS starts as MMDetection's where that is better than
    # Detectron2's start: with each residual block as the identity, the weight of its last GroupNorm
    # at 0 (Goyal et al., 2017, section 5.1), and with a mask predictor as large as He et al., 2015.
    cfg.MODEL.GNWS.SCRATCH_INIT = True
    cfg.register_deprecated_key("MODEL.GNWS.ZERO_INIT_RESIDUAL")  # in runs of earlier versions

    # The IoU from which the best anchors of an object are positive although it is below
    # MODEL.RPN.IOU_THRESHOLDS. 0: Detectron2's rule, from any IoU. MMDetection's 0.3 leaves out
    # most objects that are smaller than half the smallest anchor. Read by "MinQualityRPN".
    cfg.MODEL.RPN.MIN_LOW_QUALITY_IOU = 0.0

    # Whether training keeps only the inputs of the ResNet's blocks, and computes the rest again in
    # the backward pass: less memory, more time, the same gradients.
    cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING = False

    # Datasets in COCO format to register, (name, annotation file, image directory) each, as
    # --dataset does.
    cfg.DATASETS.COCO = ()

    # What training does with an image that is missing, damaged or not of the stated size: "stop",
    # or "skip": train on another image instead, log the file once, and count such images.
    cfg.INPUT.ON_BAD_IMAGE = "stop"
    # What training changes at random in images. "none": Detectron2's resize and flip, as published.
    # "light": also their colors, and their scale by 0.8 to 1.25. "strong": large-scale jitter, 0.1
    # to 2.0, in squares of INPUT.MAX_SIZE_TRAIN.
    cfg.INPUT.AUGMENTATION = "none"
    # The probability that objects of another training image are pasted onto an image.
    cfg.INPUT.COPY_PASTE = 0.0
    # Whether images are also turned by 0, 90, 180 or 270 degrees, for data without an upright
    # orientation.
    cfg.INPUT.ANY_ORIENTATION = False

    # How many of the newest checkpoints of SOLVER.CHECKPOINT_PERIOD to keep; 0 for all. With a
    # TEST.EVAL_PERIOD the one with the best AP is kept as well, as model_best.pth.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # What training does with a loss, gradient or proposal that is infinite or NaN: "stop", or
    # "skip": skip the step, and count it; stop at three in a row.
    cfg.SOLVER.ON_NON_FINITE = "stop"

    # The number of forward and backward passes per iteration, each on an equal part of the batch,
    # one part in memory at a time. The gradients equal those of one process per part.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # The precision of SOLVER.AMP: "float16", with a gradient scaler, or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # The decay of an exponential moving average of the weights (Tarvainen and Valpola, 2017), which
    # is evaluated, and saved as the model; 0 for none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Stop after this number of evaluations without a better AP; 0 for never.
    cfg.SOLVER.PATIENCE = 0

    # Whether each evaluation of TEST.EVAL_PERIOD also computes the losses on DATASETS.TEST.
    cfg.TEST.VALIDATION_LOSS = False
    # The share of the time of the iterations that evaluations may take; 0 for any. After the first
    # evaluation TEST.EVAL_PERIOD is multiplied accordingly. The last is always made.
    cfg.TEST.MAX_TIME_SHARE = 0.0
    # A file of predictions in COCO's results format, such as inference/coco_instances_results.json
    # in OUTPUT_DIR, that --eval-only evaluates instead of a model.
    cfg.TEST.PREDICTIONS = ""
    cfg.DISTRIBUTED = CfgNode()
    # Seconds that a process waits for the others in a collective operation.
    cfg.DISTRIBUTED.TIMEOUT = 1800

    # Weights & Biases (pip install wandb): the project that a training is logged to, with all that
    # TensorBoard gets; "" for none. Its own settings are environment variables, such as
    # WANDB_ENTITY and WANDB_MODE.
    cfg.WANDB = CfgNode()
    cfg.WANDB.PROJECT = ""


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise :class:`UserError` if `value`, of the config key `key`, is not one of `choices`."""
    if value not in choices:
        names = " or ".join(f'"{choice}"' for choice in choices)
        raise UserError(f'{key} is "{value}": set it to {names}.')


def flatten_config(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return the values of a config by their full keys, such as "MODEL.DEVICE", after `prefix`."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_config(
    config_file: str, opts: Sequence[Any], datasets: Sequence[Sequence[str]] = (), text: str = ""
) -> CfgNode:
    """
    Read a config file without running code that it may contain. For the ``config.yaml`` or
    ``finetune.yaml`` of a run, ``OUTPUT_DIR`` is the directory that it is in, even if that was
    moved or copied, and the paths below it follow.

    Args:
        config_file: see :func:`find_config_file`.
        opts: KEY VALUE pairs that override it.
        datasets: the arguments of ``--dataset``, to add to ``DATASETS.COCO``.
        text: the content of `config_file`, if it comes from a checkpoint instead.

    Returns:
        A frozen config.

    Raises:
        UserError: if Detectron2 rejects the file, a key or a value; if a dataset is in neither
            ``DATASETS.TRAIN`` nor ``DATASETS.TEST``; or if the config has precomputed proposals,
            which Detectron2 reads as pickles.
    """
    cfg = get_cfg()
    add_gnws_config(cfg)
    config_file = find_config_file(config_file)
    try:
        if text:
            cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(text)))
        else:
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except Exception as e:  # Detectron2, yacs and YAML raise almost anything
        raise UserError(f"--config-file {config_file}: {_describe_error(e, cfg)}") from e
    directory, name = os.path.split(config_file)
    beside = {"config.yaml": "run.json", "finetune.yaml": "finetune.choices.json"}.get(name)
    if beside and os.path.isfile(os.path.join(directory, beside)):
        _move_run(cfg, directory or ".")
    try:
        cfg.merge_from_list(list(opts))
    except Exception as e:
        hint = " Options like --resume go before KEY VALUE pairs."
        hint = hint if any(str(opt).startswith("--") for opt in opts) else ""
        raise UserError(f"Command line: {_describe_error(e, cfg)}{hint}") from e
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            "MODEL.LOAD_PROPOSALS is set: proposal files are pickles, which can run code when "
            "loaded. Set it to False."
        )
    for name, *_ in datasets:
        if name not in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]:
            raise UserError(
                f"--dataset {name} is neither in DATASETS.TRAIN nor in DATASETS.TEST, so it would "
                f"not be used: add DATASETS.TRAIN \"('{name}',)\" or DATASETS.TEST \"('{name}',)\"."
            )
    by_name = {name: (name, *map(_absolute, paths)) for name, *paths in datasets}
    recorded = {dataset[0]: tuple(dataset) for dataset in cfg.DATASETS.COCO}
    cfg.DATASETS.COCO = tuple((recorded | by_name).values())
    cfg.freeze()
    return cfg


def _move_run(cfg: CfgNode, directory: str) -> None:
    """Set ``OUTPUT_DIR``, and change the paths that lie in the one before."""

    def move(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(move, value))
        if value.startswith(before + os.sep):
            return os.path.abspath(directory) + value.removeprefix(before)
        return value

    before, cfg.OUTPUT_DIR = cfg.OUTPUT_DIR, directory
    for key in ("TRAIN", "TEST", "COCO"):
        cfg.DATASETS[key] = move(cfg.DATASETS[key])
    cfg.MODEL.WEIGHTS = move(cfg.MODEL.WEIGHTS)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def choose_device(cfg: CfgNode) -> None:
    """Set ``MODEL.DEVICE`` to "cpu", and log it, if it is a GPU and PyTorch finds none."""
    if cfg.MODEL.DEVICE == "cpu" or torch.cuda.is_available():
        return
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    logging.getLogger(__name__).info("PyTorch finds no GPU: MODEL.DEVICE is cpu.")
    if frozen:
        cfg.freeze()


def check_device(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if ``MODEL.DEVICE`` is a GPU and there is none."""
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but PyTorch finds no GPU on this machine: set "
            "MODEL.DEVICE cpu to run on the CPU."
        )


def find_config_file(path_or_name: str) -> str:
    """Return the path of a config file, given as a path, ``configs/NAME.yaml`` or NAME of ours."""
    name = re.fullmatch(r"(?:configs/)?([\w-]+)(?:\.yaml)?", path_or_name)
    by_name = CONFIG_DIR / f"{name[1]}.yaml" if name else None
    if os.path.isfile(path_or_name) or not (by_name and by_name.is_file()):
        return path_or_name
    return str(by_name)


def _describe_error(error: Exception, cfg: CfgNode) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, OSError):
        text = f"{error.strerror}: {error.filename}"
    text = text or type(error).__name__
    unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", text)
    if unknown:
        near = difflib.get_close_matches(unknown[1], flatten_config(cfg), n=1, cutoff=0.7)
        text = f"there is no key {unknown[1]}{f', did you mean {near[0]}?' if near else '.'}"
    return " ".join(text.split())[:500]
