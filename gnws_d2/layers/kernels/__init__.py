"""Triton kernels for GPUs. Their modules import Triton, so :func:`get_kernels` imports them."""

import functools
import importlib.util
import logging
from types import ModuleType

import torch
from detectron2.utils.logger import log_first_n
from torch import Tensor


def get_kernels(name: str, x: Tensor, *args: int) -> ModuleType | None:
    """
    Args:
        name: "group_norm" or "weight_standardization".
        x: tensor to run the kernels on.
        args: other arguments of ``unsupported_reason`` in the module of that name.

    Returns:
        The module of that name, or None if its kernels cannot run on `x`. The log says why, once
        for each reason.
    """
    if torch.jit.is_tracing():  # traces hold PyTorch's own operators only
        return None
    if not x.is_cuda:
        reason = f"they run on GPUs, not on {x.device.type}"
    elif not _has_triton(x.device):
        reason = "Triton is not installed or does not support this GPU"
    else:
        from . import group_norm, weight_standardization

        kernels = group_norm if name == "group_norm" else weight_standardization
        reason = kernels.unsupported_reason(x, *args)
        if not reason:
            return kernels
    if not torch.compiler.is_compiling():
        message = f"PyTorch's own operators run in place of Triton kernels: {reason}."
        log_first_n(logging.WARNING if x.is_cuda else logging.INFO, message, key="message")
    return None


@functools.cache
def _has_triton(device: torch.device) -> bool:
    installed = importlib.util.find_spec("triton") is not None
    return installed and torch.cuda.get_device_capability(device) >= (7, 0)
