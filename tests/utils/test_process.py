import os
import resource
import sys

import pytest
from conftest import run_python, small_mask_rcnn

from gnws_d2.utils.process import num_usable_cores

FAULTS = """
import resource, sys, torch
import gnws_d2
from gnws_d2.utils.process import keep_freed_memory
if sys.argv[1] == "call":
    keep_freed_memory()
elif sys.argv[1] != "nothing":
    opts = ["MODEL.GNWS.KERNELS", sys.argv[1], "MODEL.DEVICE", "cpu"]
    gnws_d2.Predictor.from_pretrained(sys.argv[2], opts)
faults = []
for i in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20 // 4)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))  # the system may take pages back at any time
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for glibc")
@pytest.mark.parametrize(
    "what, keep", [("call", True), ("nothing", False), ("auto", True), ("reference", False)]
)
def test_freed_memory_is_kept_or_given_back(tmp_path, monkeypatch, what, keep):
    """By a call, or by a Predictor on a CPU. Each page that the system hands out faults once."""
    cfg = small_mask_rcnn(tmp_path / "model_final.pth", ["circle", "square", "triangle"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for name in os.environ:
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)
    faults = int(run_python("-c", FAULTS, what, tmp_path, THP_MEM_ALLOC_ENABLE="0"))
    pages = 64 * 2**20 // resource.getpagesize()
    # Where the system hands out large pages, a fault may stand for 2 MiB.
    assert faults < 10 if keep else faults >= pages // 512


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="for Linux")
def test_usable_cores_are_those_of_the_affinity_mask():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert num_usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert num_usable_cores() == len(allowed)
