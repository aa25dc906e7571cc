"""The launch of Triton kernels, by Triton and directly, with compiled kernels made up here."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gnws_d2.layers.kernels import launch
from gnws_d2.layers.kernels import weight_standardization as ws


class FakeCompiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launched = []

    def run(self, *args):
        self.launched.append(args)

    def launch_metadata(self, *args):
        return None


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """Nothing is compiled yet, and a GPU is made up."""
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_DIRECT", True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: "stream", raising=False)


@pytest.fixture
def kernel():
    """A kernel that records how it is launched: by Triton, or directly."""
    kernel = SimpleNamespace(by_triton=[], compiled=[])

    def compile_and_run(*args, **options):
        kernel.by_triton.append(args)
        kernel.compiled.append(FakeCompiled())
        return kernel.compiled[-1]

    jit = {(3, 2): compile_and_run}
    kernel.launch = lambda *args: launch.launch(jit, (3, 2), *args)
    return kernel


@pytest.mark.parametrize(
    "version, direct",
    [
        *((v, True) for v in ("3.6.0", "3.9.0", "3.9.0+git1a2b3c4d")),
        *((v, False) for v in ("3.5.1", "3.10.0", "3.10rc1", "4.0.0")),
    ],
)
def test_versions_that_were_read(version, direct):
    assert launch.can_launch_directly(version) is direct


def test_kernels_are_launched_directly_only_if_compiled_for_the_arguments(kernel):
    """For their types, constants, number of warps, and addresses that are multiples of 16."""
    x = torch.zeros(32)
    for tensor, constant, num_warps in (
        (x, True, 4), (x[1:], True, 4), (x[1:], True, 4), (x, False, 4), (x.half(), True, 4),
        (x, True, 8),
    ):  # fmt: skip
        kernel.launch((tensor,), (5,), (constant,), num_warps)
    assert len(kernel.by_triton) == 6
    assert all(compiled.launched == [] for compiled in kernel.compiled)
    kernel.launch((x,), (6,), (True,), 4)
    assert len(kernel.by_triton) == 6 and len(kernel.compiled[0].launched) == 1


@pytest.mark.skipif(
    not launch.can_launch_directly(triton.__version__), reason="Triton launches each time"
)
def test_direct_launch_passes_what_triton_passes(monkeypatch):
    """Triton's own JITFunction.run, on a GPU and with a compiled kernel that are made up."""
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: "stream",
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", gpu)
    compiled = FakeCompiled()
    kernel = JITFunction(ws._standardize_kernel.fn, do_not_specialize=["size", "correction"])
    monkeypatch.setattr(kernel, "_do_compile", lambda *args: compiled)
    tensors = (torch.zeros(8, 16), torch.zeros(8, 16), torch.zeros(8))
    for _ in range(2):
        launch.launch(kernel, (8, 1), tensors, (16, 1, 1e-5), (16,), 1)
    by_triton, directly = compiled.launched
    assert directly[:6] == by_triton[:6] == (8, 1, 1, "stream", "function", "metadata")
    assert directly[6:9] == (None, None, None)  # launch_metadata and the hooks of profilers
    addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in by_triton[9:]]
    assert list(directly[9:]) == addresses
