import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from gnws_d2.engine.train_loop import FiniteAMPTrainer, FiniteTrainer
from gnws_d2.utils.errors import UserError


class Model(nn.Module):
    """Its losses are finite, or the one or the gradient of the other is not, as the data says."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, batch):
        out = self.fc(torch.ones(1)).sum()
        kind = batch[0]["kind"]
        if kind == "diverged":
            raise FloatingPointError("Predicted boxes contain Inf/NaN.")
        bad = {"nan": math.nan, "inf": math.inf}.get(kind, 0.0)
        # sqrt(0) is finite, its gradient is not.
        root = torch.sqrt((out - out.detach()) * (kind == "gradient") + (kind != "gradient"))
        return {"loss_cls": out**2 + bad, "loss_mask": root}


def make_trainer(kinds, skip=False, checkpoint=""):
    model = Model()
    data = [
        [{"kind": kind, "file_name": f"{i}{c}.jpg"} for c in "ab"] for i, kind in enumerate(kinds)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return FiniteTrainer(model, data, optimizer, skip=skip, last_checkpoint=lambda: checkpoint)


def run(trainer, n, start=0):
    with EventStorage(start):
        for trainer.iter in range(start, start + n):
            trainer.run_step()


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize(
    "kind, what",
    [
        ("nan", r"loss_cls is nan \(images 1a.jpg, 1b.jpg\)"),
        ("inf", r"loss_cls is inf \(images 1a.jpg, 1b.jpg\)"),
        ("gradient", r"the gradient of fc.weight is not finite \(images 1a.jpg, 1b.jpg\)"),
        ("diverged", r"Predicted boxes contain Inf/NaN. \(1a.jpg, 1b.jpg\)"),
    ],
)
@pytest.mark.parametrize("checkpoint", ["", "out/model_0000000.pth"])
def test_what_is_not_finite_stops_before_the_weights_change(kind, what, checkpoint):
    trainer = make_trainer(["", kind, ""], checkpoint=checkpoint)
    run(trainer, 1)
    before = weights(trainer)
    last = f"The last checkpoint is {checkpoint}" if checkpoint else "No checkpoint yet"
    with pytest.raises(UserError, match=rf"^Iteration 1: {what}. {last}\. Look at the images"):
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
    message = (
        "Iteration 4: loss_cls is inf (images 4a.jpg, 4b.jpg). The step is left out (3 so far)"
    )
    assert message in caplog.text


def test_three_skipped_steps_in_a_row_stop():
    trainer = make_trainer(["nan", "", "nan", "inf", "nan"], skip=True)
    run(trainer, 4)
    with pytest.raises(UserError, match=r"^Iteration 4: .*, 3 iterations in a row\. "):
        run(trainer, 1, start=4)


def test_mixed_precision_leaves_the_gradients_to_the_scaler():
    """A step needs a GPU."""
    trainer = FiniteAMPTrainer(
        Model(),
        [],
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),
        skip=True,
        last_checkpoint=str,
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=8.0),
    )
    assert trainer.state_dict()["grad_scaler"]["scale"] == 8.0
    trainer.model.fc.weight.grad = torch.full((1, 1), math.nan)
    assert list(trainer._gradient_issues()) == [] and isinstance(trainer, AMPTrainer)


SCRIPT = """
import signal, torch
from detectron2.engine import launch
from detectron2.utils import comm
from test_train_loop import Model, make_trainer, run, weights
from gnws_d2.utils.errors import UserError

def main():
    for skip in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(["", "nan" if comm.get_rank() else "", ""], skip=skip)
        trainer.model = torch.nn.parallel.DistributedDataParallel(trainer.model)
        try:
            run(trainer, 3)
        except UserError as e:
            assert not skip and str(e).startswith("Iteration 1: loss_cls is nan (images 1a.jpg"), e
        else:
            assert skip and trainer.num_skipped == 1
        a, b = comm.all_gather(weights(trainer))
        assert all(map(torch.equal, a, b)) and all(w.isfinite().all() for w in a)
    trainer = make_trainer(["", ""])
    trainer.received_signal = signal.SIGTERM if comm.get_rank() else 0
    run(trainer, 1)
    assert trainer.stop_signal == signal.SIGTERM
    torch.distributed.destroy_process_group()  # a process without it has aborted at exit

if __name__ == "__main__":
    launch(main, 2, dist_url="auto")
"""


def test_processes_stop_and_skip_together_and_all_know_of_a_signal(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr


def test_processes_agree_in_one_collective_per_iteration(monkeypatch):
    calls = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda status: calls.append(status.tolist()))
    monkeypatch.setattr(comm, "all_gather", None)
    monkeypatch.setattr("detectron2.engine.train_loop.comm.gather", lambda metrics: [metrics])
    run(make_trainer(["", "", ""]), 3)
    assert calls == [[0, 0, 0, 0]] * 3
