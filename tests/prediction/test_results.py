"""Detections for supervision, compared with what it converts from Detectron2 itself."""

import sys

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
from conftest import small_mask_rcnn
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from gnws_d2 import Predictor, to_supervision
from gnws_d2.utils.errors import UserError

NAMES = ["fig", "date", "nut"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model_final.pth"
    return Predictor(small_mask_rcnn(path, NAMES))


@pytest.fixture
def image(photographs):
    return cv2.imread(str(photographs.images / "0.jpg"))[::3, ::3].copy()


def test_supervision_gets_boxes_masks_scores_and_class_names(predictor, image):
    output = predictor(image)
    found = to_supervision(output["instances"], predictor.metadata)
    expected = sv.Detections.from_detectron2(output)
    assert len(found) == len(expected) > 1 and found.mask.dtype == bool
    for field in ("xyxy", "mask", "confidence", "class_id"):
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field
    names = [NAMES[i] for i in output["instances"].pred_classes]
    assert found.data["class_name"].tolist() == names


def test_no_detections_and_no_masks():
    metadata = Metadata(thing_classes=["fig", "date"])
    for n in (0, 2):
        instances = Instances(
            (10, 10), pred_boxes=Boxes(torch.rand(n, 4)), scores=torch.rand(n),
            pred_classes=torch.ones(n, dtype=torch.int64),
        )  # fmt: skip
        found = to_supervision(instances, metadata)
        assert len(found) == n and found.mask is None
        assert found.data["class_name"].tolist() == ["date"] * n
    instances.pred_masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    found = to_supervision(instances[:0], metadata)
    assert len(found) == 0 and len(sv.Detections.merge([found, found])) == 0


def test_detections_can_be_drawn_tracked_and_counted_by_supervision(predictor, image):
    found = to_supervision(predictor(image)["instances"], predictor.metadata)
    found = found[found.confidence >= predictor.threshold]
    labels = [f"{name} {score:.2f}" for name, score in zip(found["class_name"], found.confidence)]
    drawn = sv.MaskAnnotator().annotate(image.copy(), found)
    drawn = sv.LabelAnnotator().annotate(drawn, found, labels=labels)
    assert drawn.shape == image.shape and (drawn != image).any()
    zone = sv.PolygonZone(np.array([[0, 0], [9999, 0], [9999, 9999], [0, 9999]]))
    assert zone.trigger(found).all()


def test_missing_supervision_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="to_supervision needs the package supervision"):
        to_supervision(None, None)
