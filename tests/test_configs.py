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


def test_training(row):
    """What tests/reference.py, an independent MMDetection, does not use: it only predicts."""
    cfg = model_zoo.get_config(row["name"])
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((800,), 1333)
    assert cfg.INPUT.RANDOM_FLIP == "horizontal" and not cfg.INPUT.CROP.ENABLED
    rpn, roi = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    assert (rpn.BATCH_SIZE_PER_IMAGE, rpn.POSITIVE_FRACTION) == (256, 0.5)
    assert rpn.IOU_THRESHOLDS == [0.3, 0.7]
    assert (rpn.PRE_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TRAIN) == (2000, 1000)
    assert (roi.BATCH_SIZE_PER_IMAGE, roi.POSITIVE_FRACTION) == (512, 0.25)
    assert roi.IOU_THRESHOLDS == [0.5] and roi.PROPOSAL_APPEND_GT
    for node in (rpn, cfg.MODEL.ROI_BOX_HEAD):  # smooth L1 with beta 0 is L1
        assert (node.BBOX_REG_LOSS_TYPE, node.SMOOTH_L1_BETA) == ("smooth_l1", 0.0)


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

    expected = {
        0: 0.02 * 0.001,
        250: 0.02 * (0.001 + 0.999 * 250 / 500),
        500: 0.02,
        first - 1: 0.02,
        first: 0.002,
        first + 1: 0.002,
        second - 1: 0.002,
        second: 0.0002,
        second + 1: 0.0002,
        last - 1: 0.0002,
    }
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
