"""Read the files that a run of ``train_net.py`` has left in its ``OUTPUT_DIR``."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config import load_config
from ..utils.errors import UserError


@dataclass
class Run:
    """A run; what was not recorded is empty."""

    path: str
    cfg: CfgNode  # scaled to the number of processes
    metrics: list[dict[str, Any]]  # the lines of metrics.json, by iteration
    facts: dict[str, str]  # the contents of run.json, for people
    is_evaluated: bool  # else predictions in the directory are of an earlier run

    @property
    def num_iterations(self) -> int:
        """The number of training iterations that were done."""
        return max((line["iteration"] + 1 for line in self.metrics if "lr" in line), default=0)


def read_run(path: str, datasets: Sequence[Sequence[str]] = ()) -> Run:
    """
    Args:
        path: ``OUTPUT_DIR`` of a run, which may have been moved, not have ended or only evaluated.
        datasets: see :func:`load_config`.

    Raises:
        UserError: if it holds no run, or its files cannot be read.
    """
    config_file = os.path.join(path, "config.yaml")
    if not os.path.isfile(config_file):
        raise UserError(f"{path} holds no run: {config_file} does not exist.")
    cfg = load_config(config_file, [], datasets)
    metrics = _read_metrics(os.path.join(path, "metrics.json"))
    facts, num_processes, is_evaluated = _read_record(os.path.join(path, "run.json"))
    if num_processes:
        cfg = DefaultTrainer.auto_scale_workers(cfg, num_processes)
    return Run(path, cfg, metrics, facts, is_evaluated)


def _read_metrics(path: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if not os.path.isfile(path):
        return lines
    last = -1
    for text in Path(path).read_bytes().splitlines():
        try:
            line = json.loads(text)
            iteration = int(line["iteration"])
        except (ValueError, TypeError, KeyError):  # half a line, if the run was killed
            continue
        # A line with a learning rate that goes back means that the run was started again, from a
        # checkpoint or anew: later lines from before are not part of it.
        if "lr" in line:
            if iteration <= last:
                lines = [old for old in lines if old["iteration"] < iteration]
            last = iteration
        lines.append(line)
    return sorted(lines, key=lambda line: line["iteration"])


def _read_record(path: str) -> tuple[dict[str, str], int | None, bool]:
    """The facts in ``run.json``, for people, the number of processes, and whether it evaluated."""
    if not os.path.isfile(path):
        return {}, None, True
    try:
        starts = json.loads(Path(path).read_text())
        last, machine = starts[-1], starts[-1]["machine"]
        times = [[datetime.fromisoformat(s[key]) for key in ("start", "end")] for s in starts]
        status, num_machines = last["status"], last["num_machines"]
        versions = machine["versions"] | ({"CUDA": machine["cuda"]} if machine["cuda"] else {})
        gpus = (f"{number} x {gpu}" for gpu, number in Counter(machine["gpus"]).items())
        facts = {
            "Command": last["command"],
            "Started": str(times[0][0]),
            "Duration": str(sum((end - start for start, end in times), timedelta())),
            "Starts": str(len(starts)) if len(starts) > 1 else "",
            "Status": "running, or killed" if status == "running" else status,
            "Processes": str(last["num_processes"]),
            "Machines": str(num_machines) if num_machines > 1 else "",
            "Machine": ", ".join([machine["host"], *gpus, machine["cpu"]]),
            "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
        facts = {k: v for k, v in facts.items() if v}
        return facts, int(last["num_processes"]), bool(last.get("evaluated", True))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        raise UserError(
            f"{path} is damaged ({type(e).__name__}: {e}): remove it to get a page without it."
        ) from e
