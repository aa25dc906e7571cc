"""The operators that tools/benchmark.py times: weight standardization and GroupNorm + ReLU."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from gnws_d2.layers import WSConv2d, group_norm, standardize_weight
from gnws_d2.layers.weight_standardization import standardize_weight_reference

Step = Callable[[], Any]
Parts = dict[str, Callable[[], Step]]  # functions that prepare what is timed


def prepare_ops(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    """Weight standardization of all convolutions of a model, and GroupNorm + ReLU by shape."""
    kernels, device = variant.partition(", ")[2] or "auto", cfg.MODEL.DEVICE
    model = build_model(cfg).requires_grad_()  # the frozen layers too
    weights = [(m.weight,) for m in model.modules() if isinstance(m, WSConv2d)]
    parts: Parts = {}
    for dtype in [torch.float32] + [getattr(torch, cfg.SOLVER.AMP.PRECISION)] * (device != "cpu"):
        cases: dict[str, Any] = {}
        cases["weight standardization"] = partial(standardize, dtype, kernels), weights
        for n in (1, 2) if args.work == "gpu" else (args.batch_size,):
            for shape in model_shapes(n, *args.image_size):
                tensors = torch.randn(shape, dtype=dtype), *torch.randn(2, shape[1])
                inputs = [tuple(t.to(device).requires_grad_() for t in tensors)]
                name = f"GroupNorm + ReLU, {' x '.join(map(str, shape))}"
                cases[name] = partial(normalize, kernels), inputs
        for name, (operator, inputs) in cases.items():
            grads = [tensors[0].detach().to(dtype) for tensors in inputs]
            for backward, what in ((False, ", forward"), (True, "")):
                # A partial of partial, as a part returns the step.
                part = partial(partial, run_operator, operator, inputs, grads, backward)
                parts[f"{name}, {str(dtype).removeprefix('torch.')}{what}"] = part
    return parts


def standardize(dtype: torch.dtype, kernels: str, weight: Tensor) -> Tensor:
    if kernels == "reference":
        return standardize_weight_reference(weight).to(dtype)
    return standardize_weight(weight, dtype=dtype, kernels=kernels)


def normalize(kernels: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kernels = "torch" if kernels == "reference" else kernels
    return group_norm(x, 32, weight, bias, relu=True, kernels=kernels)


def run_operator(
    operator: Callable[..., Tensor], inputs: Any, grads: list[Tensor], backward: bool
) -> None:
    """Call `operator` with each of `inputs`."""
    with torch.set_grad_enabled(backward):
        outputs = [operator(*tensors) for tensors in inputs]
    if backward:
        torch.autograd.grad(outputs, [t for tensors in inputs for t in tensors], grads)


def model_shapes(n: int, height: int, width: int) -> list[tuple[int, ...]]:
    """Return the shapes that Mask R-CNN's GroupNorms get for `n` images, padded by Detectron2."""
    height, width = (-(-size // 32) * 32 for size in (height, width))
    channels = {2: [64], 4: [64, 256, 128], 8: [128, 512, 256], 16: [256, 1024, 512]}
    channels[32] = [512, 2048, 256]
    shapes = [(n, c, height // s, width // s) for s, cs in channels.items() for c in cs]
    return [*shapes, (1000 * n, 256, 7, 7), (100 * n, 256, 14, 14)]  # box head, mask head
