"""The scripts, installed as the package gnws_tools. Scripts import it before Detectron2."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import warnings

# What Detectron2 and fvcore use of PyTorch that newer versions warn about.
for _message in ("`torch.jit.script` is deprecated", "torch.meshgrid: in an upcoming release"):
    warnings.filterwarnings("ignore", _message)
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: "is_fx_tracing" not in record.getMessage()
)

# As `gnws_d2.utils.process.end_with_parent`, which cannot be called before imports of some seconds.
if "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
