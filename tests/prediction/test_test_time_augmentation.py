import copy
import json

import cv2
import numpy as np
import pytest
import torch
from conftest import mmdet_state
from detectron2.modeling import build_model

from gnws_d2 import Predictor, model_zoo
from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.data import register_coco_datasets
from gnws_d2.engine import Trainer
from gnws_d2.prediction.test_time_augmentation import OpenCVDatasetMapperTTA, with_tta
from gnws_d2.utils.errors import UserError


def get_config(tmp_path, tta=True):
    torch.save({"meta": {}, "state_dict": mmdet_state("mask_rcnn_R50_gnws_2x")}, tmp_path / "w.pth")
    cfg = model_zoo.get_config("mask_rcnn_R50_gnws_2x")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", str(tmp_path / "w.pth")
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.INPUT.MIN_SIZE_TEST = 100
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
    annotations = [
        {
            "id": i, "image_id": 1, "category_id": c, "bbox": box, "iscrowd": 0,
            "area": box[2] * box[3], "segmentation": [[0, 0, 9, 0, 9, 9]],
        }
        for i, (c, box) in enumerate(zip(plain.pred_classes.tolist(), boxes.tolist()), 1)
    ]  # fmt: skip
    coco = {
        "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
        "categories": [{"id": i, "name": str(i)} for i in range(80)],
        "annotations": annotations,
    }
    (tmp_path / "own.json").write_text(json.dumps(coco))
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
    cfg = copy.deepcopy(get_config(tmp_path))
    with pytest.raises(UserError, match=r"TEST\.AUG\.ENABLED is for"):
        with_tta(cfg, torch.nn.Linear(1, 1))
