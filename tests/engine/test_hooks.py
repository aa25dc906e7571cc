import json
import os
import signal

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import TrainerBase
from detectron2.utils.events import get_event_storage
from torch import nn

from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.data import register_coco_datasets
from gnws_d2.engine import load_config
from gnws_d2.engine.hooks import (
    BestCheckpointer,
    DrawPredictions,
    PeriodicCheckpointer,
    StopOnSignal,
    WandbRun,
)


class Trainer(TrainerBase):
    """Does in each iteration what it is told, and has no data."""

    def __init__(self, output_dir, hooks, do=lambda iteration: None):
        super().__init__()
        self.do = do
        self.checkpointer = GNWSCheckpointer(nn.Linear(1, 1), str(output_dir), trainer=self)
        self.register_hooks([make(self.checkpointer) for make in hooks])

    def run_step(self):
        self.do(self.iter)

    def resume(self):
        path = self.checkpointer.get_checkpoint_file()
        self.load_state_dict(torch.load(path)["trainer"])
        return self.iter + 1


def names(output_dir):
    return sorted(path.stem for path in output_dir.glob("*.pth"))


def test_newest_checkpoints_are_kept_and_those_from_before_a_resume_count(tmp_path):
    hooks = [lambda checkpointer: PeriodicCheckpointer(checkpointer, 2, keep=2)]
    Trainer(tmp_path, hooks).train(0, 7)
    assert names(tmp_path) == ["model_0000003", "model_0000005", "model_final"]
    for name in ("model_0000006", "model_0000090", "model_best", "model_0000004x"):
        (tmp_path / f"{name}.pth").write_bytes(b"")
    Trainer(tmp_path, hooks).train(7, 10)
    # 90 is newer than this run has come.
    assert names(tmp_path) == [
        "model_0000004x", "model_0000007", "model_0000009", "model_0000090", "model_best",
        "model_final",
    ]  # fmt: skip


def test_all_checkpoints_are_kept_by_default(tmp_path):
    Trainer(tmp_path, [lambda c: PeriodicCheckpointer(c, 2, keep=0)]).train(0, 6)
    assert names(tmp_path) == ["model_0000001", "model_0000003", "model_0000005", "model_final"]


def test_best_checkpoint_is_of_the_best_ap_also_after_a_resume(tmp_path):
    aps = [10.0, 30.0, float("nan"), 20.0, 25.0, 31.0, 5.0]

    def evaluate(iteration):
        get_event_storage().put_scalar("bbox/AP", aps[iteration])

    hooks = [
        lambda checkpointer: PeriodicCheckpointer(checkpointer, 1, keep=1),
        lambda checkpointer: BestCheckpointer(1, checkpointer, "bbox/AP"),
    ]

    def best():
        return torch.load(tmp_path / "model_best.pth")["iteration"]

    Trainer(tmp_path, hooks, evaluate).train(0, 4)
    assert best() == 1
    trainer = Trainer(tmp_path, hooks, evaluate)
    trainer.train(trainer.resume(), 5)
    assert best() == 1
    trainer = Trainer(tmp_path, hooks, evaluate)
    trainer.train(trainer.resume(), 7)
    assert best() == 5 and names(tmp_path) == ["model_0000006", "model_best", "model_final"]


@pytest.mark.parametrize("period", [1, 100])
def test_sigterm_ends_with_a_checkpoint_after_the_iteration(tmp_path, period, caplog):
    done = []

    def do(iteration):
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(iteration)

    hooks = [lambda c: PeriodicCheckpointer(c, period, keep=0), StopOnSignal]
    with pytest.raises(SystemExit) as e:
        Trainer(tmp_path, hooks, do).train(0, 10)
    assert e.value.code == 143 and done == [0, 1, 2, 3]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert Trainer(tmp_path, hooks).resume() == 4
    assert "Stopped by SIGTERM after iteration 3" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_during_an_evaluation_ends_at_once(tmp_path):
    class Evaluation(BestCheckpointer):
        def after_step(self):
            if self.trainer.iter == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("The evaluation went on.")

    hooks = [StopOnSignal, lambda checkpointer: Evaluation(1, checkpointer, "bbox/AP")]
    with pytest.raises(SystemExit) as e:
        Trainer(tmp_path, hooks).train(0, 10)
    assert e.value.code == 143
    assert Trainer(tmp_path, hooks).resume() == 4


@pytest.fixture
def pictures(photographs, tmp_path, monkeypatch):
    """What is drawn of some results: {iteration: {name: (3, H, W) picture}}."""
    register_coco_datasets([["fruits_drawn", str(photographs.json_file), str(photographs.images)]])
    path = tmp_path / "coco_instances_results.json"

    def pictures(results, iterations=1, period=0):
        if results is not None:
            path.write_text(json.dumps(results))
        drawn = {}
        hook = DrawPredictions(period, "fruits_drawn", str(path))
        trainer = Trainer(tmp_path, [lambda _: hook])
        monkeypatch.setattr(
            "detectron2.utils.events.EventStorage.put_image",
            lambda storage, name, image: drawn.setdefault(storage.iter, {}).update({name: image}),
        )
        trainer.train(0, iterations)
        return drawn

    return pictures


def test_pictures_show_the_truth_on_the_left_and_what_is_likely_on_the_right(pictures):
    record = DatasetCatalog.get("fruits_drawn")[0]
    result = {"image_id": record["image_id"], "category_id": 1, "bbox": [50, 50, 90, 90]}
    (nothing,), (unlikely,), (likely,) = (
        pictures(results).values()
        for results in ([], [{**result, "score": 0.49}], [{**result, "score": 0.5}])
    )
    assert len(nothing) == 4
    name = f"fruits_drawn/{os.path.basename(record['file_name'])}"
    for other in nothing.keys() - {name}:
        np.testing.assert_array_equal(nothing[other], likely[other])
    np.testing.assert_array_equal(nothing[name], unlikely[name])
    assert nothing[name].shape[0] == 3 and nothing[name].shape[2] == 960
    columns = np.flatnonzero((nothing[name] != likely[name]).any((0, 1)))
    left, right = (480 + x * 480 / record["width"] for x in (50, 140))
    assert columns.min() == pytest.approx(left, abs=4) and columns.max() > right - 2
    assert not np.array_equal(nothing[name][:, :, :480], nothing[name][:, :, 480:])


def test_pictures_are_of_each_evaluation(pictures):
    assert list(pictures([], iterations=5, period=2)) == [1, 3, 5]
    assert list(pictures([], iterations=4, period=2)) == [1, 4]


def test_no_pictures_of_an_evaluator_that_writes_no_results(pictures):
    assert pictures(None) == {}


@pytest.mark.ci
def test_weights_and_biases_gets_the_config_and_goes_on_when_resumed(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    opts = ["WANDB.PROJECT", "shapes", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config("configs/quick_start.yaml", opts)
    runs = []

    def look(iteration):
        runs.append((wandb.run.project, wandb.run.id, wandb.run.config["SOLVER"]["BASE_LR"]))

    hooks = [lambda c: PeriodicCheckpointer(c, 1, keep=1), lambda _: WandbRun(cfg)]
    Trainer(tmp_path, hooks, look).train(0, 1)
    assert wandb.run is None
    trainer = Trainer(tmp_path, hooks, look)
    trainer.train(trainer.resume(), 2)
    Trainer(tmp_path, hooks, look).train(0, 1)
    assert runs[0] == runs[1] == ("shapes", runs[0][1], 0.05) and runs[2][1] != runs[0][1]
