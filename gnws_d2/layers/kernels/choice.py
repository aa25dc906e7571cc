"""
Which operators run on a GPU: the Triton kernels wherever they can, PyTorch's own elsewhere.

This rule is fixed, so that every run takes the same operators. On an H100 the kernels were faster
forward in all shapes of Mask R-CNN and all types (docs/performance.md).
"""

import functools
import importlib
import importlib.util
import logging
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from detectron2.utils.logger import log_first_n
from torch import Tensor

from ...utils.errors import UserError
from .check import TOLERANCE, find_difference

_import = functools.cache(importlib.import_module)


def find_kernels(
    name: str, mode: str, x: Tensor, dtype: torch.dtype, *args: object
) -> ModuleType | None:
    """
    Args:
        name: "group_norm" or "weight_standardization".
        mode: "auto", "triton" or "torch", see :func:`gnws_d2.layers.group_norm`.
        x: tensor to run the kernels on.
        dtype: of the output.
        args: other arguments of ``unsupported_reason`` in the module of that name.

    Returns:
        The module of that name, or None for PyTorch's own operators: if `mode` is "torch", if `x`
        is not :func:`is_eager_on_gpu`, or if the kernels cannot run on it. Then a warning says why,
        once for each reason.

    Raises:
        UserError: if `mode` is "triton" and the kernels cannot run on `x`.
    """
    if mode == "torch" or not is_eager_on_gpu(x):
        return None
    reason = find_failure(x.dtype, x.device) or find_failure(dtype, x.device)
    if not reason:
        kernels = _import(f".{name}", __package__)
        reason = kernels.unsupported_reason(x, *args)
        if not reason:
            return kernels
    refuse(mode, reason)
    return None


def refuse(mode: str, reason: str) -> None:
    """Warn once that PyTorch's operators run; raise :class:`UserError` if `mode` is "triton"."""
    if mode == "triton":
        raise UserError(f'MODEL.GNWS.KERNELS is "triton", but {reason}: set it to "auto".')
    message = f"PyTorch's own operators run in place of Triton kernels: {reason}."
    log_first_n(logging.WARNING, message, key="message")


def is_eager_on_gpu(x: Tensor) -> bool:
    """
    Whether `x` is on a GPU, not empty, and neither traced, as traces hold PyTorch's operators only,
    nor compiled by torch.compile, which writes kernels of its own.
    """
    if not x.is_cuda or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return x.numel() > 0


@functools.cache
def find_failure(dtype: torch.dtype, device: torch.device) -> str:
    """Return why kernels must not run in `dtype` on `device`; "" if they give PyTorch's numbers."""
    if not has_triton(device):
        return "Triton is not installed or does not support this GPU"
    if dtype not in TOLERANCE:
        return f"there are no kernels for {dtype}"
    # No autocast, grad mode or hook of the caller applies in another thread.
    with ThreadPoolExecutor(1) as pool:
        try:
            difference = pool.submit(find_difference, dtype, device).result()
        except Exception as e:  # compilers and drivers raise almost anything
            difference = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return difference and (
        f"the kernels fail their check in {dtype} ({difference}; please report this, with the "
        'output of "python -m detectron2.utils.collect_env")'
    )


def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and supports the GPU `device`."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and torch.cuda.get_device_capability(device) >= (7, 0)
