"""What a process of ``tools/benchmark.py gpu`` measures: operators, or models in a precision."""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gnws_tools  # noqa: F401  (before Detectron2, whose warnings it filters)

# isort: split
import torch
from detectron2.modeling import build_model
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from gnws_d2.config import load_config
from gnws_d2.engine.checks import check_device
from gnws_d2.engine.run_record import describe_machine
from gnws_d2.layers import WSConv2d, group_norm, standardize_weight
from gnws_d2.layers.kernels import choice
from gnws_d2.layers.weight_standardization import standardize_weight_reference
from gnws_d2.utils.errors import exit_on_user_error
from gnws_tools.benchmark import PRECISIONS
from gnws_tools.benchmark_variants import prepare_model

MODELS = ["GN+WS", "GN", "FrozenBN"]
PARTS = [("inference", 1), ("inference", 8), ("train", 2), ("train", 8)]  # with the batch size
Step = Callable[[], Any]


def model_shapes(n: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The shapes that Mask R-CNN's GroupNorms get, of n images, padded as Detectron2 does."""
    height, width = (-(-size // 32) * 32 for size in (height, width))
    channels = {2: [64], 4: [64, 256, 128], 8: [128, 512, 256], 16: [256, 1024, 512]}
    channels[32] = [512, 2048, 256]
    shapes = [
        (n, c, height // s, width // s) for s, of_stride in channels.items() for c in of_stride
    ]
    return [*shapes, (1000 * n, 256, 7, 7), (100 * n, 256, 14, 14)]  # box head, mask head


class Timer:
    """Times steps in milliseconds: on a GPU, or, in a dry run, on the CPU."""

    def __init__(self, device: str, runs: int):
        self.cuda, self.runs = device != "cpu", runs

    def device(self, step: Step) -> float:
        """The time on the GPU alone: of a CUDA graph of several steps."""
        if not self.cuda:
            return self.wall(step)
        with torch.cuda.stream(torch.cuda.Stream()):
            step()
        torch.cuda.synchronize()
        graph, count = torch.cuda.CUDAGraph(), 10
        with torch.cuda.graph(graph):
            for _ in range(count):
                step()
        return self._events(graph.replay, 2) / count

    def wall(self, step: Step) -> float:
        """The time of a step of several in a row, of the GPU or of the CPU that feeds it."""
        if self.cuda:
            return self._events(step, 10)
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3

    def _events(self, step: Step, count: int) -> float:
        step()
        times = []
        for _ in range(self.runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(count):
                step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / count)
        return statistics.median(times)


def copy_bandwidth(timer: Timer, device: str) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    x = torch.empty(2**30 if timer.cuda else 2**24, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / timer.wall(lambda: y.copy_(x)) * 1e3


def measure_operators(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return ``copy_bandwidth`` and ``rows`` of GroupNorm + ReLU and of weight standardization."""
    timer = Timer(device, args.runs)
    bandwidth = copy_bandwidth(timer, device)
    rows = []
    for batch_size in (1,) if args.dry_run else (1, 2):
        shapes = model_shapes(batch_size, *args.image_size)
        for shape in shapes[:-2] if args.dry_run else shapes:
            for precision in PRECISIONS:
                if precision == "bfloat16" and shape[2] < args.image_size[0] // 4:
                    continue  # as fast as float16, and to compile all takes a minute
                rows.append(measure_group_norm(shape, getattr(torch, precision), timer, device))
    model = build_model(load_config(args.config_file, [*args.opts, "MODEL.DEVICE", device]))
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, WSConv2d)]
    for precision in PRECISIONS:
        rows.append(measure_standardization(weights, getattr(torch, precision), timer))
    return {"copy_bandwidth": bandwidth, "rows": rows}


def measure_group_norm(
    shape: tuple[int, ...], dtype: torch.dtype, timer: Timer, device: str
) -> dict[str, Any]:
    """Milliseconds and largest relative errors of GroupNorm + ReLU, by implementation."""
    torch.manual_seed(0)
    x = (torch.randn(shape) + 1).to(device, dtype)
    weight, bias = torch.randn(2, shape[1]).to(device)
    gn = partial(group_norm, num_groups=32, weight=weight, bias=bias, relu=True)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "triton": partial(gn, kernels="triton"),
        "torch": partial(gn, kernels="torch"),
        "auto": gn,
    }
    last = x.contiguous(memory_format=torch.channels_last)
    row: dict[str, Any] = {
        "operator": "GroupNorm + ReLU",
        "shape": shape,
        "precision": str(dtype).removeprefix("torch."),
        "bytes": 2 * x.numel() * x.element_size(),
        "forward": {},
        "wall": {},
        "forward and backward": {},
    }
    cases = [(name, f, x) for name, f in functions.items()]
    cases.insert(2, ("channels-last", functions["torch"], last))
    for name, f, tensor in cases:
        with torch.no_grad():
            row["forward"][name] = timer.device(partial(f, tensor))
            row["wall"][name] = timer.wall(partial(f, tensor))
        leaf = tensor.detach().requires_grad_()
        step = partial(_forward_backward, f, leaf)
        row["forward and backward"][name] = timer.wall(step)
    expected = _with_grad(partial(_group_norm_float64, weight=weight, bias=bias), x.double())
    actual = _with_grad(functions["triton"], x)
    row["error"] = [_error(a, e) for a, e in zip(actual, expected)]
    return row


def measure_standardization(
    weights: list[Tensor], dtype: torch.dtype, timer: Timer
) -> dict[str, Any]:
    """The same for the weights of all convolutions of a model, together."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "triton": partial(standardize_weight, dtype=dtype, kernels="triton"),
        "torch": partial(standardize_weight, dtype=dtype, kernels="torch"),
        "formula": lambda w: standardize_weight_reference(w).to(dtype),
        "auto": partial(standardize_weight, dtype=dtype),
    }
    row: dict[str, Any] = {
        "operator": "weight standardization",
        "shape": [len(weights)],
        "precision": str(dtype).removeprefix("torch."),
        "bytes": sum(w.numel() * (4 + dtype.itemsize) for w in weights),
        "forward": {},
        "wall": {},
        "forward and backward": {},
    }
    leaves = [w.detach().requires_grad_() for w in weights]
    for name, f in functions.items():
        with torch.no_grad():
            forward = partial(_each, f, weights)
            row["forward"][name], row["wall"][name] = timer.device(forward), timer.wall(forward)
        row["forward and backward"][name] = timer.wall(
            partial(_each, partial(_forward_backward, f), leaves)
        )
    pairs = [(_with_grad(functions["triton"], w), _with_grad(_formula64, w)) for w in weights]
    row["error"] = [max(_error(a[i], e[i]) for a, e in pairs) for i in range(2)]
    return row


def _each(f: Callable[[Tensor], Any], tensors: list[Tensor]) -> None:
    for tensor in tensors:
        f(tensor)


def _forward_backward(f: Callable[[Tensor], Tensor], leaf: Tensor) -> None:
    y = f(leaf)
    torch.autograd.grad(y, leaf, y.detach())


def _with_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output y, and the gradient for y * random: rounding decides the sign at 0 alone."""
    generator = torch.Generator(x.device).manual_seed(0)
    leaf = x.detach().requires_grad_()
    y = f(leaf)
    grad = y.detach() * torch.rand(y.shape, device=y.device, generator=generator).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def _group_norm_float64(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.group_norm(x, 32, weight.double(), bias.double()))


def _formula64(weight: Tensor) -> Tensor:
    return standardize_weight_reference(weight.double())


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def measure_models(
    precision: str, args: argparse.Namespace, device: str
) -> dict[str, dict[str, Any]]:
    """
    Time the steps of all models in turns. Return by part, then by model: ``seconds``;
    ``gpu_seconds``, what the kernels of a step take; and ``memory_bytes``, the peak over what was
    allocated without the model.
    """
    suffix = "" if precision == "float32" else ", AMP"
    opts = ["MODEL.DEVICE", device]
    opts += ["SOLVER.AMP.PRECISION", precision] if suffix else []
    cfg = load_config(args.config_file, [*args.opts, *opts])
    cuda = device != "cpu"
    parts = {}
    for work, batch_size in PARTS[:: 2 if args.dry_run else 1]:
        begin = time.perf_counter()
        one = {"work": work, "batch_size": batch_size}
        namespace = argparse.Namespace(**{**vars(args), **one})
        steps, sizes = {}, {}
        results: dict[str, Any] = {}
        for name in MODELS:
            before = torch.cuda.memory_allocated() if cuda else 0
            (steps[name],) = prepare_model(cfg, name + suffix, namespace).values()
            for _ in range(3 if cuda else 1):
                steps[name]()
            sizes[name] = torch.cuda.memory_allocated() - before if cuda else 0
            results[name] = {"seconds": [], "gpu_seconds": 0.0, "memory_bytes": 0}
        for turn in range(args.runs if batch_size < 8 else -(-args.runs // 2)):
            for name in MODELS[:: -1 if turn % 2 else 1]:
                results[name]["seconds"].append(_seconds(steps[name], cuda))
        for name in MODELS if cuda else []:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - sizes[name]
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                steps[name]()
                torch.cuda.synchronize()
            results[name]["gpu_seconds"] = _device_seconds(profiler)
            results[name]["memory_bytes"] = torch.cuda.max_memory_allocated() - others
        parts[f"{work}, batch {batch_size}"] = results
        steps.clear()
        gc.collect()
        print(precision, work, batch_size, f"took {time.perf_counter() - begin:.0f} s")
    return parts


def _seconds(step: Step, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _device_seconds(profiler: profile) -> float:
    kernels = [e for e in profiler.events() or [] if e.device_type == DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in kernels) / 1e6


@exit_on_user_error
def main() -> None:
    """Measure "operators" or the models in a precision, as the command line says; write JSON."""
    variant, args = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
    results, sys.stdout = sys.stdout, sys.stderr  # for what others print
    sys.argv = ["benchmark.py"]  # for errors
    device = "cpu" if args.dry_run else "cuda"
    check_device(load_config(args.config_file, [*args.opts, "MODEL.DEVICE", device]))
    begin = time.perf_counter()
    if variant == "operators":
        result = measure_operators(args, device)
    else:
        result = {"parts": measure_models(variant, args, device)}
    result["machine"], result["choices"] = describe_machine(), choice.summarize()
    result["took_seconds"] = time.perf_counter() - begin
    print(f"{variant} took {result['took_seconds']:.0f} s")
    print(json.dumps(result), file=results)


if __name__ == "__main__":
    main()
