"""Triton kernels for GPUs. Their modules import Triton; :func:`use_triton` says if they can be."""

import functools
import importlib.util
import logging

import torch
from torch import Tensor


def use_triton(x: Tensor, reason_not: str = "") -> bool:
    """
    Args:
        x: what the kernel would run on.
        reason_not: why the kernel does not take this shape or type; empty if it does.

    Returns:
        Whether to run the Triton kernel. If not, a log message says why, once for each reason.
    """
    if not x.is_cuda:
        reason_not = f"they run on GPUs, not on {x.device.type}"
    elif not _has_triton():
        reason_not = "Triton is not installed"
    elif not _is_supported(x.device):
        reason_not = "the GPU is older than Triton supports"
    if reason_not and not torch.compiler.is_compiling():
        _log_once(logging.WARNING if x.is_cuda else logging.INFO, reason_not)
    return not reason_not


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (7, 0)


@functools.cache
def _log_once(level: int, reason: str) -> None:
    logging.getLogger(__name__).log(
        level, f"PyTorch's own operators run in place of Triton kernels: {reason}."
    )
