import contextlib
import functools
import json
import math
import os
import signal
import time

import cv2
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.engine import HookBase, TrainerBase
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage
from torch import nn

from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.config import load_config
from gnws_d2.data import shapes
from gnws_d2.data.workers import StoppableLoader
from gnws_d2.engine.hooks import (
    BestCheckpointer,
    EarlyStop,
    EvalHook,
    InterruptedEvaluation,
    PeriodicCheckpointer,
    StopOnSignal,
    WandbRun,
    validation_loss,
)
from gnws_d2.engine.run_record import RunRecord
from gnws_d2.utils.errors import UserError
from gnws_d2.utils.signals import catch_signals, received_signal, stop_together


class Trainer(TrainerBase):
    """Calls `do` in each iteration, and has no data."""

    stop_signal = 0

    def __init__(self, output_dir, hooks, do=lambda iteration: None):
        super().__init__()
        self.do, self._trainer = do, self
        self.checkpointer = GNWSCheckpointer(nn.Linear(1, 1), str(output_dir), trainer=self)
        self.register_hooks([make(self.checkpointer) for make in hooks])

    def train(self, start_iter, max_iter):
        with catch_signals():
            super().train(start_iter, max_iter)

    def run_step(self):
        self.do(self.iter)
        self.stop_signal = received_signal()

    def resume(self, max_iter=None):
        """Return the first iteration, and train from it to `max_iter`."""
        path = self.checkpointer.get_checkpoint_file()
        self.load_state_dict(torch.load(path)["trainer"])
        start = self.iter + 1
        if max_iter:
            self.train(start, max_iter)
        return start


def names(output_dir):
    return sorted(path.stem for path in output_dir.glob("*.pth"))


def stop_on_signal(_):
    return StopOnSignal()


def evaluating(evaluation, *last, patience=0):
    """Hooks that evaluate and keep the best checkpoint, and `last`, made of both of them."""
    made = [evaluation]

    def best(checkpointer):
        made.append(BestCheckpointer(evaluation, checkpointer, "bbox/AP", patience=patience))
        return made[-1]

    return [lambda _: evaluation, best, *(lambda _, make=make: make(*made) for make in last)]


def evaluate_each_iteration(aps, **options):
    """Hooks for the AP of each iteration."""

    def evaluate():
        trainer = evaluation.trainer
        return {"bbox": {"AP": aps[min(trainer.iter, trainer.max_iter - 1)]}}

    evaluation = EvalHook(1, evaluate)
    return evaluating(evaluation, **options)


def test_newest_checkpoints_are_kept_and_those_from_before_a_resume_count(tmp_path):
    def stop(iteration):
        if iteration == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    hooks = [lambda c: PeriodicCheckpointer(c, 2, max_to_keep=2), stop_on_signal]
    with pytest.raises(SystemExit):
        Trainer(tmp_path, hooks, stop).train(0, 10)
    assert names(tmp_path) == ["model_0000003", "model_0000005", "model_0000006"]
    Trainer(tmp_path, hooks).resume(9)
    assert names(tmp_path) == ["model_0000006", "model_0000007", "model_final"]
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    Trainer(tmp_path, hooks).resume(12)
    assert names(tmp_path) == ["model_0000009", "model_0000011", "model_final"]


def test_damaged_checkpoints_and_those_of_another_run_do_not_count(tmp_path):
    others = ["model_0000000", "model_0000004", "model_0000008", "model_best"]
    for name in others:
        (tmp_path / f"{name}.pth").write_bytes(b"of another run")
    hooks = [lambda checkpointer: PeriodicCheckpointer(checkpointer, 2, max_to_keep=2)]
    Trainer(tmp_path, hooks).train(0, 5)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    (tmp_path / "model_0000005.pth").write_bytes(b"damaged")
    Trainer(tmp_path, hooks).resume(6)
    assert names(tmp_path) == sorted([*others, "model_0000003", "model_0000005", "model_final"])


def test_best_checkpoint_is_of_the_best_ap_also_after_a_resume(tmp_path):
    aps = [10.0, 30.0, float("nan"), 20.0, 25.0, 31.0, 5.0]

    def start():
        def newest(checkpointer):
            return PeriodicCheckpointer(checkpointer, 1, max_to_keep=1)

        return Trainer(tmp_path, [newest, *evaluate_each_iteration(aps)])

    def best():
        return torch.load(tmp_path / "model_best.pth")["iteration"]

    start().train(0, 4)
    assert best() == 1
    start().resume(5)
    assert best() == 1
    start().resume(7)
    assert best() == 5 and names(tmp_path) == ["model_0000006", "model_best", "model_final"]


@pytest.mark.parametrize("period, signum", [(1, signal.SIGTERM), (100, signal.SIGINT)])
def test_signal_ends_with_a_checkpoint_after_the_iteration(tmp_path, period, signum, caplog):
    done = []
    handler = signal.getsignal(signum)

    def do(iteration):
        if iteration == 3:
            os.kill(os.getpid(), signum)
        done.append(iteration)

    hooks = [lambda c: PeriodicCheckpointer(c, period), stop_on_signal]
    with pytest.raises(SystemExit) as e:
        Trainer(tmp_path, hooks, do).train(0, 10)
    assert e.value.code == 128 + signum and done == [0, 1, 2, 3]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert Trainer(tmp_path, hooks).resume() == 4
    assert f"Stopped by {signum.name} after iteration 3" in caplog.text
    assert signal.getsignal(signum) == handler
    stop_together()  # nothing is left of the signal for what comes next in the process


def test_error_of_a_hook_before_training_is_not_hidden_by_the_hooks_after_it(tmp_path):
    class Broken(HookBase):
        def before_train(self):
            raise UserError("W&B is not there.")

    handler = signal.getsignal(signal.SIGTERM)
    record = RunRecord(str(tmp_path), EvalHook(0, dict))
    hooks = [lambda _: Broken(), stop_on_signal, lambda _: record]
    with pytest.raises(UserError, match="W&B is not there"):
        Trainer(tmp_path, hooks).train(0, 2)
    assert signal.getsignal(signal.SIGTERM) == handler and not (tmp_path / "run.json").exists()


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return i


def evaluate_with_a_signal(at, seen):
    """Return a function for EvalHook that gets SIGTERM while it evaluates image `at`, if any."""

    def evaluate():
        for i in StoppableLoader(torch.utils.data.DataLoader(Batches())):
            seen.append(int(i))
            if int(i) == at:
                os.kill(os.getpid(), signal.SIGTERM)
        return {"bbox": {"AP": 50.0}}

    return evaluate


@pytest.fixture
def evaluating_hooks(tmp_path):
    """Hooks of a training that is evaluated, with a signal at image `at`."""

    def hooks(at, seen, period=4, patience=0):
        evaluation = EvalHook(period, evaluate_with_a_signal(at, seen))
        last = functools.partial(RunRecord, str(tmp_path)), InterruptedEvaluation
        first = [lambda c: PeriodicCheckpointer(c, 2), stop_on_signal]
        return [*first, *evaluating(evaluation, *last, patience=patience)]

    return hooks


def test_interrupted_evaluation_stops_between_images_and_comes_first_when_resumed(
    tmp_path, evaluating_hooks
):
    """The best AP is that of a run that was not interrupted."""

    def record():
        return json.loads((tmp_path / "run.json").read_text())[-1]

    seen = []
    with pytest.raises(SystemExit) as e:
        Trainer(tmp_path, evaluating_hooks(2, seen)).train(0, 10)
    assert e.value.code == 143 and seen == [0, 1, 2]
    assert names(tmp_path) == ["model_0000001", "model_0000003"]
    assert (record()["last_checkpoint"], record()["best_checkpoint"]) == ("model_0000003.pth", "")
    assert (record()["status"], record()["evaluated"]) == ("stopped", 0)

    with pytest.raises(SystemExit):  # in the evaluation at the end
        Trainer(tmp_path, evaluating_hooks(2, [])).train(0, 3)
    assert (record()["status"], record()["iterations"], record()["evaluated"]) == ("stopped", 3, 0)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")

    for start, num_seen in ((4, 20), (6, 10)):  # the last evaluation of a training is always done
        seen = []
        trainer = Trainer(tmp_path, evaluating_hooks(None, seen))
        assert trainer.resume() == start
        trainer.train(start, 6)
        assert len(seen) == num_seen
        assert torch.load(tmp_path / "model_best.pth")["iteration"] == 3
        assert (record()["best_checkpoint"], record()["evaluated"]) == ("model_best.pth", 6)


def test_patience_counts_an_evaluation_that_was_interrupted(tmp_path, evaluating_hooks):
    def train(at, resume=False):
        trainer = Trainer(tmp_path, evaluating_hooks(at, [], period=2, patience=2))
        trainer.train(trainer.resume() if resume else 0, 20)

    with pytest.raises(EarlyStop):  # only the first of evaluations with the same AP is the best
        train(None)
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 5
    with pytest.raises(SystemExit):
        train(3)
    with pytest.raises(EarlyStop):
        train(None, resume=True)
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 5


@pytest.mark.parametrize("patience, last", [(2, 3), (3, 6)])  # AP improves at the fifth
def test_training_stops_when_ap_does_not_improve(tmp_path, caplog, patience, last):
    caplog.set_level("INFO")
    hooks = evaluate_each_iteration([10, 30, 20, 25, 40, 50], patience=patience)
    trainer = Trainer(tmp_path, hooks)
    with pytest.raises(EarlyStop) if last < 6 else contextlib.nullcontext():
        trainer.train(0, 6)
    stopped = f"improved for 2 evaluations: stopping after iteration {last}" in caplog.text
    assert trainer.iter == last and stopped == (last < 6)
    if stopped:
        assert torch.load(tmp_path / "model_final.pth")["iteration"] == 3
        assert torch.load(tmp_path / "model_best.pth")["iteration"] == 1


def test_evaluations_take_their_share_of_the_time_also_after_a_resume(tmp_path, monkeypatch):
    """An iteration takes 1 s, and an evaluation 3.5 s: a tenth of the time of 35 iterations."""
    now, seen = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds

    def evaluate():
        seen.append(min(trainer.iter + 1, trainer.max_iter))
        take(3.5)
        return {"bbox": {"AP": len(seen)}}

    def start(period=10, share=0.1):
        evaluation = EvalHook(period, evaluate, max_share=share)
        hooks = [lambda c: PeriodicCheckpointer(c, 10)]
        hooks += evaluating(evaluation, InterruptedEvaluation)
        return Trainer(tmp_path, hooks, lambda _: take(1))

    trainer = start()
    trainer.train(0, 95)
    assert seen == [10, 40, 80, 95]
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 94
    for last, max_iter, changed, expected in (
        (49, 125, {}, [80, 120, 125]),
        (9, 95, {}, [10, 20, 40, 80, 95]),  # before the first evaluation
        (49, 95, {"period": 15}, [90, 95]),
        (49, 95, {"share": 0.2}, [60, 80, 95]),
        (49, 95, {"share": 0.0}, [60, 70, 80, 90, 95]),
    ):
        seen.clear()
        (tmp_path / "last_checkpoint").write_text(f"model_{last:07d}.pth")
        trainer = start(**changed)
        trainer.resume(max_iter)
        assert seen == expected


@pytest.mark.ci
def test_weights_and_biases_gets_the_config_and_goes_on_when_resumed(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    opts = ["WANDB.PROJECT", "shapes", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config("configs/quick_start.yaml", opts)
    runs = []

    def look(iteration):
        runs.append((wandb.run.project, wandb.run.id, wandb.run.config["SOLVER"]["BASE_LR"]))

    hooks = [lambda c: PeriodicCheckpointer(c, 1, max_to_keep=1), lambda _: WandbRun(cfg)]
    Trainer(tmp_path, hooks, look).train(0, 1)
    assert wandb.run is None
    trainer = Trainer(tmp_path, hooks, look)
    trainer.train(trainer.resume(), 2)
    Trainer(tmp_path, hooks, look).train(0, 1)
    assert runs[0] == runs[1] == ("shapes", runs[0][1], 0.05) and runs[2][1] != runs[0][1]

    codes = []
    finish = wandb.finish
    monkeypatch.setattr(wandb, "finish", lambda exit_code: [codes.append(exit_code), finish()])
    for error in (EarlyStop, ValueError):  # only one of them is a failure

        def fail(iteration, error=error):
            raise error

        with pytest.raises(error):
            Trainer(tmp_path, [lambda _: WandbRun(cfg)], fail).train(0, 2)
    assert codes == [0, 1]


def test_validation_loss_of_a_model_that_diverges_on_an_image_is_nan(shapes_root, monkeypatch):
    def diverge(batch):
        if batch[0]["image_id"] == 2:
            raise FloatingPointError
        return {"loss_cls": torch.ones(())}

    monkeypatch.setitem(shapes._SPLITS, "shapes_val", (3, 1))
    losses = validation_loss(load_config("configs/quick_start.yaml", []), diverge)["validation"]
    assert {"total_loss", "loss_cls"} < losses.keys()
    assert all(map(math.isnan, losses.values()))


def test_validation_loss_is_the_mean_over_the_images(shapes_root, monkeypatch):
    monkeypatch.setitem(shapes._SPLITS, "shapes_val", (5, 1))
    cfg = load_config("configs/quick_start.yaml", ["INPUT.MIN_SIZE_TRAIN", "(64,)"])
    torch.manual_seed(0)
    model = build_model(cfg)
    records = [dict(d) for d in DatasetCatalog.get("shapes_val")]
    losses = []
    with torch.no_grad(), EventStorage(1):
        for record in records:
            image = cv2.imread(record["file_name"])[:, :, ::-1].transpose(2, 0, 1)
            instances = annotations_to_instances(record["annotations"], (128, 128), "polygon")
            instances.gt_masks = BitMasks.from_polygon_masks(instances.gt_masks, 128, 128)
            torch.manual_seed(0)
            given = {"image": torch.from_numpy(image.copy()), "instances": instances}
            losses.append(model([given]))
    with EventStorage(5) as storage:
        actual = validation_loss(cfg, model)["validation"]
        assert not storage.latest()
    assert model.training
    for name in losses[0]:
        mean = sum(loss[name].item() for loss in losses) / len(losses)
        assert actual[name] == pytest.approx(mean, rel=1e-4)
    assert actual["total_loss"] == pytest.approx(sum(actual[name] for name in losses[0]))
