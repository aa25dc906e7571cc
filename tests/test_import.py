"""`import gnws_d2` is light: what a predictor needs, and nothing registered with PyTorch."""

import subprocess
import sys

import pytest
from conftest import small_mask_rcnn

# Each in a process of its own, in turns; the least time counts.
CODE = """
import sys, time
start = time.perf_counter()
import detectron2.engine, detectron2.modeling
{more}
print(time.perf_counter() - start)
"""
CHECK = """
import sys
import torch.distributed.rendezvous, torch.optim.optimizer
handlers = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers
hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
before = dict(handlers), dict(hooks)
import gnws_d2
assert (handlers, hooks) == before
gnws_d2.Predictor
for name in ("jinja2", "wandb", "onnx", "onnxruntime", "huggingface_hub", "safetensors"):
    assert name not in sys.modules, name
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("gnws_d2.")}
assert rooms.isdisjoint({"engine", "finetuning", "report", "export"}), rooms
"""


NO_KERNELS = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
import torch
import detectron2.engine, detectron2.modeling  # torchvision imports some of Triton
before = set(sys.modules)
import gnws_d2.engine
from gnws_d2.layers import GroupNorm, WSConv2d
conv = WSConv2d(3, 64, 3, norm=GroupNorm(32, 64))
conv(torch.ones(1, 3, 8, 8)).sum().backward()
print(*sorted(m for m in set(sys.modules) - before if "triton" in m or ".kernels." in m))
"""

# Without what Python lacks on Windows. Detectron2 and its dependencies are imported before.
ON_WINDOWS = """
import os, signal, sys
import detectron2.checkpoint, detectron2.engine, detectron2.modeling
import numpy as np
import torch
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for module, names in (
    (signal, "SIGKILL SIGHUP SIGALRM pthread_sigmask sigwaitinfo SIG_BLOCK SIG_SETMASK"),
    (os, "fork register_at_fork sched_getaffinity killpg getpgid geteuid getuid uname"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
import gnws_d2
predictor = gnws_d2.Predictor.from_pretrained(sys.argv[1])
print(predictor(np.zeros((64, 64, 3), np.uint8))["instances"].image_size)
gnws_d2.checkpoint.GNWSCheckpointer(predictor.model, sys.argv[1]).save("again")
"""


def run(code, *args):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *args], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kernel" not in done.stderr.lower() and "triton" not in done.stderr.lower()
    return done.stdout


def test_import_loads_only_what_a_predictor_needs_and_registers_nothing_with_pytorch():
    run(CHECK)


def test_finetune_is_imported_when_it_is_used():
    import gnws_d2
    from gnws_d2.finetuning import finetune

    assert gnws_d2.finetune is finetune
    with pytest.raises(AttributeError, match="'gnws_d2' has no attribute 'fine_tune'"):
        _ = gnws_d2.fine_tune


def test_model_on_a_cpu_imports_no_triton_and_logs_nothing_about_kernels():
    choice = [f"gnws_d2.layers.kernels.{name}" for name in ("check", "choice")]
    assert run(NO_KERNELS).split() == choice


def test_predictor_works_without_what_windows_lacks(tmp_path):
    cfg = small_mask_rcnn(tmp_path / "model_final.pth", ["fig"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert run(ON_WINDOWS, str(tmp_path)).split() == ["(64,", "64)"]
    assert (tmp_path / "again.pth").is_file()


@pytest.mark.ci
def test_import_takes_at_most_a_tenth_longer_than_importing_detectron2():
    times = [
        [float(run(CODE.format(more=more))) for more in ("", "import gnws_d2")] for _ in range(3)
    ]
    detectron2, both = (min(column) for column in zip(*times))
    assert both <= 1.1 * detectron2
