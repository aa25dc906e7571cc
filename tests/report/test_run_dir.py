"""Files are written as by Detectron2's writers and by ``engine/run_record.py``."""

import json

import pytest
from conftest import ROOT
from detectron2.config import get_cfg

from gnws_d2.config import load_config
from gnws_d2.report.run_dir import read_run
from gnws_d2.utils.errors import UserError

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
RESUMED = {"resume": True, "first_iteration": 20, "iterations": 40, "status": "finished"}


def metrics(first, last, ap=None):
    lines = [
        {"iteration": i, "lr": 0.02, "total_loss": 2 / (i + 1)} for i in range(first, last, 20)
    ]
    return lines + ([{"iteration": last, "bbox/AP": ap}] if ap else [])


@pytest.fixture
def read(tmp_path):
    def read(*opts, config="quick_start", lines=None, starts=None):
        cfg = load_config(str(ROOT / "configs" / f"{config}.yaml"), [*opts])
        (tmp_path / "config.yaml").write_text(cfg.dump())
        if lines is not None:
            text = "".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in lines)
            (tmp_path / "metrics.json").write_text(text)
        if starts is not None:
            text = starts if isinstance(starts, str) else json.dumps(starts)
            (tmp_path / "run.json").write_text(text)
        return read_run(str(tmp_path))

    return read


def test_repeated_iterations_count_once(read):
    """A resumed run repeats some; a run that started anew has none of the run before."""
    run = read(lines=metrics(19, 200, ap=10.0) + metrics(139, 180) + metrics(19, 60, ap=30.0))
    assert [line["iteration"] for line in run.metrics] == [19, 39, 59, 60]
    run = read(lines=metrics(19, 200, ap=10.0) + metrics(139, 180))
    assert [line["iteration"] for line in run.metrics] == list(range(19, 180, 20))
    assert run.num_iterations == 180
    # Detectron2 writes an evaluation with the next 20 iterations, after their line.
    run = read(lines=[*metrics(19, 60), {"iteration": 49, "bbox/AP": 7.0}, *metrics(79, 80)])
    assert [line["iteration"] for line in run.metrics] == [19, 39, 49, 59, 79]


def test_damaged_lines_of_metrics_are_left_out(read, tmp_path):
    lines = metrics(19, 40)
    run = read(lines=[lines[0], "[1]", "3", "{}", "null", '{"iteration": null}', "\0\0", lines[1]])
    with open(tmp_path / "metrics.json", "ab") as f:
        f.write(b'\xff\xfe\n{"iteration": 59, "lr')  # killed while it wrote
    assert run.metrics == read_run(str(tmp_path)).metrics == lines


def test_facts_cover_all_starts(read):
    assert read(starts=[START, {**START, **RESUMED}]).facts == {
        "Command": "train_net.py --config-file a.yaml",
        "Started": "2026-12-31 23:59:00",
        "Duration": "0:04:56",  # two starts of 2 min 28 s
        "Status": "finished",
        "Processes": "2",
        "Machines": "1",
        "Machine": "node7, 2 x NVIDIA H200, AMD EPYC, 16 threads",
        "Versions": "python 3.11.7, torch 2.15.0, gnws_d2 0.1.0",
    }
    machine = {**START["machine"], "gpus": []}
    facts = read(starts=[{**START, "machine": machine, "status": "running"}]).facts
    assert facts["Machine"] == "node7, AMD EPYC, 16 threads"
    assert facts["Status"] == "running, or killed"


def test_run_of_stock_detectron2_is_read(tmp_path):
    """It has none of our keys and no run.json; --eval-only leaves no metrics.json either."""
    (tmp_path / "config.yaml").write_text(get_cfg().dump())
    run = read_run(str(tmp_path))
    assert run.facts == {} and run.metrics == [] and run.num_iterations == 0


@pytest.mark.parametrize(
    "starts", ["[{", "[]", "3", [3], [START["machine"]], [{**START, "start": "now"}]]
)
def test_damaged_record_is_one_sentence(read, starts):
    with pytest.raises(UserError, match=r"run\.json is damaged .*: remove it"):
        read(starts=starts)


def test_iterations_are_scaled_to_the_number_of_processes(read):
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.IMS_PER_BATCH", "8"]
    run = read(*keys, "SOLVER.MAX_ITER", "60", starts=[START])
    assert run.cfg.SOLVER.MAX_ITER == 120 and run.cfg.SOLVER.IMS_PER_BATCH == 4
