"""Read the files of a run from its ``OUTPUT_DIR``."""

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
    is_evaluated: bool  # else predictions in the directory are from an earlier run

    @property
    def num_iterations(self) -> int:
        """The number of training iterations that were done."""
        return max((line["iteration"] + 1 for line in self.metrics if "lr" in line), default=0)


def read_run(path: str, datasets: Sequence[Sequence[str]] = ()) -> Run:
    """
    Read the run in `path`, an ``OUTPUT_DIR``, which may have been moved, be unfinished or only
    evaluated. For `datasets` see :func:`load_config`. Raise :class:`UserError` if there is no run,
    or if its files cannot be read.
    """
    config_file = os.path.join(path, "config.yaml")
    if not os.path.isfile(config_file):
        raise UserError(f"{path} is not the OUTPUT_DIR of a run: {config_file} does not exist.")
    run = Run(path, load_config(config_file, [], datasets), [], {}, is_evaluated=True)
    run.metrics = _read_metrics(os.path.join(path, "metrics.json"))
    record = os.path.join(path, "run.json")
    if os.path.isfile(record):
        try:
            starts = json.loads(Path(record).read_text())
            run.facts = _describe(starts)
            run.is_evaluated = bool(starts[-1].get("evaluated", True))
            num_processes = int(starts[-1]["num_processes"])
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            raise UserError(
                f"{record} is damaged ({type(e).__name__}: {e}): remove it to get a page without "
                "its contents."
            ) from e
        run.cfg = DefaultTrainer.auto_scale_workers(run.cfg, num_processes)
    return run


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
        # An iteration with a learning rate that is not after the last one: the run was started
        # again, and repeats what follows.
        if "lr" in line:
            if iteration <= last:
                lines = [old for old in lines if old["iteration"] < iteration]
            last = iteration
        lines.append(line)
    return sorted(lines, key=lambda line: line["iteration"])


def _describe(starts: list[dict[str, Any]]) -> dict[str, str]:
    last, machine = starts[-1], starts[-1]["machine"]
    times = [[datetime.fromisoformat(s[key]) for key in ("start", "end")] for s in starts]
    gpus = (f"{number} x {gpu}" for gpu, number in Counter(machine["gpus"]).items())
    return {
        "Command": last["command"],
        "Started": str(times[0][0]),
        "Duration": str(sum((end - start for start, end in times), timedelta())),
        "Status": "running, or killed" if last["status"] == "running" else last["status"],
        "Processes": str(last["num_processes"]),
        "Machines": str(last["num_machines"]),
        "Machine": ", ".join([machine["host"], *gpus, machine["cpu"]]),
        "Versions": ", ".join(f"{name} {v}" for name, v in machine["versions"].items()),
    }
