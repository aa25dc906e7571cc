"""What a run of ``train_net.py`` has left in its ``OUTPUT_DIR``."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from detectron2.config import CfgNode

from .. import model_zoo
from ..utils.errors import UserError
from .defaults import Trainer, load_config, results_json

# How Detectron2's log.txt starts its lines, without the year.
_TIME = re.compile(r"^\[(\d\d/\d\d \d\d:\d\d:\d\d)\] ", re.MULTILINE)
_START = re.compile(r"^\[[^]]+\] \S+ INFO: Rank of current process: ", re.MULTILINE)
# Rows of the table of Detectron2's collect_env, and what we write besides.
_CPU = r"INFO: gnws_d2 \S+ on (.+), started "
_VERSIONS = {
    "Python": r"^Python +(\S+)",
    "PyTorch": r"^PyTorch +(\S+)",
    "CUDA": r"^CUDA compiler +CUDA (\S+)",
    "torchvision": r"^torchvision +(\S+)",
    "Detectron2": r"^detectron2 +(\S+)",
    "gnws_d2": r"INFO: gnws_d2 (\S+) on ",
    "NumPy": r"^numpy +(\S+)",
    "OpenCV": r"^cv2 +(\S+)",
}


@dataclass
class Run:
    """A run; what was not recorded is empty."""

    path: str
    cfg: CfgNode  # with the batch size, the learning rate and the iterations of its processes
    metrics: list[dict[str, Any]]  # lines of metrics.json, by iteration
    facts: dict[str, str]  # what log.txt tells: name and value, for people
    published: dict[str, Any] | None  # the row of the model in model_zoo.table()

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))

    def results_json(self, dataset_name: str) -> str:
        """Where the last predictions on a dataset of ``DATASETS.TEST`` are, if there are any."""
        return results_json(self.path, self.cfg, dataset_name)


def read_run(path: str) -> Run:
    """
    Args:
        path: ``OUTPUT_DIR`` of a run, also if it has been moved, has not ended or has only
            evaluated.

    Raises:
        UserError: if it holds no run, or its config is not one of this project.
    """
    config_file = os.path.join(path, "config.yaml")
    if not os.path.isfile(config_file):
        raise UserError(f"{path} holds no run: {config_file} does not exist.")
    cfg = load_config(config_file, [])
    published = _published_row(cfg)
    facts, num_processes = _read_log(os.path.join(path, "log.txt"))
    if num_processes:
        cfg = Trainer.auto_scale_workers(cfg, num_processes)
    return Run(path, cfg, _read_metrics(os.path.join(path, "metrics.json")), facts, published)


def _published_row(cfg: CfgNode) -> dict[str, Any] | None:
    """The row of the published weights that a config takes, or of its model and schedule."""
    for row in model_zoo.table():
        if cfg.MODEL.WEIGHTS == model_zoo.get_checkpoint_url(row["name"]):
            return row
        if _recipe(cfg) == _recipe(model_zoo.get_config(row["name"])):
            return row
    return None


def _recipe(cfg: CfgNode) -> str:
    model = {k: v for k, v in cfg.MODEL.items() if k not in ("WEIGHTS", "DEVICE", "GNWS")}
    solver = [cfg.SOLVER[key] for key in ("IMS_PER_BATCH", "MAX_ITER", "STEPS")]
    return json.dumps([model, solver])  # in which tuples are lists, as in a config that was written


def _read_metrics(path: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if not os.path.isfile(path):
        return lines
    last = -1
    with open(path) as f:
        for text in f:
            try:
                line = json.loads(text)
            except ValueError:  # of a run that was killed while it wrote
                continue
            # The learning rate is of every iteration: where it goes back, a run has started again,
            # and what follows there is not of this run.
            if "lr" in line:
                if line["iteration"] <= last:
                    lines = [old for old in lines if old["iteration"] < line["iteration"]]
                last = line["iteration"]
            lines.append(line)
    return sorted(lines, key=lambda line: line["iteration"])


def _read_log(path: str) -> tuple[dict[str, str], int | None]:
    if not os.path.isfile(path):
        return {}, None
    with open(path, errors="replace") as f:
        text = f.read()
    jobs = _START.split(text)[1:]
    # What was resumed goes on, and what only evaluates is no part of a training.
    training = [job for job in jobs if "eval_only=True" not in job]
    of_run: list[str] = []
    for job in reversed(training or jobs[-1:]):
        of_run.insert(0, job)
        if "resume=True" not in job:
            break
    if not of_run:
        return {}, None
    last = of_run[-1]

    def first(pattern: str, text: str = last) -> str:
        match = re.search(pattern, text, re.MULTILINE)
        return match[1] if match else ""

    seconds = sum(map(_seconds, of_run))
    versions = {name: first(pattern) for name, pattern in _VERSIONS.items()}
    world_size = first(r"World size: (\d+)")
    facts = {
        "Config": first(r"config_file='([^']+)'"),
        "Started": first(r"INFO: gnws_d2 .*, started (.+)$", of_run[0]),
        "Duration": str(timedelta(seconds=seconds)) if seconds else "",
        "Starts": str(len(of_run)) if len(of_run) > 1 else "",
        "Processes": world_size,
        "Machine": ", ".join(filter(None, [*_gpus(last), first(_CPU)])),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }
    return facts, int(world_size) if world_size else None


def _seconds(job: str) -> int:
    # A leap year has every date; a negative time is one over the turn of the year.
    times = [datetime.strptime(f"2000/{t}", "%Y/%m/%d %H:%M:%S") for t in _TIME.findall(job)]
    return round((times[-1] - times[0]) / timedelta(seconds=1)) % (366 * 86400) if times else 0


def _gpus(job: str) -> Iterator[str]:
    for ids, name in re.findall(r"^GPU ([\d,]+) +(.+?)(?: \(arch=.*\))?$", job, re.MULTILINE):
        yield f"{len(ids.split(','))} x {name}"
