"""Int8 ONNX files run in ONNX Runtime, and are written only if AP is kept."""

import contextlib
import io
import json
import logging
import os
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Photographs, small_mask_rcnn
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.logger import setup_logger
from onnx import numpy_helper

from gnws_d2 import Predictor
from gnws_d2.data import OpenCVDatasetMapper, register_coco_datasets
from gnws_d2.engine import Trainer
from gnws_d2.export import detect, export, export_model, quantize
from gnws_d2.export.quantize import evaluate_detector
from gnws_d2.utils.errors import RunError, UserError

TOOL = str(Path(__file__).parent.parent.parent / "tools" / "export_model.py")
CLASSES = ["circle", "square", "triangle"]
IMAGES = Photographs.images


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model, and a dataset whose objects are half of its detections."""
    root = tmp_path_factory.mktemp("small")
    cfg = small_mask_rcnn(root / "model.pth", CLASSES)
    coco = {"images": [], "annotations": []}
    coco["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    predictor, mapper = Predictor(cfg), OpenCVDatasetMapper(cfg, is_train=False)
    for record in Photographs().coco()["images"][:4]:
        image = mapper({"file_name": str(IMAGES / record["file_name"])})
        with torch.no_grad():
            (output,) = predictor.model([record | image])
        coco["images"].append(record)
        for found in instances_to_coco_json(output["instances"], record["id"])[:20:2]:
            found["category_id"] += 1
            area = found["bbox"][2] * found["bbox"][3]
            found |= {"id": len(coco["annotations"]) + 1, "iscrowd": 0, "area": area}
            coco["annotations"].append(found)
    (root / "found.json").write_text(json.dumps(coco))
    cfg.DATASETS.COCO = [["int8_found", str(root / "found.json"), str(IMAGES)]]
    cfg.DATASETS.TEST = ("int8_found",)
    register_coco_datasets(cfg.DATASETS.COCO)
    yield cfg
    for catalog in (DatasetCatalog, MetadataCatalog):  # a worker may come back to this module
        catalog.remove("int8_found")


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The float32 and the int8 file, and the output of the tool."""
    out, printed, float32 = tmp_path_factory.mktemp("exported"), io.StringIO(), []
    argv = ["--config-file", "quick_start", "--format", "onnx", "--int8", "--max-drop", "100"]
    argv += ["--images", str(IMAGES), "--output", str(out), "--dataset", *small.DATASETS.COCO[0]]
    argv += ["MODEL.WEIGHTS", small.MODEL.WEIGHTS, "DATASETS.TEST", "('int8_found', 'shapes_val')"]

    def record(data, images):
        float32.append(data)
        return quantize_onnx(data, images)

    quantize_onnx = quantize.quantize_onnx
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        setup_logger.cache_clear()  # log to this stdout
        for name in ("gnws_d2", "detectron2.evaluation.evaluator"):
            patch.setattr(logging.getLogger(name), "handlers", [])
        patch.setattr(quantize, "quantize_onnx", record)
        patch.setattr(export, "_MAX_CALIBRATION_IMAGES", 7)
        patch.setattr(sys, "argv", [TOOL, *argv])
        runpy.run_path(TOOL, run_name="__main__")
    assert os.listdir(out) == ["model_int8.onnx"]  # alone
    return float32[0], (out / "model_int8.onnx").read_bytes(), printed.getvalue()


def test_convolutions_are_int8_and_the_interface_is_kept(exported, tmp_path):
    before, after = map(onnx.load_from_string, exported[:2])
    onnx.checker.check_model(after, full_check=True)
    names = [{p.key: p.value for p in m.metadata_props}["classes"] for m in (before, after)]
    assert names == [json.dumps(CLASSES)] * 2
    assert list(after.opset_import) == list(before.opset_import)
    for field in ("input", "output"):
        assert list(getattr(after.graph, field)) == list(getattr(before.graph, field))
    nodes = {output: node for node in after.graph.node for output in node.output}
    weights = {w.name: numpy_helper.to_array(w) for w in after.graph.initializer}
    convs = [node for node in after.graph.node if node.op_type == "Conv"]
    assert len(convs) == sum(node.op_type == "Conv" for node in before.graph.node) > 50
    for conv in convs:
        data, weight = (nodes[name] for name in conv.input[:2])
        assert (data.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert nodes[data.input[0]].op_type == "QuantizeLinear"
        assert weights[data.input[2]].dtype == np.uint8
        values, scales, _ = (weights[name] for name in weight.input)
        assert values.dtype == np.int8 and abs(values.astype(int)).max() <= 64
        assert scales.shape == values.shape[:1]
    assert len(exported[1]) < 0.5 * len(exported[0])
    # ONNX Runtime computes them in int8.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(exported[1], options, providers=["CPUExecutionProvider"])
    computed = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert computed.count("QLinearConv") == len(convs) and "Conv" not in computed


def test_ap_is_the_same_as_in_training(small, exported, tmp_path):
    cfg = small.clone()
    cfg.OUTPUT_DIR = str(tmp_path)
    model = Predictor(cfg).model
    expected = {task: metrics["AP"] for task, metrics in Trainer.test(cfg, model).items()}
    assert expected.keys() == {"bbox", "segm"} and 5 < min(expected.values()) < 95
    assert evaluate_detector(cfg, partial(detect, model)) == expected

    printed = exported[2]
    assert "on 6 images" in printed  # every third of 18
    pattern = r"(\w+) on int8_found: box AP ([\d.]+), mask AP ([\d.]+), ([\d.]+) MB, [\d.]+ s/im"
    float32, int8 = re.findall(pattern, printed)
    assert (float32[0], int8[0]) == ("float32", "int8")
    for i, task in ((1, "bbox"), (2, "segm")):
        assert float(float32[i]) == pytest.approx(expected[task], abs=0.1)
    assert float(int8[1]) < float(float32[1]) - 1  # random weights have no margin
    sizes = [float32[3], int8[3]]
    assert sizes == [f"{len(data) / 1e6:.1f}" for data in exported[:2]]


def test_ap_that_falls_is_an_error_and_keeps_the_old_files(small, tmp_path):
    (tmp_path / "model_int8.onnx").write_text("old")
    message = r"^Nothing was written: in int8, \w+ AP on int8_found falls .* --max-drop 0\.5\.$"
    with pytest.raises(RunError, match=message) as e:
        export_model(small, "onnx", str(tmp_path), str(IMAGES / "3.jpg"), int8_max_drop=0.5)
    assert e.value.exit_status == 1
    assert os.listdir(tmp_path) == ["model_int8.onnx"]
    assert (tmp_path / "model_int8.onnx").read_text() == "old"


@pytest.mark.parametrize(
    "opts, message",
    [
        (["DATASETS.TEST", ()], r"^DATASETS\.TEST is empty: name a dataset to measure the AP of"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 4], "the dataset int8_found has 3 classes"),
    ],
)
def test_dataset_is_checked_before_work(opts, message, small, tmp_path):
    cfg = small.clone()
    cfg.merge_from_list(opts)
    with pytest.raises(UserError, match=message):
        export_model(cfg, "onnx", str(tmp_path / "out"), "0.jpg", int8_max_drop=1.0)
    assert not (tmp_path / "out").exists()


def test_dataset_without_objects_is_an_error(small, tmp_path):
    coco = json.loads(Path(small.DATASETS.COCO[0][1]).read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**coco, "annotations": []}))
    register_coco_datasets([["int8_empty", str(tmp_path / "empty.json"), str(IMAGES)]])
    cfg = small.clone()
    cfg.DATASETS.TEST = ("int8_empty",)
    none = {"pred_boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
    none |= {"pred_classes": torch.zeros(0, dtype=int), "pred_masks": torch.zeros(0, 1, 28, 28)}
    with pytest.raises(
        UserError, match=r"^The dataset int8_empty has no objects to compute AP with"
    ):
        evaluate_detector(cfg, lambda image: none)
