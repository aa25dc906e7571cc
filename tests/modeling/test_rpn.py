"""The rule for low-quality matches, by hand and in a whole training step."""

import pytest
import reference
import torch
from conftest import mmdet_state
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from gnws_d2 import model_zoo
from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.modeling import MinQualityMatcher

# Three objects and seven anchors.
IOU = torch.tensor(
    [
        [0.80, 0.72, 0.30, 0.10, 0.00, 0.00, 0.29],
        [0.00, 0.71, 0.40, 0.40, 0.10, 0.00, 0.00],  # its best anchor overlaps the first one more
        [0.00, 0.00, 0.10, 0.00, 0.25, 0.25, 0.10],  # below 0.3
    ]
)
ALL = 10**6  # anchors or proposals of an image: none is left out


@pytest.mark.parametrize(
    "min_iou, matcher, objects",  # -1 is background, -2 is left out
    [
        (0.3, MinQualityMatcher([0.3, 0.7], [0, -1, 1], 0.3), [0, 1, -2, -2, -1, -1, -1]),
        (0.25, MinQualityMatcher([0.3, 0.7], [0, -1, 1], 0.25), [0, 1, -2, -2, 2, 2, -1]),
        (0, Matcher([0.3, 0.7], [0, -1, 1], True), [0, 0, -2, -2, 2, 2, -1]),
    ],
)
def test_labels_of_anchors_by_hand(min_iou, matcher, objects):
    matches, labels = matcher(IOU)
    found = torch.where(labels == 1, matches, torch.where(labels == 0, -1, -2))
    assert found.tolist() == reference.assign_anchors(IOU, min_iou).tolist() == objects


def test_anchor_that_is_the_best_of_two_objects_belongs_to_the_last():
    iou = torch.tensor([[0.5, 0.1], [0.4, 0.1], [0.2, 0.1]])
    matches, labels = MinQualityMatcher([0.3, 0.7], [0, -1, 1], 0.3)(iou)
    assert matches[0] == 1 and labels.tolist() == [1, 0]


def test_image_without_objects_has_background_alone():
    matches, labels = MinQualityMatcher([0.3, 0.7], [0, -1, 1], 0.3)(torch.zeros(0, 4))
    assert matches.tolist() == [0] * 4 and labels.tolist() == [0] * 4


def make_objects(height, width):
    """Ellipses of 6 to 40 pixels."""
    generator = torch.Generator().manual_seed(0)
    size = 6 + 34 * torch.rand(12, 2, generator=generator)
    corner = torch.rand(12, 2, generator=generator) * (torch.tensor([width, height]) - size)
    boxes = torch.cat([corner, corner + size], dim=1)
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    (cx, cy), (rx, ry) = (corner + size / 2).T[:, :, None, None], size.T[:, :, None, None] / 2
    masks = ((x - cx) / rx) ** 2 + ((y[:, None] - cy) / ry) ** 2 <= 1
    return boxes, torch.randint(80, (12,), generator=generator), masks


@pytest.mark.parametrize("min_iou", [0.3, 0.0])
def test_training_step_with_small_objects_has_the_losses_of_mmdetection(min_iou, tmp_path):
    cfg = model_zoo.get_config("mask_rcnn_R50_gnws_2x")
    assert cfg.MODEL.RPN.MIN_LOW_QUALITY_IOU == 0.3
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RPN.MIN_LOW_QUALITY_IOU = min_iou
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = ALL
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    state = mmdet_state("mask_rcnn_R50_gnws_2x")
    torch.save({"state_dict": state}, tmp_path / "mmdet.pth")
    model = build_model(cfg).train()
    GNWSCheckpointer(model, strict=True).load(str(tmp_path / "mmdet.pth"))

    image = torch.randint(0, 256, (3, 128, 160), generator=torch.Generator().manual_seed(1))
    boxes, classes, masks = make_objects(128, 160)
    instances = Instances((128, 160), gt_boxes=Boxes(boxes), gt_classes=classes)
    instances.gt_masks = BitMasks(masks)
    with torch.no_grad(), EventStorage() as storage:
        losses = model([{"image": image.to(torch.uint8), "instances": instances}])
        used = sum(storage.latest()[f"rpn/num_{kind}_anchors"][0] for kind in ("pos", "neg"))
        expected = reference.losses(image, state, boxes, classes, masks, min_iou, 50)
    for name in ("loss_rpn_cls", "loss_rpn_loc"):
        losses[name] *= ALL / used
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5, abs=1e-5), name
