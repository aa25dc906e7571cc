"""
Which operators run on a GPU: the Triton kernels wherever they can, PyTorch's own elsewhere.

This rule is fixed, so that every run takes the same operators. It follows from measurements on an
H100 (docs/performance.md):

* GroupNorm + ReLU, forward, in all 22 shapes of Mask R-CNN: on the GPU, PyTorch's operators take
  1.7 to 8.0 times as long as the kernels in float32, 1.6 to 14.8 times in float16 (bfloat16: 8.0 to
  14.7 times at the largest maps); in channels-last 2.4 to 20.3 times. The CPU launches them in 50
  to 60 us, and the kernels in 27 us.
* Weight standardization of 69 convolutions: 7.6 times in float32, 8.6 times in float16.
* Backward was measured in models only. In a training step of 2 images, compared with one of frozen
  BatchNorm, the GPU was busy 1.14 times as long in float32, where a choice by time had given 27 of
  106 shapes to PyTorch's operators, and 0.98 times as long in float16, where it had given them 1.
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
from .check import find_difference

# By operation, dtype and device: why the kernels must not run; "" if they may.
_failures: dict[tuple[str, torch.dtype, torch.device], str] = {}


def find_kernels(
    name: str, mode: str, x: Tensor, *args: object, dtype: torch.dtype | None = None
) -> ModuleType | None:
    """
    Args:
        name: "group_norm" or "weight_standardization".
        mode: "auto", "triton" or "torch", see :func:`gnws_d2.layers.group_norm`.
        x: tensor to run the kernels on.
        args: other arguments of ``unsupported_reason`` in the module of that name.
        dtype: of the output; by default the dtype of `x`.

    Returns:
        The module of that name, or None for PyTorch's own operators: if `mode` is "torch", if `x`
        is not :func:`is_eager_on_gpu`, or if the kernels cannot run on it. Then a warning says why,
        once for each reason.

    Raises:
        UserError: if `mode` is "triton" and the kernels cannot run on `x`.
    """
    if mode == "torch" or not is_eager_on_gpu(x):
        return None
    reason = _import(name).unsupported_reason(x, *args) if has_triton(x.device) else ""
    reason = reason or find_failure(name, dtype or x.dtype, x.device)
    if not reason:
        return _import(name)
    if mode == "triton":
        raise UserError(f'MODEL.GNWS.KERNELS is "triton", but {reason}: set it to "auto".')
    message = f"PyTorch's own operators run in place of Triton kernels: {reason}."
    log_first_n(logging.WARNING, message, key="message")
    return None


def is_eager_on_gpu(x: Tensor) -> bool:
    """
    Whether `x` is on a GPU, not empty, and neither traced, as traces hold PyTorch's operators only,
    nor compiled by torch.compile, which writes kernels of its own.
    """
    if not x.is_cuda or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return x.numel() > 0


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and supports the GPU `device`."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and torch.cuda.get_device_capability(device) >= (7, 0)


def find_failure(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """
    Return why the kernels of an operation must not run in `dtype` on `device`; "" if they may:
    forward and backward, they give PyTorch's numbers on small inputs. Checked once per process.
    """
    key = name, dtype, device
    if key not in _failures:
        if not has_triton(device):
            _failures[key] = "Triton is not installed or does not support this GPU"
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "they cannot be checked in a CUDA graph (run the model once before its capture)"
        else:
            difference = _check(name, dtype, device)
            _failures[key] = difference and (
                f"the kernels of {name} in {dtype} fail their check ({difference}; please report "
                'this, with the output of "python -m detectron2.utils.collect_env")'
            )
    return _failures[key]


def _check(name: str, dtype: torch.dtype, device: torch.device) -> str:
    # No autocast, grad mode or hook of the caller applies in another thread.
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(find_difference, _import(name), dtype, device).result()
        except Exception as e:  # compilers and drivers raise almost anything
            return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def forbid(name: str, dtype: torch.dtype, device: torch.device, reason: str) -> None:
    """Run PyTorch's own operators, as if :func:`find_failure` had found `reason`."""
    _failures[name, dtype, device] = reason


def summarize() -> str:
    """Return a sentence on which operators run on GPUs; "" if no kernels have been checked."""
    names: dict[bool, list[str]] = {False: [], True: []}
    for (name, dtype, _), reason in _failures.items():
        names[bool(reason)].append(f"{name} in {str(dtype).removeprefix('torch.')}")
    kinds = {"Triton kernels": names[False], "PyTorch's own operators": names[True]}
    parts = [f"{kind} for {', '.join(found)}" for kind, found in kinds.items() if found]
    return f"On the GPU: {'; '.join(parts)}." if parts else ""


@functools.cache
def _import(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)
