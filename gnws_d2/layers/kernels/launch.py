"""Launch Triton kernels at the cost of one of PyTorch's operators."""

import functools
import operator
import re
from typing import Any

import torch
import triton
from torch import Tensor

# The first and the last version of Triton whose launch we have read: JITFunction.run,
# CompiledKernel and CudaLauncher in 3.6.0 (which ran on an H100), 3.7.0, 3.7.1, 3.8.0 and 3.9.0.
_FIRST, _LAST = (3, 6), (3, 9)


def can_launch_directly(version: str) -> bool:
    """Whether compiled kernels of this version of Triton take the arguments that we give them."""
    major, minor = re.findall(r"\d+", version)[:2]
    return torch.version.hip is None and _FIRST <= (int(major), int(minor)) <= _LAST


_DIRECT = can_launch_directly(triton.__version__)
# By kernel, device and what it is compiled for.
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[int | bool, ...],
    num_warps: int,
) -> None:
    """
    Run ``kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)``, with tensors on one
    device and a kernel of Triton that does not specialize on `numbers`. From the second time on,
    skip Triton's analysis of the arguments, which takes longer than most of our kernels, if
    :func:`can_launch_directly`.
    """
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, constants, num_warps)
    dtypes = [t.dtype for t in tensors]
    key = (id(kernel), device.index, num_warps, constants, *dtypes)
    compiled = _compiled.get(key)
    addresses = [t.data_ptr() for t in tensors]
    aligned = not functools.reduce(operator.or_, addresses) % 16  # what is compiled for
    if compiled is not None and aligned:
        # As at the end of JITFunction.run (triton/runtime/jit.py), without profilers' hooks.
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        fixed = (stream, compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(*grid, 1, *fixed, *addresses, *numbers, *constants)
        return
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = kernel[grid](*tensors, *numbers, *constants, **options)
    if _DIRECT and aligned and compiled is not None:  # the interpreter returns None
        _compiled[key] = compiled
