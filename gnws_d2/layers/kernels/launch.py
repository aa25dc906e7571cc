"""Launch Triton kernels at the cost of one of PyTorch's operators."""

import functools
import operator
from typing import Any

import torch
import triton
from torch import Tensor

# By kernel, device and what it is compiled for.
_compiled: dict[tuple[Any, ...], Any] = {}
# The first version whose compiled kernels are known to take the arguments below.
_DIRECT = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 6)


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[int | bool, ...],
    dtypes: tuple[torch.dtype, ...],
    num_warps: int,
) -> None:
    """
    Run ``kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)``, from the second time
    on without Triton's analysis of the arguments, which takes longer than most of our kernels.

    Args:
        kernel: of Triton, which does not specialize on `numbers`.
        tensors: on one device.
        dtypes: those of the tensors, as far as they differ from call to call.
    """
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, constants, dtypes, num_warps)
    key = (id(kernel), device.index, num_warps, dtypes, constants)
    compiled = _compiled.get(key)
    addresses = [t.data_ptr() for t in tensors]
    aligned = not functools.reduce(operator.or_, addresses) % 16  # what is compiled for
    if compiled is not None and aligned:
        # As `compiled[grid](...)`, without looking for profilers' hooks.
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        fixed = (stream, compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(*grid, 1, *fixed, *addresses, *numbers, *constants)
        return
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = kernel[grid](*tensors, *numbers, *constants, **options)
    if _DIRECT and aligned and compiled is not None:  # the interpreter returns None
        _compiled[key] = compiled
