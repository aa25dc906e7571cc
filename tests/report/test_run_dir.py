"""What is read from the files of a run, whole or damaged."""

import pytest
from detectron2.config import get_cfg
from runs import START, metrics, write_run

from gnws_d2.report.run_dir import read_run
from gnws_d2.utils.errors import UserError

RESUMED = {"resume": True, "first_iteration": 20, "iterations": 40, "status": "finished"}


@pytest.fixture
def read(tmp_path):
    def read(*opts, **files):
        write_run(tmp_path, *opts, **files)
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
