"""``run.json``: what a run was started with and what it has done."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import sys
from datetime import datetime
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..utils.files import atomic_write
from .hooks import BestCheckpointer, EarlyStop, EvalHook

_PACKAGES = (
    "torch", "torchvision", "detectron2", "gnws_d2", "numpy", "opencv-python", "triton"
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Return ``host``, ``cpu`` with PyTorch's threads, ``gpus``, ``cuda`` and ``versions``."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        names = (line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
        cpu = next(names, cpu)
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "host": socket.gethostname(),
        "cpu": f"{cpu}, {torch.get_num_threads()} threads",
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "versions": versions,
    }


class RunRecord(HookBase):
    """
    Write ``run.json``: a list with a dict for each time that the training was started or resumed:

    * ``command``, ``num_processes``, ``num_machines``;
    * ``machine``: :func:`describe_machine` of the main process;
    * ``start`` and ``end``: local times in ISO format; while it runs, ``end`` is the last update;
    * ``first_iteration``, and ``iterations``: the number of iterations that are done;
    * ``best_checkpoint`` and ``last_checkpoint``, the names of the run's own files, or "": an
      earlier run in the same directory may have left others;
    * ``evaluated``: the number of iterations before the last evaluation; 0 for none;
    * ``status``: "running", "finished", "stopped" (SIGTERM or Ctrl-C) or "failed"; a run that was
      killed stays "running".
    """

    _PERIOD = 20  # iterations between updates, as of Detectron2's PeriodicWriter

    def __init__(self, output_dir: str, evaluation: EvalHook, best: BestCheckpointer | None = None):
        self._path = os.path.join(output_dir, "run.json")
        self._evaluation, self._best = evaluation, best
        self._starts: list[dict[str, Any]] = []

    def before_train(self) -> None:
        first = self.trainer.start_iter
        if first > 0 and os.path.isfile(self._path):
            with open(self._path) as f:
                self._starts = json.load(f)
        before = self._starts[-1] if self._starts else {}
        nothing = {"best_checkpoint": "", "last_checkpoint": "", "evaluated": 0}
        self._starts.append(
            {
                "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
                "num_processes": comm.get_world_size(),
                "num_machines": comm.get_world_size() // comm.get_local_size(),
                "machine": describe_machine(),
                "start": _now(),
                "first_iteration": first,
                **{key: before.get(key, value) for key, value in nothing.items()},
            }
        )
        self._write("running", first)

    def after_step(self) -> None:
        known = self._starts[-1].items() >= self._files().items()
        if (self.trainer.iter + 1) % self._PERIOD == 0 or not known:
            self._write("running", self.trainer.iter + 1)

    def after_train(self) -> None:
        if not self._starts:  # a hook before this one has failed
            return
        error = sys.exc_info()[1]
        stopped, early = isinstance(error, SystemExit), isinstance(error, EarlyStop)
        status = "stopped" if stopped else "failed" if error and not early else "finished"
        # Both end the training before Detectron2 counts the last iteration.
        self._write(status, min(self.trainer.iter + (stopped or early), self.trainer.max_iter))

    def _files(self) -> dict[str, Any]:
        files: dict[str, Any] = {}
        if self.trainer.checkpointer.last_saved:
            files["last_checkpoint"] = self.trainer.checkpointer.last_saved
        if self._best is not None and self._best.best_iter is not None:
            files["best_checkpoint"] = "model_best.pth"
        if self._evaluation.done:
            files["evaluated"] = self._evaluation.done
        return files

    def _write(self, status: str, iterations: int) -> None:
        now = {"end": _now(), "iterations": iterations, "status": status}
        self._starts[-1] |= now | self._files()
        with atomic_write(self._path) as f:
            json.dump(self._starts, f, indent=1)


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
