import json
import multiprocessing
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import run_python
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import polygons_to_bitmask

from gnws_d2.data.shapes import CLASSES, generate_shapes, load_shapes


def read(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_arguments_give_the_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate_shapes(str(tmp_path / name), 5, seed)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert len(a) == 6
    assert a == b and a.keys() == c.keys() and a != c


def test_polygons_cover_what_is_drawn(tmp_path):
    """Inside a polygon the image has one colour, and just outside another."""
    generate_shapes(str(tmp_path / "shapes"), 20, 0)
    coco = json.loads((tmp_path / "shapes" / "annotations.json").read_text())
    seen = set()
    for annotation in coco["annotations"]:
        record = coco["images"][annotation["image_id"] - 1]
        image = cv2.imread(str(tmp_path / "shapes" / "images" / record["file_name"])).astype(int)
        mask = polygons_to_bitmask(annotation["segmentation"], *image.shape[:2])
        kernel = np.ones((5, 5), np.uint8)
        inside = cv2.erode(mask.astype(np.uint8), kernel).astype(bool)
        outside = cv2.dilate(mask.astype(np.uint8), kernel).astype(bool) & ~mask
        outside &= ~cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        color = image[inside][0]
        assert (image[inside] == color).all()
        # But for the tips of acute corners, which OpenCV draws longer.
        assert (image[outside] != color).any(axis=1).mean() > 0.98
        ys, xs = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        np.testing.assert_allclose(
            [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [x, y, x + w, y + h], atol=1.5
        )
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.1)
        seen.add(annotation["category_id"])
    assert seen == {1, 2, 3}


def test_registered_splits_are_disjoint_and_have_metadata(shapes_root):
    images = {}
    for name, size in (("shapes_train", 1000), ("shapes_val", 100)):
        dataset = DatasetCatalog.get(name)
        assert len(dataset) == size and all(record["annotations"] for record in dataset)
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == list(CLASSES)
        assert Path(metadata.json_file).is_file()
        images[name] = {Path(record["file_name"]).read_bytes() for record in dataset}
        assert len(images[name]) == size
    assert not images["shapes_train"] & images["shapes_val"]


def _load(datasets):
    import os

    os.environ["DETECTRON2_DATASETS"] = datasets
    return len(load_shapes("shapes_val"))


@pytest.mark.ci
def test_several_processes_generate_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_load, [str(tmp_path)] * 2) == [100] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes_val", "shapes_val.lock"]


def test_evaluator_can_be_built_before_the_dataset_is_loaded(tmp_path):
    code = (
        "from gnws_d2.evaluation import COCOEvaluator\nfor name in ('shapes_val', 'shapes_train'):"
    )
    code += " COCOEvaluator(name, ('bbox',), output_dir=f'{name}.out').reset()"
    run_python("-c", code, cwd=tmp_path, DETECTRON2_DATASETS=tmp_path / "datasets")
    assert {f.name for f in (tmp_path / "datasets").iterdir()} >= {"shapes_val", "shapes_train"}
