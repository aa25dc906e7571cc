import json

import cv2
import numpy as np
import pytest
import torch
from builders import coco
from conftest import published
from detectron2.modeling import build_model

from gnws_d2 import Predictor
from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.data import register_coco_datasets
from gnws_d2.engine import Trainer
from gnws_d2.prediction.test_time_augmentation import OpenCVDatasetMapperTTA, with_tta
from gnws_d2.utils.errors import UserError


def get_config(tmp_path, tta=True):
    cfg = published("mask_rcnn_R50_gnws_2x", tmp_path / "w.pth", size=100, num_proposals=20)
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES = tta, (120, 200)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


def test_images_are_resized_once_by_opencv_and_mirrored(tmp_path):
    image = np.random.RandomState(0).randint(0, 256, (90, 150, 3), np.uint8)
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    record = {"image": tensor, "height": 90, "width": 150, "file_name": "a.jpg"}
    augmented = OpenCVDatasetMapperTTA(get_config(tmp_path))(record)
    assert [tuple(d["image"].shape[1:]) for d in augmented] == [(120, 200)] * 2 + [(200, 333)] * 2
    for plain, mirrored in (augmented[:2], augmented[2:]):
        height, width = plain["image"].shape[1:]
        expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(plain["image"].numpy().transpose(1, 2, 0), expected)
        assert np.array_equal(mirrored["image"].numpy().transpose(1, 2, 0), expected[:, ::-1])
        box = np.array([[10.0, 20, 70, 80]])
        for d in (plain, mirrored):
            back = d["transforms"].inverse().apply_box(d["transforms"].apply_box(box))
            assert np.allclose(back, box)


@pytest.mark.ci
def test_evaluation_and_prediction_are_augmented(tmp_path, photographs):
    """The ground truth is what the model finds without, where its AP is 100."""
    cfg = get_config(tmp_path, tta=False)
    name = "0.jpg"
    image = cv2.imread(str(photographs.images / name))
    plain = Predictor(cfg)(image)["instances"]
    height, width = image.shape[:2]
    boxes = plain.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    found = zip(plain.pred_classes.tolist(), boxes.tolist())
    objects = [(name, str(c), box) for c, box in found]
    truth = coco({name: (width, height)}, objects, [*map(str, range(80))])
    (tmp_path / "own.json").write_text(json.dumps(truth))
    register_coco_datasets([("own_tta", str(tmp_path / "own.json"), str(photographs.images))])
    aps = {}
    for tta in (False, True):
        cfg = get_config(tmp_path, tta)
        cfg.TEST.AUG.MIN_SIZES = (80, 120)
        cfg.DATASETS.TEST = ("own_tta",)
        model = build_model(cfg)
        GNWSCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        aps[tta] = Trainer.test(cfg, model)["bbox"]["AP"]
        found = Predictor(cfg)(image)["instances"]
        results = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
        scores = sorted(r["score"] for r in results)
        assert scores == pytest.approx(sorted(found.scores.tolist()), rel=1e-4)
        assert found.has("pred_masks") and found.image_size == (height, width)
    assert aps[False] > 95 and 0 < aps[True] < aps[False] - 1


def test_model_that_cannot_be_augmented_is_refused(tmp_path):
    cfg = get_config(tmp_path)
    with pytest.raises(UserError, match=r"TEST\.AUG\.ENABLED is for"):
        with_tta(cfg, torch.nn.Linear(1, 1))
