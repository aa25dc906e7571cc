import os
import subprocess
import sys

import pytest
from conftest import ROOT

from gnws_tools import kernel_resources


@pytest.mark.ci
def test_no_kernel_spills_registers(tmp_path):
    """In the type that takes the most registers."""
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environ.pop("TRITON_INTERPRET", None)
    script = [sys.executable, str(ROOT / "tools" / "kernel_resources.py")]
    done = subprocess.run(
        [*script, "--precisions", "float32"], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    resources, roofline = done.stdout.split("\n\n")
    _, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in resources.splitlines()]
    assert len(rows) == 16 and {row[5] for row in rows} == {"0"}
    assert sum(int(row[3]) for row in rows) > 200
    # 1 x 64 x 400 x 672 in float16 is 34.4 MB, read twice and written once.
    assert "103.2" in roofline.splitlines()[2]


def test_occupancy_is_that_of_cudas_formula():
    """By hand: 8 warps with 64 registers a thread are 16384 of 65536 registers: 4 blocks."""
    assert kernel_resources.occupancy(64, 0, 8, 80) == 4
    assert kernel_resources.occupancy(65, 0, 8, 80) == 3  # registers are given in units of 8
    assert kernel_resources.occupancy(16, 0, 1, 80) == 32  # blocks
    assert kernel_resources.occupancy(16, 0, 8, 80) == 8  # warps
    assert kernel_resources.occupancy(16, 60 * 1024, 4, 80) == 2  # shared memory: 164 KiB
    assert kernel_resources.occupancy(16, 60 * 1024, 4, 90) == 3  # 228 KiB
