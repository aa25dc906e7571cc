"""Exported models give the same detections in processes that cannot import this project."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import published, small_mask_rcnn
from detectron2.modeling import build_model
from torchvision.ops import box_iou

from gnws_d2 import Predictor, model_zoo
from gnws_d2.data import OpenCVDatasetMapper
from gnws_d2.export import export, export_model, fold_model
from gnws_d2.utils.errors import RunError, UserError

NETWORKS = {
    name: "ci" if name == "mask_rcnn_X50_32x4d_gnws_2x" else "slow"
    for name in model_zoo.names()[:8]
}

CLASSES = ["circle", "square", "triangle"]
FORMATS = {
    "folded": ["config.yaml", "model.pth"],
    "torchscript": ["model.ts"],
    "onnx": ["model.onnx"],
}
# Programs that use a file: from images to detections.
USERS = {
    "folded": """
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
cfg.merge_from_file("config.yaml")
cfg.MODEL.DEVICE = "cpu"
model = DefaultPredictor(cfg).model
def detect(image):
    with torch.no_grad():
        fields = model.inference([{"image": torch.from_numpy(image)}], do_postprocess=False)[0]
    fields = fields.get_fields()
    return {k: v.tensor if k == "pred_boxes" else v for k, v in fields.items()}
""",
    "torchscript": """
sys.modules["detectron2"] = None
import torch, torchvision
model = torch.jit.load("model.ts")
def detect(image):
    return model(torch.from_numpy(image))
""",
    "onnx": """
sys.modules["detectron2"] = sys.modules["torch"] = None
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
def detect(image):
    return dict(zip(names, session.run(names, {"image": image})))
""",
}


def run_user(format, directory, images):
    """Return the detections on `images` in a process that cannot import this project."""
    np.savez(directory / "images.npz", *images)
    code = f"""
import sys
sys.modules["gnws_d2"] = None
import numpy as np
{USERS[format]}
found = {{}}
for name, image in np.load("images.npz").items():
    found |= {{f"{{name}} {{k}}": np.asarray(v) for k, v in detect(image).items()}}
np.savez("found.npz", **found)
"""
    subprocess.run([sys.executable, "-c", code], cwd=directory, check=True)
    found = [{} for _ in images]
    for key, value in np.load(directory / "found.npz").items():
        image, name = key.split()
        found[int(image.removeprefix("arr_"))][name] = torch.from_numpy(value)
    return found


def assert_same(actual, expected):
    assert len(actual["scores"]) == len(expected)
    assert actual["pred_boxes"].shape == (len(expected), 4)
    assert ("pred_masks" in actual) == expected.has("pred_masks")
    if expected.has("pred_masks"):
        assert actual["pred_masks"].shape == (len(expected), 1, 28, 28)
    if not len(expected):
        return
    iou = box_iou(expected.pred_boxes.tensor, actual["pred_boxes"])
    iou *= expected.pred_classes[:, None] == actual["pred_classes"][None]
    best, partner = iou.max(dim=1)
    assert best.min() > 0.99
    assert len(set(partner.tolist())) == len(expected)
    assert (actual["scores"][partner] - expected.scores).abs().max() < 1e-3
    if expected.has("pred_masks"):
        difference = actual["pred_masks"][partner] - expected.pred_masks
        assert difference.abs().max() < 1e-2


def eager(cfg, images):
    """Return the detections of the reference implementation (MODEL.GNWS.KERNELS reference)."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE, cfg.MODEL.GNWS.KERNELS = "cpu", "reference"
    model = Predictor(cfg).model
    with torch.no_grad():
        return [
            model.inference([{"image": torch.from_numpy(image)}], do_postprocess=False)[0]
            for image in images
        ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_mask_rcnn(tmp_path_factory.mktemp("small") / "model.pth", CLASSES)


def read(cfg, *paths):
    mapper = OpenCVDatasetMapper(cfg, is_train=False)
    return [mapper({"file_name": str(path)})["image"].numpy() for path in paths]


@pytest.mark.parametrize("format", FORMATS)
def test_detections_are_the_same_on_images_of_any_size_and_without_objects(
    format, small, photographs, tmp_path
):
    none, image = read(small, *(photographs.images / f"{i}.jpg" for i in (2, 12)))
    wide, tall, tiny = image[:, 5:60, :], image[:, :, 10:50], image[:, :33, :40]
    images = [np.ascontiguousarray(i) for i in (none, image, wide, tall, tiny)]
    cfg = small.clone()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = eager(cfg, [none])[0].scores.max().item() + 2e-3
    expected = eager(cfg, images)
    assert [len(found) > 0 for found in expected] == [False, True, True, True, True]

    matched = export_model(cfg, format, str(tmp_path), str(photographs.images / "12.jpg"))
    assert matched == len(expected[1])
    assert sorted(os.listdir(tmp_path)) == FORMATS[format]
    for actual, instances in zip(run_user(format, tmp_path, images), expected):
        assert_same(actual, instances)
    assert read_classes(format, tmp_path) == CLASSES


def read_classes(format, directory):
    if format == "folded":
        return list(torch.load(directory / "model.pth")["classes"].values())
    if format == "torchscript":
        extra = {"classes": ""}
        torch.jit.load(directory / "model.ts", _extra_files=extra)
        return json.loads(extra["classes"])
    session = onnxruntime.InferenceSession(directory / "model.onnx")
    return json.loads(session.get_modelmeta().custom_metadata_map["classes"])


def test_onnx_file_names_and_types_its_inputs_and_outputs(small, photographs, tmp_path):
    export_model(small, "onnx", str(tmp_path), str(photographs.images / "2.jpg"))
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [17]

    def describe(value):
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return dtype, *(d.dim_param or d.dim_value for d in tensor.shape.dim)

    (image,) = model.graph.input
    assert image.name == "image" and describe(image) == ("uint8", 3, "height", "width")
    outputs = {output.name: describe(output) for output in model.graph.output}
    assert {name: (dtype, len(dims)) for name, (dtype, *dims) in outputs.items()} == {
        "pred_boxes": ("float32", 2),
        "scores": ("float32", 1),
        "pred_classes": ("int64", 1),
        "pred_masks": ("float32", 4),
    }
    assert {first for _, first, *_ in outputs.values()} == {"detections"}


def test_export_that_differs_is_an_error_and_leaves_the_old_files(
    small, photographs, tmp_path, monkeypatch
):
    def export_wrong(model, classes):
        with torch.no_grad():
            model.roi_heads.box_predictor.bbox_pred.bias += 1
        return to_torchscript(model, classes)

    to_torchscript = export.to_torchscript
    monkeypatch.setattr(export, "to_torchscript", export_wrong)
    (tmp_path / "model.ts").write_text("old")
    with pytest.raises(RunError, match=r"Nothing was written: on .*0\.jpg \d+ detections") as e:
        export_model(small, "torchscript", str(tmp_path), str(photographs.images / "0.jpg"))
    assert e.value.exit_status == 1
    assert os.listdir(tmp_path) == ["model.ts"]
    assert (tmp_path / "model.ts").read_text() == "old"


def test_export_without_detections_to_verify_is_an_error(small, photographs, tmp_path):
    cfg = small.clone()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.0
    with pytest.raises(UserError, match=r"detects nothing on .*0\.jpg"):
        export_model(cfg, "folded", str(tmp_path), str(photographs.images / "0.jpg"))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
@pytest.mark.parametrize("key", ["TEST.AUG.ENABLED", "MODEL.KEYPOINT_ON"])
def test_unsupported_config_is_refused(format, key, small, tmp_path):
    cfg = small.clone()
    cfg.merge_from_list([key, True])
    with pytest.raises(UserError, match=rf"^--format {format} needs .*{key} .*False"):
        export_model(cfg, format, str(tmp_path / "out"), "0.jpg")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["onnx", "folded"])
def test_model_that_cannot_be_exported_is_one_sentence(small, photographs, tmp_path, format):
    cfg = small.clone()
    if format == "onnx":
        pytest.importorskip("detectron2._C")
        cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    else:
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.RETINANET.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    with pytest.raises(UserError, match=f"^The export to {format} failed: ") as e:
        export_model(cfg, format, str(tmp_path / "out"), str(photographs.images / "0.jpg"))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_plain_group_norm_model_is_exported(small, photographs, tmp_path):
    cfg = small.clone()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    image = photographs.images / "2.jpg"
    assert export_model(cfg, "torchscript", str(tmp_path), str(image)) > 0
    (actual,) = run_user("torchscript", tmp_path, read(cfg, image))
    assert_same(actual, eager(cfg, read(cfg, image))[0])


def test_folded_model_and_config_are_detectron2s_own():
    cfg = model_zoo.get_config("quick_start")
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = math.inf
    cfg.OUTPUT_DIR = "1"
    folded, stock = fold_model(build_model(cfg), cfg)
    assert not any("gnws" in type(m).__module__ for m in folded.modules())
    assert stock.MODEL.RESNETS.NORM == "GN" and "GNWS" not in stock.dump()
    assert stock.MODEL.PROPOSAL_GENERATOR.NAME == "RPN"
    assert stock.SOLVER.CLIP_GRADIENTS.NORM_TYPE == math.inf and stock.OUTPUT_DIR == "1"


def test_missing_packages_are_named(small, photographs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install onnx onnxruntime$"):
        export_model(small, "onnx", str(tmp_path), str(photographs.images / "0.jpg"))


def test_mistake_in_a_path_is_one_sentence(small, photographs, tmp_path):
    image = str(photographs.images / "0.jpg")
    with pytest.raises(UserError, match=f"^There is no image at --images {tmp_path}"):
        export_model(small, "folded", str(tmp_path / "out"), str(tmp_path))
    with pytest.raises(UserError, match=f"File exists: '{image}'"):
        export_model(small, "folded", image, image)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=getattr(pytest.mark, mark)) for name, mark in NETWORKS.items()],
)
def test_every_network_in_every_format(name, photographs, tmp_path):
    cfg = published(name, tmp_path / "published.pth", size=120)
    images = read(cfg, photographs.images / "7.jpg")
    (expected,) = eager(cfg, images)
    assert len(expected) > 20
    cfg.INPUT.MIN_SIZE_TEST = 200
    for format in FORMATS:
        out = tmp_path / format
        export_model(cfg, format, str(out), str(photographs.images / "0.jpg"))
        (actual,) = run_user(format, out, images)
        assert_same(actual, expected)
