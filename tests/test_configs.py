"""The published recipe: every figure here is from the project's reference, not from our configs."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer

from gnws_d2 import model_zoo

EPOCH = 7330
STEP_EPOCHS = {"1x": (8, 11, 12), "2x": (16, 22, 24), "20-23-24e": (20, 23, 24)}
ROWS = model_zoo.table()


@pytest.fixture(params=ROWS, ids=[row["name"] for row in ROWS])
def row(request):
    return request.param


def test_learning_rate(row):
    cfg = model_zoo.get_config(row["name"])
    assert cfg.SOLVER.IMS_PER_BATCH == 16 and cfg.SOLVER.REFERENCE_WORLD_SIZE == 8
    first, second, last = (epoch * EPOCH for epoch in STEP_EPOCHS[row["schedule"]])
    assert cfg.SOLVER.MAX_ITER == last

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)

    def learning_rate(iteration):
        scheduler.last_epoch = iteration - 1
        scheduler.step()
        return optimizer.param_groups[0]["lr"]

    lr = 0.02
    expected = {0: lr * 0.001, 250: lr * (0.001 + 0.999 * 250 / 500), 500: lr, last - 1: lr / 100}
    for step, before, after in ((first, lr, lr / 10), (second, lr / 10, lr / 100)):
        expected |= {step - 1: before, step: after, step + 1: after}
    assert {i: learning_rate(i) for i in expected} == pytest.approx(expected, rel=1e-9)


def test_optimizer_decays_every_trained_parameter(row):
    cfg = model_zoo.get_config(row["name"])
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}
