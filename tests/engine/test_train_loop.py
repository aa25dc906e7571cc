import os
import sys

import pytest
import torch
from conftest import launches_on_cpu, make_batch, run_python
from detectron2.layers import batched_nms
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from gnws_d2 import model_zoo
from gnws_d2.engine.train_loop import FiniteTrainer
from gnws_d2.utils.errors import UserError


class Model(nn.Module):
    """`kind` of the data says what is not finite: a loss, a gradient, the proposals, or nothing."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, batch):
        out = self.fc(torch.ones(1)).sum()
        kind = batch[0]["kind"]
        if kind == "diverged":
            raise FloatingPointError("Predicted boxes contain Inf/NaN.")
        bad = float(kind) if kind in ("nan", "inf") else 0.0
        # sqrt(0) is finite, its gradient is not.
        root = torch.sqrt((out - out.detach()) * (kind == "gradient") + (kind != "gradient"))
        return {"loss_cls": out**2 + bad, "loss_mask": root}


def make_trainer(kinds, skip=False, checkpoint="", precision="", steps=1):
    model = Model()
    data = [
        [{"kind": kind, "file_name": f"{i}{c}.jpg"} for c in "ab"] for i, kind in enumerate(kinds)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"skip": skip, "precision": precision, "accumulate_steps": steps}
    return FiniteTrainer(model, data, optimizer, last_checkpoint=lambda: checkpoint, **options)


def run(trainer, n, start=0):
    """Run `n` iterations, and return the last metrics."""
    with EventStorage(start) as storage:
        for trainer.iter in range(start, start + n):
            trainer.run_step()
    return {name: value for name, (value, _) in storage.latest().items()}


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize(
    "kind, what",
    [
        ("nan", r"loss_cls is nan \(images 1a.jpg, 1b.jpg\)"),
        ("inf", r"loss_cls is inf \(images 1a.jpg, 1b.jpg\)"),
        ("gradient", r"the gradient of fc.weight is not finite \(images 1a.jpg, 1b.jpg\)"),
        ("diverged", r"loss of the proposals is nan \(images 1a.jpg, 1b.jpg\)"),
    ],
)
def test_what_is_not_finite_stops_before_the_weights_change(kind, what):
    trainer = make_trainer(["", kind, ""], checkpoint="out/model_0000000.pth")
    run(trainer, 1)
    before = weights(trainer)
    last = r"The last checkpoint is out/model_0000000.pth\."
    with pytest.raises(UserError, match=rf"^Iteration 1: {what}. {last} Look at the images"):
        run(trainer, 1, start=1)
    assert all(map(torch.equal, weights(trainer), before))


def test_skipped_steps_leave_weights_and_momentum_as_they_are(caplog):
    expected = make_trainer(["", "", ""])
    trainer = make_trainer(["", "nan", "gradient", "", "inf", ""], skip=True)
    trainer.model.load_state_dict(expected.model.state_dict())
    run(expected, 3)
    run(trainer, 6)
    assert all(map(torch.equal, weights(trainer), weights(expected)))
    assert trainer.num_skipped == 3 and trainer.num_skipped_in_a_row == 0
    message = "Iteration 4: loss_cls is inf (images 4a.jpg, 4b.jpg). The step is skipped (3 so far)"
    assert message in caplog.text


def test_bad_images_of_the_loader_are_counted_in_the_metrics():
    class Loader(list):
        num_bad_images = 3

    trainer = make_trainer(["", ""])
    trainer.data_loader = Loader(trainer.data_loader)
    assert run(trainer, 1)["bad_images"] == 3


def test_three_skipped_steps_in_a_row_stop():
    trainer = make_trainer(["nan", "", "nan", "inf", "diverged"], skip=True)
    run(trainer, 4)
    with pytest.raises(UserError, match=r"^Iteration 4: .*, 3 iterations in a row\. "):
        run(trainer, 1, start=4)


def test_float16_leaves_the_gradients_to_the_scaler():
    trainer = make_trainer(["", "gradient", ""], precision="float16")
    run(trainer, 1)
    before, scale = weights(trainer), trainer.grad_scaler.get_scale()
    run(trainer, 1, start=1)
    assert all(map(torch.equal, weights(trainer), before))
    assert trainer.state_dict()["grad_scaler"]["scale"] == scale / 2
    run(trainer, 1, start=2)
    assert not all(map(torch.equal, weights(trainer), before))
    resumed = make_trainer([], precision="float16")
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.grad_scaler.get_scale() == scale / 2
    resumed.load_state_dict(make_trainer([]).state_dict())  # from a run in float32


def test_bfloat16_computes_in_bfloat16_without_a_scaler():
    trainer = make_trainer([""], precision="bfloat16")
    types = []
    trainer.model.fc.register_forward_hook(lambda *args: types.append(args[2].dtype))
    run(trainer, 1)
    assert types == [torch.bfloat16] and not trainer.grad_scaler.is_enabled()


@pytest.fixture
def float64_nms(monkeypatch):
    """Detectron2's NMS takes boxes in float32, and torchvision's then scores as well."""
    monkeypatch.setattr(
        "detectron2.modeling.proposal_generator.proposal_utils.batched_nms",
        lambda boxes, scores, *args: batched_nms(boxes, scores.float(), *args),
    )


def make_detector():
    """A detector in float64 that uses all anchors and proposals, so that none are sampled."""
    torch.manual_seed(0)
    cfg = model_zoo.get_config("quick_start")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.GNWS.SCRATCH_INIT = False  # with random weights, all blocks should matter
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 10_000
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    return build_model(cfg).double()


def test_accumulated_gradient_and_losses_are_the_mean_over_the_parts(float64_nms):
    """As with one process per part (DistributedDataParallel), whatever is in the images."""
    model, batch = make_detector(), make_batch(3, num_classes=3)
    reference = make_detector()
    expected = {}
    with EventStorage(0):
        for record in batch:
            losses = reference([record])
            (sum(losses.values()) / 3).backward()
            for name, loss in losses.items():
                expected[name] = expected.get(name, 0) + loss.item() / 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = FiniteTrainer(
        model, [batch], optimizer, skip=False, last_checkpoint=str, accumulate_steps=3
    )
    latest = run(trainer, 1)
    for a, b in zip(reference.parameters(), model.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)
    assert {name: latest[name] for name in expected} == pytest.approx(expected)
    assert latest["total_loss"] == pytest.approx(sum(expected.values()))


SCRIPT = """
import itertools, os, signal, torch
from detectron2.engine import launch
from detectron2.utils import comm
from test_train_loop import Model, make_trainer, run, weights
from gnws_d2.engine.launch import leave_process_group
from gnws_d2.utils.errors import UserError
from gnws_d2.utils.signals import catch_signals

def main():
    for skip, kind in itertools.product((False, True), ("nan", "diverged")):
        torch.manual_seed(0)
        trainer = make_trainer(["", kind if comm.get_rank() else "", ""], skip=skip)
        trainer.model = torch.nn.parallel.DistributedDataParallel(trainer.model)
        name = "loss_cls" if kind == "nan" else "loss of the proposals"
        try:
            run(trainer, 3)
        except UserError as e:
            assert not skip and str(e).startswith(f"Iteration 1: {name} is nan (images 1a.jpg"), e
            assert "in a row" not in str(e)
        else:
            assert skip and trainer.num_skipped == 1
        a, b = comm.all_gather(weights(trainer))
        assert all(map(torch.equal, a, b)) and all(w.isfinite().all() for w in a)
    accumulated = []
    for steps in (1, 2):
        torch.manual_seed(0)
        trainer = make_trainer(["", ""], steps=steps)
        trainer.model = torch.nn.parallel.DistributedDataParallel(trainer.model)
        run(trainer, 2)
        accumulated.append(weights(trainer))
    assert all(map(torch.allclose, *accumulated))
    trainer = make_trainer(["", ""])
    collectives, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda status: [collectives.append(1), all_reduce(status)]
    with catch_signals():
        if comm.get_rank():
            os.kill(os.getpid(), signal.SIGTERM)
        run(trainer, 1)
    assert trainer.stop_signal == signal.SIGTERM and len(collectives) == 1
    leave_process_group()

if __name__ == "__main__":
    launch(main, 2, dist_url="auto")
"""


@launches_on_cpu
def test_processes_stop_and_skip_together_and_share_signals(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join(filter(None, sys.path))
    run_python("script.py", cwd=tmp_path, CUDA_VISIBLE_DEVICES="", PYTHONPATH=path)
