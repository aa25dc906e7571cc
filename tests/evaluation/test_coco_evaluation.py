"""The reference is COCOeval of pycocotools, on the same annotations and results."""

import contextlib
import copy
import io
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator as Detectron2sEvaluator
from detectron2.structures import Boxes, Instances, polygons_to_bitmask
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gnws_d2.data import register_coco_datasets
from gnws_d2.evaluation import COCOEvaluator, evaluate_results, read_truth
from gnws_d2.utils.errors import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture(params=["shapes_val", "fruits_evaluated"])
def dataset_name(request, photographs, shapes_root):
    register_coco_datasets(
        [["fruits_evaluated", str(photographs.json_file), str(photographs.images)]]
    )
    return request.param


def predict(record, rng):
    """Return the ground truth, moved a little, with some objects missing or of a wrong class."""
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
    if "keypoints" in str(record["annotations"]):
        keypoints = np.array([a["keypoints"] for a in annotations], float).reshape(
            len(boxes), -1, 3
        )
        keypoints[:, :, :2] += 3 * rng.randn(*keypoints[:, :, :2].shape)
        instances.pred_keypoints = torch.tensor(keypoints)
        return {"instances": instances}
    masks = [
        np.roll(polygons_to_bitmask(a["segmentation"], h, w), rng.randint(-3, 4, 2), (0, 1))
        for a in annotations
    ]
    instances.pred_masks = torch.as_tensor(np.array(masks).reshape(-1, h, w))
    return {"instances": instances}


def run_evaluator(evaluator, records):
    rng = np.random.RandomState(0)
    evaluator.reset()
    for record in records:
        evaluator.process([record], [predict(record, rng)])
    return evaluator.evaluate()


def run_pycocotools(truth, results, task):
    if task == "segm":  # with a box, pycocotools takes the box's area for the mask's
        results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
    detections = COCO()  # loadRes takes no empty list
    detections.dataset = {**truth.dataset, "annotations": []}
    detections.createIndex()
    if results:
        detections = truth.loadRes(copy.deepcopy(results))
    evaluation = COCOeval(truth, detections, task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("objects", [True, False])
def test_ap_equals_pycocotools(dataset_name, tmp_path, objects):
    """Also of no predictions at all."""
    records = DatasetCatalog.get(dataset_name)
    records = records if objects else [{**record, "annotations": []} for record in records]
    evaluator = COCOEvaluator(dataset_name, ("bbox", "segm"), output_dir=str(tmp_path))
    results = run_evaluator(evaluator, records)
    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    truth = COCO(MetadataCatalog.get(dataset_name).json_file)
    assert bool(predictions) == objects
    for task in ("bbox", "segm"):
        stats = run_pycocotools(truth, predictions, task).stats[:6]
        expected = [100 * value if value >= 0 else np.nan for value in stats]
        assert [results[task][name] for name in METRICS] == pytest.approx(expected, nan_ok=True)
        assert 20 < results[task]["AP"] < 90 if objects else results[task]["AP"] == 0


def test_dataset_without_a_file_is_evaluated_as_by_detectron2(shapes_root, tmp_path):
    """A dataset that is registered as a function, which Detectron2 converts to COCO format."""
    records = DatasetCatalog.get("shapes_val")
    DatasetCatalog.register("of_a_function", lambda: records)
    MetadataCatalog.get("of_a_function").thing_classes = ["circle", "square", "triangle"]
    results = []
    for evaluator_class in (COCOEvaluator, Detectron2sEvaluator):
        output_dir = str(tmp_path / evaluator_class.__module__)
        evaluator = evaluator_class(
            "of_a_function", ("bbox",), output_dir=output_dir, use_fast_impl=False
        )
        results.append(run_evaluator(evaluator, records))
    DatasetCatalog.remove("of_a_function")
    MetadataCatalog.remove("of_a_function")
    np.testing.assert_equal(*results)
    assert 20 < results[0]["bbox"]["AP"] < 90


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    return tmp_path_factory.mktemp("generated") / "truth.json"


SIZES = (3, 31, 32, 33, 60, 95, 96, 97)  # areas just under, at and over those of APs, APm and APl


def rectangle(height, width, x, y, w, h):
    """A mask as it is in JSON."""
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_util.encode(mask)
    return {**rle, "counts": rle["counts"].decode()}


def generate_case(rng):
    """
    Return ground truth and results with crowds, ties in scores, more than 100 detections, areas at
    the edges of their ranges, gaps in the ids, images without objects or detections, and classes
    without objects.
    """
    width, height = 200, 160
    image_ids = sorted(rng.choice(1000, rng.integers(1, 5), replace=False).tolist())
    category_ids = sorted(rng.choice(range(1, 91), rng.integers(1, 4), replace=False).tolist())
    annotations, results = [], []
    for id in rng.choice(10_000, rng.integers(0, 16), replace=False).tolist():
        x, y = rng.integers(0, 100, 2).tolist()
        w, h = rng.choice(SIZES, 2).tolist()
        outline = [x, y, x + w, y, x + w, y + h] + [x, y + h] * int(rng.integers(2))
        segmentation = [[float(v) for v in outline]]
        crowd = int(rng.random() < 0.15)
        if crowd or rng.random() < 0.2:
            segmentation = rectangle(height, width, x, y, w, h)
        keypoints = np.stack([*rng.integers(0, 160, (2, 17)), rng.integers(0, 3, 17)], axis=1)
        annotations.append({
            "id": id + 1, "image_id": int(rng.choice(image_ids)), "iscrowd": crowd,
            "category_id": int(rng.choice(category_ids)), "bbox": [x, y, w, h],
            "area": float(w * h * rng.choice([1, 0.5])), "segmentation": segmentation,
            "keypoints": keypoints.ravel().tolist(),
            "num_keypoints": int((keypoints[:, 2] > 0).sum()),
        })  # fmt: skip
    repeats = 60 if annotations and rng.random() < 0.1 else 3
    for a in annotations:
        for _ in range(rng.integers(0, repeats)):
            box = (np.array(a["bbox"]) + rng.integers(-4, 5, 4)).clip(1).tolist()
            near = np.array(a["keypoints"], float) + rng.integers(-3, 4, 51)
            results.append({
                "image_id": a["image_id"] if rng.random() < 0.9 else int(rng.choice(image_ids)),
                "category_id": int(rng.choice([a["category_id"], *category_ids])), "bbox": box,
                "score": float(rng.choice([0.1, 0.25, 0.5, 0.75, 1.0])),
                "segmentation": rectangle(height, width, *box), "keypoints": near.tolist(),
            })  # fmt: skip
    images = [{"id": i, "width": width, "height": height, "file_name": "a"} for i in image_ids]
    categories = [{"id": i, "name": str(i)} for i in category_ids]
    return {"images": images, "categories": categories, "annotations": annotations}, results


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
@given(st.integers(0, 2**32 - 1))
def test_generated_cases_equal_pycocotools_to_the_last_digit(task, json_file, seed):
    """For a longer run: pytest tests/evaluation --hypothesis-profile fuzz --hypothesis-seed 0."""
    truth, results = generate_case(np.random.default_rng(seed))
    json_file.write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(json_file))
        expected = run_pycocotools(coco, results, task)
        ours = evaluate_results(read_truth(str(json_file)), results, task, max_dets=100)
    np.testing.assert_array_equal(ours.stats, expected.stats)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(ours.eval[name], expected.eval[name])


@pytest.mark.parametrize(
    "result",
    [
        {"image_id": 99_999, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5},
        {"image_id": 1},
        {"image_id": 1, "bbox": [0, 0, 1, 1]},
        3,
    ],
)
def test_results_of_another_dataset_or_format_are_an_error(result, json_file):
    truth, _ = generate_case(np.random.default_rng(1))
    truth["images"].append({**truth["images"][0], "id": 1})
    json_file.write_text(json.dumps(truth))
    message = r"results of other images|without bbox|another format|missing 'category_id'"
    with pytest.raises(ValueError, match=message):
        evaluate_results(read_truth(str(json_file)), [result], "bbox")


def test_ids_that_are_strings_are_an_error_that_names_the_file(json_file):
    truth, _ = generate_case(np.random.default_rng(1))
    truth["images"][0]["id"] = "a"
    json_file.write_text(json.dumps(truth))
    with pytest.raises(UserError, match=f"hotcoco cannot read the annotation file {json_file}"):
        read_truth(str(json_file))


def test_predictions_are_kept_when_ap_fails(dataset_name, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("gnws_d2.evaluation.coco_evaluation.evaluate_results", fail)
    records = DatasetCatalog.get(dataset_name)
    evaluator = COCOEvaluator(dataset_name, ("bbox", "segm"), output_dir=str(tmp_path))
    with pytest.raises(MemoryError):
        run_evaluator(evaluator, records)
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) > 20
