"""Time and memory of GN+WS beside what it stands in for, measured in turns in one process."""

import contextlib
import copy
import ctypes
import functools
import gc
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import OpenCVDatasetMapper
from ..export.fold import STOCK_NAMES
from ..layers import GroupNorm, WSConv2d, fold_ws_conv, group_norm, standardize_weight
from ..layers.weight_standardization import standardize_weight_reference
from ..utils.memory import keep_freed_memory


@dataclass
class Variant:
    """One way to do the work, and what was measured of it."""

    name: str
    run: Callable[[], Any]
    # Whether the C library keeps freed memory, as it does for our models on a CPU, or is as it is.
    keep_memory: bool = False
    own_bytes: int = 0  # of what is there before and after a run: parameters, optimizer state
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "memory_bytes": None if self.peak_bytes is None else self.peak_bytes + self.own_bytes,
            "seconds": self.seconds,
        }


def measure(
    variants: list[Variant], device: torch.device, turns: int, runs: int = 1, memory: bool = True
) -> None:
    """
    Run the variants in turns, every other time from last to first (A B B A), as one may leave the
    memory better for the next, and fill in their ``seconds`` and ``peak_bytes``.

    Args:
        turns: how often each variant has its turn: two runs to warm up, then `runs` timed ones.
        memory: measure the peak memory of a run, too, by itself.
    """
    for turn in range(turns):
        for variant in variants[:: -1 if turn % 2 else 1]:
            with _memory_of(variant, device):
                for _ in range(2):
                    variant.run()
                _synchronize(device)
                for _ in range(runs):
                    start = time.perf_counter()
                    variant.run()
                    _synchronize(device)
                    variant.seconds.append(time.perf_counter() - start)
    for variant in variants if memory else []:
        with _memory_of(variant, device):
            variant.peak_bytes = _peak_memory(variant, device)


@contextlib.contextmanager
def _memory_of(variant: Variant, device: torch.device) -> Iterator[None]:
    """The allocator as `variant` has it, whatever the ones before it left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        yield
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    keep_freed_memory(True)
    blocks = []
    if not variant.keep_memory:
        libc.malloc_trim(0)
        # Where the others kept memory there are holes, which glibc would fill before it takes new
        # pages. Blocks that are never written to fill them.
        for size in (1 << 28, 1 << 26, 1 << 24, 1 << 22):
            top = libc.sbrk(0)
            while (block := libc.malloc(size)) + size < top:
                blocks.append(block)
            libc.free(block)
            libc.malloc_trim(0)
        keep_freed_memory(False)
    try:
        yield
    finally:
        for block in blocks:
            libc.free(block)
        keep_freed_memory(True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(variant: Variant, device: torch.device) -> int | None:
    """Bytes at the peak of a run over those before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _status("VmRSS")
    variant.run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def describe_machine(device: torch.device) -> dict[str, str]:
    """
    Returns:
        The device, the processor and the versions that a figure belongs to.
    """
    import detectron2

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":")[1].strip()
                break
    machine = {"cpu": f"{cpu}, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = str(torch.version.cuda)
    machine["python"] = platform.python_version()
    for module in ("torch", "torchvision", "triton", "numpy", "cv2"):
        with contextlib.suppress(ImportError):
            machine[module] = __import__(module).__version__
    return {**machine, "detectron2": detectron2.__version__, "system": sys.platform}


class _PlainConv2d(WSConv2d):
    """A convolution in the same model, in the same format, that is not standardized."""

    _formatted: Tensor | None = None

    def standardized_weight(self) -> Tensor:
        if self.training or not self.channels_last or self.weight.device.type != "cpu":
            return self.weight
        if self._formatted is None:
            self._formatted = self.weight.detach().to(memory_format=torch.channels_last)
        return self._formatted


def build_models(cfg: CfgNode, names: list[str], image: Tensor) -> dict[str, nn.Module]:
    """
    Args:
        cfg: of a GN+WS model. Its weights are random: time does not depend on them.
        names: of :data:`MODELS`.
        image: (3, H, W) uint8, of which `FrozenBatchNorm2d` takes its statistics.

    Returns:
        The models by name. Their weights give the same outputs, but for those with FrozenBN.
    """
    cfg = cfg.clone()
    cfg.defrost()
    torch.manual_seed(0)
    model: Any = build_model(cfg)
    # As many detections as a trained model has; else the mask head would have nothing to do.
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
    state = model.state_dict()
    folded = fold_ws_conv(copy.deepcopy(model)).state_dict()

    def variant(name: str) -> nn.Module:
        c = cfg.clone()
        if name == "GN+WS, reference":
            c.MODEL.GNWS.KERNELS = "reference"
        elif name in ("GN, Detectron2", "FrozenBN"):
            for node in (c.MODEL.BACKBONE, c.MODEL.ROI_BOX_HEAD, c.MODEL.ROI_MASK_HEAD):
                node.NAME = STOCK_NAMES[node.NAME]
        if name == "FrozenBN":
            for node in (c.MODEL.RESNETS, c.MODEL.FPN, c.MODEL.ROI_BOX_HEAD, c.MODEL.ROI_MASK_HEAD):
                node.NORM = "FrozenBN"
        m = build_model(c)
        m.load_state_dict(state if "WS" in name else folded, strict=name != "FrozenBN")
        for layer in m.modules():
            if name == "GN" and isinstance(layer, WSConv2d):
                layer.__class__ = _PlainConv2d
        if name == "FrozenBN":
            _calibrate(m, image)
        return m

    return {name: variant(name) for name in names}


# GN has our kernels, and GN+WS is compared with it; the rest are Detectron2's and the formula.
MODELS = ("GN+WS", "GN", "GN+WS, reference", "GN, Detectron2", "FrozenBN")
_OURS = ("GN+WS", "GN")


@torch.no_grad()
def _calibrate(model: nn.Module, image: Tensor) -> None:
    """Give every FrozenBN the statistics of its input, without which activations explode."""

    def set_statistics(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    model.eval()([{"image": image}])
    for hook in hooks:
        hook.remove()


def make_inputs(cfg: CfgNode, height: int, width: int, batch_size: int) -> list[dict[str, Any]]:
    """
    Returns:
        Seeded images of this size with eight objects each, in Detectron2's model input format.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(batch_size):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        corners = torch.rand(8, 2, generator=generator) * 0.6
        sizes = 0.1 + torch.rand(8, 2, generator=generator) * 0.3
        scale = torch.tensor([width, height])
        boxes = torch.cat([corners * scale, (corners + sizes) * scale], dim=1)
        masks = torch.zeros(8, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
            mask[y0:y1, x0:x1] = True
        instances = Instances((height, width), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.arange(8) % cfg.MODEL.ROI_HEADS.NUM_CLASSES
        instances.gt_masks = BitMasks(masks)
        inputs.append({"image": image, "instances": instances})
    return inputs


def benchmark_models(
    cfg: CfgNode,
    train: bool,
    size: tuple[int, int],
    batch_size: int,
    turns: int,
    runs: int,
    names: list[str],
) -> list[Variant]:
    """
    Measure inference or a training step of models.

    Args:
        names: of :data:`MODELS`, with ", AMP" after the name for mixed precision (float16 on a GPU,
            bfloat16 on a CPU).
    """
    inputs = make_inputs(cfg, *size, batch_size)
    used = [model for model in MODELS if {model, f"{model}, AMP"} & set(names)]
    models = build_models(cfg, used, inputs[0]["image"])
    device = torch.device(cfg.MODEL.DEVICE)
    variants = []
    for amp, (name, model) in itertools.product((False, True), models.items()):
        if (f"{name}, AMP" if amp else name) not in names:
            continue
        model.train(train)
        optimizer = build_optimizer(cfg, model) if train else None
        autocast = functools.partial(
            torch.autocast,
            device.type,
            torch.float16 if device.type == "cuda" else torch.bfloat16,
            enabled=amp,
        )
        if optimizer:
            scaler = torch.amp.GradScaler(device.type, enabled=amp and device.type == "cuda")
            run = functools.partial(_train_step, model, inputs, autocast, optimizer, scaler)
        else:
            run = functools.partial(_infer, model, inputs, autocast)
        variant = Variant(f"{name}, AMP" if amp else name, run, keep_memory=name in _OURS)
        own = list(model.state_dict().values())
        if optimizer:  # momentum
            own += [p for group in optimizer.param_groups for p in group["params"]]
        variant.own_bytes = sum(t.numel() * t.element_size() for t in own)
        variants.append(variant)
    measure(variants, device, turns, runs)
    return variants


def _infer(
    model: nn.Module, inputs: list[dict[str, Any]], autocast: Callable[[], torch.autocast]
) -> None:
    with torch.no_grad(), autocast():
        model([{"image": x["image"]} for x in inputs])


def _train_step(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    autocast: Callable[[], torch.autocast],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # every step is to have the same work
    torch.manual_seed(0)  # of the proposals that are sampled
    with EventStorage(), autocast():
        loss = sum(model(inputs).values())
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def benchmark_weight_standardization(
    cfg: CfgNode, turns: int, runs: int
) -> tuple[list[Variant], list[Variant]]:
    """
    Measure forward and backward of the operation over all convolutions of a model, and forward
    alone: our operation and the formula.
    """
    model = build_model(cfg)
    device = torch.device(cfg.MODEL.DEVICE)
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, WSConv2d)]
    weights = [w.clone().requires_grad_() for w in weights]
    grads = [torch.randn_like(w) for w in weights]

    def both(standardize: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for weight, grad in zip(weights, grads):
                weight.grad = None
                standardize(weight).backward(grad)

        return run

    def forward(standardize: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            for weight in weights:
                standardize(weight)

        return run

    measured = []
    for work in (both, forward):
        variants = [
            Variant("GN+WS", work(standardize_weight), keep_memory=True),
            Variant("reference formula", work(standardize_weight_reference)),
        ]
        measure(variants, device, turns, runs, memory=False)
        measured.append(variants)
    return measured[0], measured[1]


def benchmark_group_norm(
    cfg: CfgNode, size: tuple[int, int], turns: int, runs: int
) -> list[dict[str, Any]]:
    """
    Measure forward and backward of GroupNorm + ReLU, with and without the residual, at the shapes
    of the model for batches of 1 and 2 images of this size, in float32 and, on a GPU, in half
    precision.

    Returns:
        For each shape, type and residual: ``ours`` and ``pytorch`` (variants), and ``copy``, the
        time that the device takes to copy x as many times as the floor has passes over it.
    """
    model = build_model(cfg).eval()
    device = torch.device(cfg.MODEL.DEVICE)
    shapes: list[tuple[int, ...]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, x: shapes.append(tuple(x[0].shape)))
        for m in model.modules()
        if isinstance(m, GroupNorm)
    ]
    for batch_size in (1, 2):
        with torch.no_grad():
            model([{"image": x["image"]} for x in make_inputs(cfg, *size, batch_size)])
    for hook in hooks:
        hook.remove()
    del model
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes += [torch.float16, torch.bfloat16]
    shapes = sorted({s for s in shapes if s[0]}, key=lambda s: (-torch.Size(s).numel(), s))
    return [
        _benchmark_group_norm(shape, dtype, residual, device, turns, runs)
        for shape, dtype, residual in itertools.product(shapes, dtypes, (False, True))
    ]


def _benchmark_group_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual: bool,
    device: torch.device,
    turns: int,
    runs: int,
) -> dict[str, Any]:
    torch.manual_seed(0)
    x, other, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    weight, bias = torch.randn(2, shape[1], device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, *([other] if residual else []))]

    def ours() -> Any:
        y = group_norm(x, 32, weight, bias, residual=other if residual else None, relu=True)
        return torch.autograd.grad(y, leaves, grad)

    def pytorch() -> Any:
        y = F.group_norm(x, 32, weight.to(dtype), bias.to(dtype))
        return torch.autograd.grad(F.relu_(y + other if residual else y), leaves, grad)

    source, target = x.detach(), torch.empty_like(grad)
    row = [
        Variant(name, run, keep_memory=True)
        for name, run in (
            ("ours", ours),
            ("pytorch", pytorch),
            ("copy", lambda: target.copy_(source)),
        )
    ]
    measure(row, device, turns, runs, memory=False)
    # Forward reads x and writes y, backward reads the gradient and x and writes that of x; the
    # residual is read once, the output with it, and its gradient written. A copy is two.
    passes = (5 + 3 * residual) / 2
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "residual": residual,
        "ours": row[0],
        "pytorch": row[1],
        "copy_s": row[2].median * passes,
    }


def benchmark_mapper(cfg: CfgNode, dataset: str, turns: int) -> dict[str, list[Variant]]:
    """
    Measure our mapper and Detectron2's over a dataset with one thread, for training and for test.
    """
    import cv2

    records = DatasetCatalog.get(dataset)
    with _one_thread():
        cv2.setNumThreads(1)
        measured = {}
        for is_train in (True, False):
            variants = []
            mappers = {
                "OpenCVDatasetMapper": OpenCVDatasetMapper(cfg, is_train),
                "DatasetMapper": DatasetMapper(cfg, is_train),
            }
            for name, mapper in mappers.items():

                def run(mapper: DatasetMapper = mapper) -> None:
                    for record in records:
                        mapper(record)

                variants.append(Variant(name, run))
            measure(variants, torch.device("cpu"), turns, memory=False)
            for variant in variants:
                variant.seconds = [s / len(records) for s in variant.seconds]
            measured["train" if is_train else "test"] = variants
        cv2.setNumThreads(-1)
    return measured


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
