"""
Published weights give the published outputs: the same weights through this project and through
tests/reference.py, from a JPEG file to boxes in the image's coordinates.
"""

import cv2
import numpy as np
import pytest
import reference
import torch
from conftest import mmdet_state, published
from torchvision.ops import box_iou

from gnws_d2 import Predictor, model_zoo

SIZE = 320  # pixels of the shorter side
NAMES = model_zoo.names()[:8]  # one of each network
FAST = ("faster_rcnn_R50_gnws_1x", "mask_rcnn_X50_32x4d_gnws_2x")


def assert_same_detections(found, expected, scale=1):
    boxes, classes = expected["boxes"] * scale, expected["classes"]
    assert len(found) == len(boxes) > 20
    iou = box_iou(boxes, found.pred_boxes.tensor) * (classes[:, None] == found.pred_classes[None])
    best, partner = iou.max(dim=1)
    assert best.min() > 0.99
    assert len(set(partner.tolist())) == len(boxes)
    assert (found.scores[partner] - expected["scores"]).abs().max() < 1e-3
    return partner


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
@pytest.mark.parametrize(
    "photograph, num_proposals",
    [("0.jpg", 200), pytest.param("7.jpg", 1000, marks=pytest.mark.slow)],
)
def test_features_and_detections_agree(name, photograph, num_proposals, photographs, tmp_path):
    state = mmdet_state(name)
    predictor = Predictor(published(name, tmp_path / "published.pth", SIZE, num_proposals))

    original = cv2.imread(str(photographs.images / photograph))
    h, w = original.shape[:2]
    shape = (round(w * SIZE / h), SIZE)
    image = cv2.resize(original, shape, interpolation=cv2.INTER_LINEAR)
    image = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))
    with torch.no_grad():
        expected = reference.detect(image, state, num_proposals)
        model = predictor.model
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        (resized,) = model.inference([{"image": image}], do_postprocess=False)

    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]
    for feature, reference_feature in zip(features.values(), expected["features"]):
        error = (feature - reference_feature).norm() / reference_feature.norm()
        assert error < 2e-5
    partner = assert_same_detections(resized, expected)
    if "masks" in expected:
        masks = resized.pred_masks[partner, 0]
        assert (masks - expected["masks"]).abs().max() < 1e-2

    instances = predictor(original)["instances"]
    scale = torch.tensor([w / shape[0], h / shape[1]]).repeat(2)
    assert_same_detections(instances, expected, scale)
