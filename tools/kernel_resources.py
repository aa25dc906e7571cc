#!/usr/bin/env python3
"""
Compile the Triton kernels for GPUs without having one, and print in Markdown what ptxas says of
their registers, spills and shared memory, and how many of their blocks a multiprocessor holds; then
the bytes that the kernels of GroupNorm move, and the time that the bandwidth of two GPUs allows.
"""

import argparse
import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import gnws_tools  # noqa: F401  (before Detectron2, whose warnings it filters)

# isort: split
import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from gnws_d2.layers.kernels import group_norm as gn
from gnws_d2.layers.kernels import weight_standardization as ws
from gnws_tools.benchmark_gpu import model_shapes

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# By compute capability: registers and bytes of shared memory of a multiprocessor, CUDA's
# programming guide, table "Technical Specifications per Compute Capability".
LIMITS = {80: (65536, 164 * 1024), 90: (65536, 228 * 1024)}
MAX_WARPS, MAX_BLOCKS = 64, 32
# Bytes a second, by NVIDIA's data sheets of the SXM versions: A100 80GB (2021), H100 (2023).
BANDWIDTHS = {"A100": 2.039e12, "H100": 3.35e12}
# Pointers to tensors of the dtype of the input; the others are float32.
OF_INPUT = {"x_ptr", "residual_ptr", "y_ptr", "grad_y_ptr", "grad_x_ptr", "grad_residual_ptr"}
# (RESIDUAL, RELU): of the last convolution of a block, of most others, and of shortcuts and FPN.
FUSED = [(True, True), (False, True), (False, False)]


class Variant(NamedTuple):
    """A kernel with its constants, in the order of its arguments, and its number of warps."""

    kernel: Any
    constants: tuple[int | bool, ...]
    warps: int


class Resources(NamedTuple):
    """Registers of a thread, bytes spilled to memory, bytes of shared memory; blocks and warps."""

    registers: int
    spilled: int
    shared: int
    blocks: int
    warps: int


def variants(fused: list[tuple[bool, bool]] = FUSED) -> list[Variant]:
    """All variants that the shapes of Mask R-CNN at 800 x 1344 need, batch size 1."""
    found: dict[Variant, None] = {}
    for n, c, h, w in model_shapes(1, 800, 1344):
        d = c // 32
        tile, block_s, _, warps = gn._plan(n, c, h * w, d)
        for residual, relu in fused:
            constants = (*tile, block_s, d, residual, relu)
            found[Variant(gn._normalize_kernel, constants, warps)] = None
            found[Variant(gn._grad_input_kernel, constants, warps)] = None
            if block_s:
                found[Variant(gn._moments_kernel, tile, warps)] = None
                found[Variant(gn._grad_sums_kernel, (*tile, residual, relu), warps)] = None
    for size in (64, 147, 288, 576, 1152, 2048, 2304, 4608, 12544):
        _, block, warps = ws._launch_options(torch.empty(1, size))
        found[Variant(ws._standardize_kernel, (block,), warps)] = None
        found[Variant(ws._grad_kernel, (block,), warps)] = None
    return list(found)


def compile_variant(variant: Variant, dtype: str, capability: int) -> Resources:
    """Compile a variant, and return what ptxas reports."""
    names = variant.kernel.arg_names
    constants = dict(zip(names[-len(variant.constants) :], variant.constants))
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name.endswith("_ptr"):
            signature[name] = f"*{DTYPES[dtype] if name in OF_INPUT else 'fp32'}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if name in constants:
            signature[name] = "constexpr"
    source = ASTSource(variant.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(
        source, target, options={"num_warps": variant.warps, "enable_fp_fusion": True}
    )
    registers, spilled = _assemble(compiled.asm["ptx"], capability)
    shared = compiled.metadata.shared
    blocks = occupancy(registers, shared, variant.warps, capability)
    return Resources(registers, spilled, shared, blocks, blocks * variant.warps)


def occupancy(registers: int, shared: int, warps: int, capability: int) -> int:
    """The number of blocks that a multiprocessor holds, as CUDA's occupancy calculator has it."""
    limit, shared_limit = LIMITS[capability]
    of_warp = -(-registers // 8) * 8 * 32  # registers are given in units of 8
    by_shared = shared_limit // (shared + 1024)  # of which the system keeps 1024
    return min(limit // (of_warp * warps), MAX_WARPS // warps, MAX_BLOCKS, by_shared)


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread and bytes that are spilled, by the assembler that Triton uses."""
    with tempfile.TemporaryDirectory() as directory:
        source, output = (os.path.join(directory, name) for name in ("kernel.ptx", "kernel.cubin"))
        with open(source, "w") as f:
            f.write(ptx)
        arch = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", arch, source]
        report = subprocess.run(
            [*command, "-o", output], capture_output=True, text=True, check=True
        ).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return int(re.findall(r"Used (\d+) registers", report)[0]), spilled


def format_table(dtypes: list[str], capabilities: list[int]) -> str:
    """Compile all variants. Return a Markdown table, ranges over the variants of each kernel."""
    groups: dict[tuple[str, str], list[Variant]] = {}
    for variant in variants():
        name, constants = variant.kernel.__name__.strip("_"), variant.constants
        is_whole = len(constants) == 7 and constants[3] == 0  # BLOCK_S
        of_weights = len(constants) == 1
        tiles = "filters" if of_weights else "whole groups" if is_whole else "split groups"
        groups.setdefault((name.removesuffix("_kernel"), tiles), []).append(variant)
    rows = []
    for key, of_kernel in groups.items():
        for capability in capabilities:
            found = [compile_variant(v, dtype, capability) for v in of_kernel for dtype in dtypes]
            ranges = [(min(values), max(values)) for values in zip(*found)]
            row = [*key, f"{capability / 10}", str(len(found))]
            rows.append(row + [f"{a} - {b}" if a < b else str(a) for a, b in ranges])
    header = ["kernel", "tiles of", "capability", "variants", "registers", "bytes spilled"]
    header += ["bytes of shared memory", "blocks on a multiprocessor", "warps (of 64)"]
    return tabulate(rows, header, "github", disable_numparse=True)


def format_roofline() -> str:
    """Return a Markdown table of GroupNorm + ReLU, batch size 1, float16, computed."""
    rows = []
    for n, c, h, w in model_shapes(1, 800, 1344):
        _, block_s, _, _ = gn._plan(n, c, h * w, c // 32)
        megabytes = 2 * n * c * h * w / 1e6
        row = [f"{n} x {c} x {h} x {w}"]
        # Passes over the map: forward reads x, twice if groups are split, and writes y; backward
        # reads x and the gradient, both twice if split, and writes a gradient.
        for passes in (3, 5) if block_s else (2, 3):
            moved = passes * megabytes
            times = [f"{moved * 1e12 / bandwidth:.1f}" for bandwidth in BANDWIDTHS.values()]
            row += [f"{moved:.1f}", *times]
        rows.append(row)
    of_pass = [f"{name}, us" for name in BANDWIDTHS]
    header = ["shape", "forward, MB", *of_pass, "backward, MB", *of_pass]
    return tabulate(rows, header, "github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    print(format_table(args.precisions, list(LIMITS)))
    print(f"\n{format_roofline()}")


if __name__ == "__main__":
    main()
