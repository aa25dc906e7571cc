"""The files of a run, as Detectron2's writers and ``engine/run_record.py`` leave them."""

import json

from gnws_d2.config import load_config

START = {
    "command": "train_net.py --config-file a.yaml",
    "num_processes": 2,
    "num_machines": 1,
    "machine": {
        "host": "node7",
        "cpu": "AMD EPYC, 16 threads",
        "gpus": ["NVIDIA H200", "NVIDIA H200"],
        "cuda": "13.2",
        "versions": {"python": "3.11.7", "torch": "2.15.0", "gnws_d2": "0.1.0"},
    },
    "start": "2026-12-31T23:59:00",
    "end": "2027-01-01T00:01:28",
    "first_iteration": 0,
    "iterations": 20,
    "status": "stopped",
}


def metrics(first, last, ap=None):
    """Lines of metrics.json, with an evaluation after the last of them."""
    other = {"lr": 0.02, "validation/loss_cls": 1.5, "time": 0.5}
    lines = [
        {"iteration": i, "total_loss": 2 / (i + 1), "loss_cls": 1 / (i + 1)} | other
        for i in range(first, last, 20)
    ]
    return lines + ([{"iteration": last, "bbox/AP": ap, "segm/AP": ap - 1}] if ap else [])


def write_run(path, *opts, lines=None, starts=None, datasets=()):
    """Write OUTPUT_DIR of a quick start, with lines of metrics and starts, or text for them."""

    def dump(value):
        return value if isinstance(value, str) else json.dumps(value)

    path.mkdir(parents=True, exist_ok=True)
    cfg = load_config("quick_start", [*opts], datasets)
    (path / "config.yaml").write_text(cfg.dump())
    if lines is not None:
        (path / "metrics.json").write_text("".join(f"{dump(line)}\n" for line in lines))
    if starts is not None:
        (path / "run.json").write_text(dump(starts))
    return cfg
