"""The reference is pycocotools' own COCOeval, on the results file that the evaluator wrote."""

import copy
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances, polygons_to_bitmask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gnws_d2.data import register_coco_datasets
from gnws_d2.evaluation import COCOEvaluator

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture(params=["shapes_val", "fruits_evaluated"])
def dataset_name(request, photographs, shapes_root):
    register_coco_datasets(
        [["fruits_evaluated", str(photographs.json_file), str(photographs.images)]]
    )
    return request.param


def predict(record, rng):
    """The ground truth, moved a little, some of it missing or of a wrong class."""
    h, w = record["height"], record["width"]
    instances = Instances((h, w))
    annotations = [a for a in record["annotations"] if rng.rand() < 0.8]
    boxes = np.array([a["bbox"] for a in annotations]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes += rng.randn(*boxes.shape) * w * 0.01
    instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
    instances.scores = torch.as_tensor(rng.rand(len(boxes)), dtype=torch.float32)
    classes = [a["category_id"] if rng.rand() < 0.8 else rng.randint(3) for a in annotations]
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    masks = [
        np.roll(polygons_to_bitmask(a["segmentation"], h, w), rng.randint(-3, 4, 2), (0, 1))
        for a in annotations
    ]
    instances.pred_masks = torch.as_tensor(np.array(masks).reshape(-1, h, w))
    return {"instances": instances}


def evaluate(dataset_name, output_dir, predict):
    dataset = DatasetCatalog.get(dataset_name)
    evaluator = COCOEvaluator(dataset_name, ("bbox", "segm"), str(output_dir))
    evaluator.reset()
    for record in dataset:
        evaluator.process([record], [predict(record)])
    return evaluator.evaluate()


def coco_eval(ground_truth, detections, task):
    evaluation = COCOeval(ground_truth, detections, task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [value * 100 if value >= 0 else float("nan") for value in evaluation.stats[:6]]


def test_ap_equals_pycocotools(dataset_name, tmp_path):
    rng = np.random.RandomState(0)
    results = evaluate(dataset_name, tmp_path, lambda record: predict(record, rng))
    ground_truth = COCO(MetadataCatalog.get(dataset_name).json_file)
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    for task in ("bbox", "segm"):
        given = copy.deepcopy(predictions)
        if task == "segm":  # with a box, pycocotools takes the box's area for the mask's
            for prediction in given:
                del prediction["bbox"]
        expected = coco_eval(ground_truth, ground_truth.loadRes(given), task)
        assert [results[task][name] for name in METRICS] == pytest.approx(expected, nan_ok=True)
        assert 20 < results[task]["AP"] < 90


def test_no_predictions_have_ap_zero_as_in_pycocotools(dataset_name, tmp_path):
    results = evaluate(
        dataset_name, tmp_path, lambda record: predict({**record, "annotations": []}, np.random)
    )
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
    ground_truth = COCO(MetadataCatalog.get(dataset_name).json_file)
    no_detections = COCO()
    no_detections.dataset = dict(ground_truth.dataset, annotations=[])
    no_detections.createIndex()
    for task in ("bbox", "segm"):
        expected = coco_eval(ground_truth, no_detections, task)
        assert [results[task][name] for name in METRICS] == pytest.approx(expected, nan_ok=True)
        assert results[task]["AP"] == 0
