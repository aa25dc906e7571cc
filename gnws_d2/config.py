"""The config keys of this project, beside Detectron2's own, and how a config file is read."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from .utils.errors import UserError

CONFIG_DIR = Path(__file__).parent / "model_zoo" / "configs"


def add_gnws_config(cfg: CfgNode) -> None:
    """Add the keys below to `cfg`. The models also build from configs without them."""
    cfg.MODEL.GNWS = CfgNode()
    # "auto": the fastest implementation on the device of the weights. "reference": PyTorch's own
    # operators one by one. Both give the same results to rounding.
    cfg.MODEL.GNWS.KERNELS = "auto"

    # What training does with an image that is missing, damaged or not of the stated size: "stop",
    # or "skip": train on another image instead, log the file once, count.
    cfg.INPUT.ON_BAD_IMAGE = "stop"

    # How many of the newest checkpoints of SOLVER.CHECKPOINT_PERIOD to keep; 0 for all. With a
    # TEST.EVAL_PERIOD the one with the best AP is kept as well, as model_best.pth.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # What training does with a loss or gradient that is infinite or NaN: "stop", or "skip": leave
    # the weights unchanged in this iteration and count; three in a row stop.
    cfg.SOLVER.ON_NON_FINITE = "stop"

    cfg.DISTRIBUTED = CfgNode()
    # Seconds that a process waits for the others in a collective. Has to exceed the time that the
    # main process takes to compute AP, for which the others wait.
    cfg.DISTRIBUTED.TIMEOUT = 1800
    # Of earlier versions, in the configs that their runs have written: ignored.
    cfg.register_deprecated_key("DISTRIBUTED.START_TIMEOUT")
    cfg.register_deprecated_key("DISTRIBUTED.LOST_TIMEOUT")

    # Weights & Biases (pip install wandb): the project that a training is logged to, with all that
    # TensorBoard gets; "" for none. Its own settings are environment variables, such as
    # WANDB_ENTITY and WANDB_MODE.
    cfg.WANDB = CfgNode()
    cfg.WANDB.PROJECT = ""


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: if `value`, that of the config key `key`, is not one of `choices`.
    """
    if value not in choices:
        names = " or ".join(f'"{choice}"' for choice in choices)
        raise UserError(f'{key} is "{value}": set it to {names}.')


def flatten_config(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """
    Returns:
        The values of a config by their whole keys, as "MODEL.DEVICE", after `prefix`.
    """
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_config(config_file: str, opts: list[str]) -> CfgNode:
    """
    Read a config file without running code that it may contain.

    Args:
        config_file: path of a YAML file, or the name of a config in ``configs/``.
        opts: KEY VALUE pairs that override it.

    Returns:
        A frozen config.

    Raises:
        UserError: for a config file, key or value that Detectron2 rejects; or for precomputed
            proposals, which Detectron2 reads as pickles.
    """
    cfg = get_cfg()
    add_gnws_config(cfg)
    config_file = find_config_file(config_file)
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except Exception as e:  # Detectron2, yacs and YAML raise almost anything
        raise UserError(f"--config-file {config_file}: {_describe_error(e, cfg)}") from e
    try:
        cfg.merge_from_list(opts)
    except Exception as e:
        hint = " Options like --resume go before KEY VALUE pairs."
        hint = hint if any(str(opt).startswith("--") for opt in opts) else ""
        raise UserError(f"Command line: {_describe_error(e, cfg)}{hint}") from e
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            "MODEL.LOAD_PROPOSALS is set: proposal files are pickles, which can run code when "
            "loaded. Set it to False."
        )
    cfg.freeze()
    return cfg


def find_config_file(path_or_name: str) -> str:
    """
    Returns:
        The path of a config file that is given by its path or by its name in ``configs/``.
    """
    by_name = CONFIG_DIR / f"{path_or_name}.yaml"
    return path_or_name if os.path.exists(path_or_name) or not by_name.is_file() else str(by_name)


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
