import os
import resource
import subprocess
import sys

import pytest

from gnws_d2.utils.process import num_usable_cores

FAULTS = """
import resource, sys, torch
from gnws_d2.utils.process import keep_freed_memory
if sys.argv[1] == "True":
    keep_freed_memory()
faults = []
for i in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20 // 4)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))  # the system may take pages back at any time
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for glibc")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_or_given_back(keep):
    """A page that the system has to give faults once."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environ["THP_MEM_ALLOC_ENABLE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(keep)], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = 64 * 2**20 // resource.getpagesize()
    # Where the system gives large pages, a fault may give 2 MiB.
    assert int(done.stdout) < 10 if keep else int(done.stdout) >= pages // 512


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="for Linux")
def test_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert num_usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert num_usable_cores() == len(allowed)
