import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import published
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from gnws_d2 import Predictor, model_zoo
from gnws_d2.checkpoint import GNWSCheckpointer, catalog
from gnws_d2.config import load_config
from gnws_d2.data.transforms import OpenCVResizeShortestEdge
from gnws_d2.prediction import find_trained
from gnws_d2.utils.errors import UserError

NAMES = model_zoo.names()[:8]


def networks(*fast):
    """One of each network, all but `fast` in the slow tests."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in fast]
    return pytest.mark.parametrize("name", [*fast, *slow])


def assert_equal(a, b, **tolerance):
    assert len(a) == len(b) > 10
    # Rounding decides the order of detections whose scores are nearly equal.
    places = [torch.cat([i.pred_boxes.tensor, 1e4 * i.pred_classes[:, None]], 1) for i in (a, b)]
    nearest = torch.cdist(*places, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(len(b)))
    b = b[nearest]
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, **tolerance)
    torch.testing.assert_close(a.scores, b.scores, **tolerance)
    assert torch.equal(a.pred_classes, b.pred_classes)
    if a.has("pred_masks"):
        assert (a.pred_masks != b.pred_masks).float().mean() < 1e-4


@networks("mask_rcnn_R50_gnws_2x")
def test_every_way_to_load_gives_the_same_detections(
    name, photographs, server, gnws, tmp_path, monkeypatch
):
    """gnws:// over HTTP, in stock Detectron2 and ours; the raw file, in ours and train_net.py."""
    path = tmp_path / "published.pth"
    cfg = published(name, path)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    data = path.read_bytes()
    file_name = f"published-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    server.files[file_name] = data
    url = f"{server.url}/{file_name}"
    monkeypatch.setattr(catalog, "checkpoint_urls", lambda: {name: url})
    # Stock Detectron2 resizes with Pillow; the same resize shows that the weights are the same.
    monkeypatch.setattr("detectron2.data.transforms.ResizeShortestEdge", OpenCVResizeShortestEdge)

    photograph = photographs.images / "0.jpg"
    image = cv2.imread(str(photograph))
    expected = Predictor(cfg)(image)["instances"]
    catalog_cfg = cfg.clone()
    catalog_cfg.MODEL.WEIGHTS = f"gnws://{name}"
    assert_equal(Predictor(catalog_cfg)(image)["instances"], expected, rtol=0, atol=0)
    # It standardizes the weights in each forward, with another rounding.
    stock = DefaultPredictor(catalog_cfg)(image)["instances"]
    assert_equal(stock, expected, rtol=1e-3, atol=1e-2)
    monkeypatch.undo()

    categories = [{"id": i, "name": str(i)} for i in range(80)]
    coco = photographs.coco(1) | {"annotations": [], "categories": categories}
    (tmp_path / "one.json").write_text(json.dumps(coco))
    dataset = f"one_{name}"
    status, _, _ = gnws(
        "eval", "--config-file", model_zoo.get_config_file(name),
        "--dataset", dataset, str(tmp_path / "one.json"), str(photographs.images),
        "DATASETS.TEST", f"('{dataset}',)", "MODEL.WEIGHTS", str(path), "MODEL.DEVICE", "cpu",
        "INPUT.MIN_SIZE_TEST", "200", "MODEL.RPN.POST_NMS_TOPK_TEST", "100",
        "OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", "0",
    )  # fmt: skip
    assert status == 0
    results = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert [r["score"] for r in results] == pytest.approx(expected.scores.tolist())
    assert [r["category_id"] for r in results] == expected.pred_classes.tolist()
    boxes = torch.tensor([r["bbox"] for r in results])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor)


def test_images_are_batched(photographs, tmp_path):
    predictor = Predictor(published("faster_rcnn_R50_gnws_1x", tmp_path / "published.pth"))
    images = [cv2.imread(str(photographs.images / f"{i}.jpg")) for i in range(2)]
    for output, image in zip(predictor(images), images):
        assert output["instances"].image_size == image.shape[:2]
        assert_equal(output["instances"], predictor(image)["instances"], rtol=1e-3, atol=1e-3)


@pytest.fixture
def run_dir(tmp_path):
    """OUTPUT_DIR of a run with two classes, on datasets that are gone."""
    path = tmp_path / "run"
    path.mkdir()
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "DATASETS.TEST", "('gone_val',)"]
    cfg = load_config("quick_start", opts, [["gone_val", "gone.json", "gone"]])
    (path / "config.yaml").write_text(cfg.dump())
    checkpointer = GNWSCheckpointer(build_model(cfg), str(path), classes={5: "fig", 9: "date"})
    for name in ("model_0000001", "model_best", "model_final"):
        checkpointer.save(name)
    yield path
    MetadataCatalog.pop("gone_val", None)


@pytest.mark.parametrize("given", ["run", "run/model_0000001.pth"])
def test_run_or_checkpoint_is_enough_and_has_the_class_names(run_dir, given):
    opts = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    predictor = Predictor.from_pretrained(str(run_dir.parent / given), opts)
    names = predictor.metadata.thing_classes
    assert names == ["fig", "date"]
    assert predictor.metadata.thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}
    assert "gone_val" not in DatasetCatalog
    assert MetadataCatalog.get("gone_val").get("thing_classes") is None
    assert predictor.cfg.MODEL.DEVICE == "cpu"
    found = predictor(np.zeros((64, 64, 3), np.uint8))["instances"]
    assert set(found.pred_classes.tolist()) <= {0, 1} and len(found)


def test_two_runs_on_datasets_of_the_same_name_have_their_own_classes(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "other")
    cfg = load_config(str(run_dir / "config.yaml"), [], [["gone_val", "other.json", "other"]])
    (tmp_path / "other" / "config.yaml").write_text(cfg.dump())
    GNWSCheckpointer(
        build_model(cfg), str(tmp_path / "other"), classes={1: "kiwi", 2: "pear"}
    ).save("model_best")
    for path, names in ((run_dir, ["fig", "date"]), (tmp_path / "other", ["kiwi", "pear"])):
        assert Predictor.from_pretrained(str(path)).metadata.thing_classes == names


def test_best_checkpoint_of_a_run_is_used_or_else_the_last(run_dir):
    def weights():
        return find_trained(str(run_dir)).MODEL.WEIGHTS

    assert weights() == str(run_dir / "model_best.pth")
    (run_dir / "model_best.pth").unlink()
    assert weights() == str(run_dir / "model_final.pth")
    (run_dir / "model_final.pth").unlink()
    (run_dir / "last_checkpoint").write_text("model_0000001.pth")
    assert weights() == str(run_dir / "model_0000001.pth")
    (run_dir / "model_0000001.pth").unlink()
    with pytest.raises(UserError, match="run is not a trained model"):
        weights()


def test_checkpoints_of_an_earlier_run_in_the_same_directory_are_not_used(run_dir):
    def record(best, last):
        starts = [{"best_checkpoint": best, "last_checkpoint": last}]
        (run_dir / "run.json").write_text(json.dumps(starts))
        return str(run_dir)

    with pytest.raises(UserError, match="run is not a trained model"):
        find_trained(record("", ""))
    shutil.copy(run_dir / "model_final.pth", run_dir / "model_0000003.pth")
    weights = find_trained(record("", "model_0000003.pth")).MODEL.WEIGHTS
    assert weights == str(run_dir / "model_0000003.pth")
    weights = find_trained(record("model_best.pth", "model_0000003.pth")).MODEL.WEIGHTS
    assert weights == str(run_dir / "model_best.pth")


def test_config_in_a_checkpoint_comes_before_config_yaml(run_dir, tmp_path):
    cfg = load_config(str(run_dir / "config.yaml"), [])
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 77
    checkpointer = GNWSCheckpointer(build_model(cfg), str(tmp_path), config=cfg.dump())
    checkpointer.save("alone")
    alone = str(tmp_path / "alone.pth")  # without config.yaml
    assert find_trained(alone).INPUT.MIN_SIZE_TEST == 77
    (run_dir / "model_best.pth").write_bytes((tmp_path / "alone.pth").read_bytes())
    (run_dir / "config.yaml").write_text("VERSION: 2\nINPUT:\n  MIN_SIZE_TEST: 99\n")
    assert find_trained(str(run_dir)).INPUT.MIN_SIZE_TEST == 77
    assert find_trained(str(run_dir), ["INPUT.MIN_SIZE_TEST", 55]).INPUT.MIN_SIZE_TEST == 55
    assert find_trained(str(run_dir / "model_final.pth")).INPUT.MIN_SIZE_TEST == 99


def test_what_is_not_a_trained_model_is_named(run_dir, tmp_path):
    (run_dir / "config.yaml").unlink()
    stock = tmp_path / "stock.pth"
    torch.save({"model": {}}, stock)
    for model in ("mask_rcnn_R50", "", f"{run_dir}/gone", tmp_path, stock, tmp_path / "gone.pth"):
        with pytest.raises(UserError, match=f"{model} is not a trained model"):
            find_trained(str(model))


def test_name_in_place_of_a_config_is_told():
    with pytest.raises(UserError, match=r"use Predictor.from_pretrained\('output/mine'\)"):
        Predictor("output/mine")


def test_run_comes_before_a_published_model_of_the_same_name(run_dir, monkeypatch):
    name = "mask_rcnn_R50_gnws_2x"
    monkeypatch.chdir(run_dir.parent)
    Path(name).mkdir()
    (Path(name) / "photograph.jpg").touch()  # not a run
    assert find_trained(name).MODEL.WEIGHTS == f"gnws://{name}"
    shutil.rmtree(name)
    run_dir.rename(name)
    assert find_trained(name).MODEL.WEIGHTS == f"{name}/model_best.pth"
