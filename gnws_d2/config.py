"""The config keys of this project, beside Detectron2's own."""

from typing import Any

from detectron2.config import CfgNode

from .utils.errors import UserError


def add_gnws_config(cfg: CfgNode) -> None:
    """Add the keys below to `cfg`. The models also build from configs without them."""
    cfg.MODEL.GNWS = CfgNode()
    # "auto": the fastest implementation for the device that the weights are on, all exact to
    # "reference": PyTorch's own operators one by one, weights standardized on every forward.
    cfg.MODEL.GNWS.KERNELS = "auto"

    # What training does about an image that is missing, damaged or not of the size it should have:
    # "stop", or "skip": train on another one in its place, log the file once, count.
    cfg.INPUT.ON_BAD_IMAGE = "stop"

    # How many of the checkpoints of SOLVER.CHECKPOINT_PERIOD to keep, the newest ones; 0 for all.
    # With a TEST.EVAL_PERIOD the one with the best AP is kept besides, as model_best.pth.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # What training does about a loss or gradient that is infinite or NaN: "stop", or "skip": leave
    # the weights as they are in this iteration and count; three in a row stop.
    cfg.SOLVER.ON_NON_FINITE = "stop"

    # All in seconds.
    cfg.DISTRIBUTED = CfgNode()
    # For all machines to come.
    cfg.DISTRIBUTED.START_TIMEOUT = 600
    # Without a sign of life from a machine, until it counts as lost and the run ends.
    cfg.DISTRIBUTED.LOST_TIMEOUT = 60
    # For a process to wait for another in a collective. It is to be longer than the main process
    # takes to compute AP, for which the others wait.
    cfg.DISTRIBUTED.TIMEOUT = 1800

    # Weights & Biases, if it is installed (pip install wandb): the project that a training is
    # logged to, with all that TensorBoard gets; "" for none. Its own settings are environment
    # variables, as WANDB_ENTITY and WANDB_MODE.
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
