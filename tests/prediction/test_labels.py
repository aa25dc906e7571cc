"""What is saved as labels is read by ``--data`` as the same objects."""

import json
import os
import shutil
from xml.etree import ElementTree

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import yaml
from builders import classes_of
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image

from gnws_d2.data.check import to_rle
from gnws_d2.data.dataset_mapper import read_image
from gnws_d2.data.formats import Notes, read_dataset
from gnws_d2.prediction import labels
from gnws_d2.prediction.labels import FORMATS, save_labels
from gnws_d2.prediction.results import CocoDetections
from gnws_d2.utils.errors import UserError

CLASSES = ["big cat", 'Hund "Ö" & <猫>', "yes", "unseen"]
IDS = {9: 0, 4: 1, 5: 2, 12: 3}  # not in their order
SIZE = (60, 80)  # height, width
PREFIX = {"labelme": "", "yolo": "images/", "voc": "JPEGImages/", "coco": ""}


def rectangle(x, y, w, h):
    mask = np.zeros(SIZE, np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def masks():
    ring, blob = rectangle(5, 5, 20, 20), np.zeros(SIZE, np.uint8)
    ring[10:18, 9:20] = 0
    cv2.ellipse(blob, (50, 30), (25, 12), 20, 0, 360, 1, -1)
    parts = rectangle(0, 0, 10, 10) + rectangle(30, 40, 3, 15) + rectangle(70, 50, 10, 10)
    return [ring, blob, parts, rectangle(40, 3, 3, 30), rectangle(79, 59, 1, 1)]


def instances(masks=(), boxes=(), size=SIZE):
    """Detections with masks, or with boxes of x1, y1, x2, y2."""
    result, number = Instances(size), len(masks) or len(boxes)
    if len(masks):
        bounds = [cv2.boundingRect(mask) for mask in masks]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in bounds]
        result.pred_masks = torch.tensor(np.array(masks)).bool()
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.full((number,), 0.9)
    result.pred_classes = torch.arange(number) % 3
    return result


@pytest.fixture
def root(tmp_path):
    return tmp_path / "pictures"


@pytest.fixture
def detect(root):
    """Write pictures and return detections on them, given by their names."""

    def detect(**pictures):
        metadata = Metadata(
            name="labels", thing_classes=CLASSES, thing_dataset_id_to_contiguous_id=IDS
        )
        detections = CocoDetections(metadata)
        for name, found in pictures.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            picture = np.random.default_rng(0).integers(0, 255, (*found.image_size, 3), np.uint8)
            if not (root / name).exists():
                Image.fromarray(picture).save(root / name, None if "." in name else "PNG")
            detections.add(found, file_name=name)
        return detections

    return detect


def objects_of(coco):
    """(class, box, mask or None) of the objects of each picture."""
    found = {image["file_name"]: [] for image in coco["images"]}
    images = {image["id"]: image for image in coco["images"]}
    for a, name in zip(coco["annotations"], classes_of(coco)):
        image, mask = images[a["image_id"]], a.get("segmentation")
        mask = mask and to_rle(mask, image["height"], image["width"])
        found[image["file_name"]].append((name, a["bbox"], mask))
    return found


def read(path, with_masks=True):
    """The objects that ``--data`` reads, without anything being repaired or left out."""
    notes = Notes()
    splits = read_dataset(str(path), notes)
    assert notes.lines() == [] and set(splits) == {"all"}
    coco = splits["all"]
    assert all(("segmentation" in a) == with_masks for a in coco["annotations"])
    for image in coco["images"]:
        height, width = read_image(str(path / image["file_name"]), "BGR").shape[:2]
        assert (image["height"], image["width"]) == (height, width)
    return objects_of(coco)


def assert_same(found, detections, prefix="", with_masks=True):
    expected = objects_of(vars(detections))
    assert set(found) == {prefix + name for name in expected}
    for name, objects in expected.items():
        own = found[prefix + name]
        assert [o[0] for o in own] == [o[0] for o in objects]
        for (_, box, mask), (_, box0, mask0) in zip(own, objects):
            assert mask_util.iou(np.array([box]), np.array([box0]), [0]) > 0.98
            if with_masks:
                assert mask_util.iou([mask], [mask0], [0]) > 0.98


@pytest.mark.parametrize("format", FORMATS)
def test_masks_are_read_as_they_were_found(detect, root, tmp_path, capsys, format):
    detections = detect(**{
        "a.png": instances(masks()),
        "sub/a.png": instances([rectangle(3, 4, 10, 10)]),
        "other/a.png": instances([rectangle(30, 4, 10, 10)]),
        "images/a.png": instances([rectangle(50, 4, 10, 10)]),
        "empty.png": instances(),
    })  # fmt: skip
    save_labels(detections, str(tmp_path / "out"), format, str(root))
    (out,) = (tmp_path / "out").iterdir()
    assert out.name == f"labels_{format}"
    printed = capsys.readouterr().out
    assert printed.startswith("5 pictures with labels to correct") and str(out) in printed
    assert ("no masks" in printed) == (format == "voc")
    with_masks = format != "voc"
    assert_same(read(out, with_masks), detections, PREFIX[format], with_masks)
    for name in objects_of(vars(detections)):
        assert (out / PREFIX[format] / name).read_bytes() == (root / name).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_boxes_are_read_as_they_were_found(detect, root, tmp_path, capsys, format):
    boxes = [[0, 0, 80, 60], [10.37, 5.21, 33.9, 14.44], [70.2, 50.7, 80, 60], [3, 3, 9.5, 9.25]]
    detections = detect(**{"a b.jpg": instances(boxes=boxes), "empty.jpg": instances()})
    save_labels(detections, str(tmp_path), format, str(root))
    assert "no masks" not in capsys.readouterr().out
    shutil.rmtree(root)
    found = read(tmp_path / f"labels_{format}", with_masks=False)
    assert_same(found, detections, PREFIX[format], with_masks=False)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_labels_are_those_of_the_upright_picture(detect, root, tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    root.mkdir()
    Image.new("RGB", (80, 60)).save(root / "a.jpg", exif=exif)
    height, width = read_image(str(root / "a.jpg"), "BGR").shape[:2]
    assert (height > width) == (orientation > 4)
    mask = np.zeros((height, width), np.uint8)
    mask[10:20, 30:55] = 1
    detections = detect(**{"a.jpg": instances([mask], size=(height, width))})
    save_labels(detections, str(tmp_path), format, str(root))
    found = read(tmp_path / f"labels_{format}", format != "voc")
    assert_same(found, detections, PREFIX[format], format != "voc")


@pytest.mark.parametrize("format", ["labelme", "yolo", "coco"])
def test_an_object_with_an_empty_mask_has_the_outline_of_its_box(detect, root, tmp_path, format):
    found = instances([rectangle(3, 4, 30, 20), rectangle(40, 4, 30, 20)])
    found.pred_masks[1] = False
    save_labels(detect(**{"a.png": found}), str(tmp_path), format, str(root))
    (objects,) = read(tmp_path / f"labels_{format}").values()
    assert objects[1][1] == pytest.approx([40, 4, 30, 20], abs=1e-3)
    assert mask_util.area(objects[1][2]) == 600


@pytest.mark.parametrize("format", FORMATS)
def test_each_picture_has_its_own_label_and_a_name_that_tools_know(detect, root, tmp_path, format):
    names = ["a.png", "a.bmp", "a_bmp.png", "scan", "x.PNG"]
    found = [instances([rectangle(10 * i, 5, 8, 30)]) for i in range(len(names))]
    detections = detect(**dict(zip(names, found)))
    detections.add(found[0], file_name="a.png")  # named twice
    save_labels(detections, str(tmp_path), format, str(root))
    objects = read(tmp_path / f"labels_{format}", format != "voc")
    copies = ["a.png", "a_bmp.bmp", "a_bmp_png.png", "scan.png", "x.PNG"]
    copies = ["a.png", "a.bmp", "a_bmp.png", "scan.png", "x.PNG"] if format == "coco" else copies
    assert set(objects) == {PREFIX[format] + copy for copy in copies}
    for i, copy in enumerate(copies):
        ((_, box, _),) = objects[PREFIX[format] + copy]
        assert box == pytest.approx([10 * i, 5, 8, 30], abs=0.02)
        pixels = read_image(str(tmp_path / f"labels_{format}" / PREFIX[format] / copy), "BGR")
        assert np.array_equal(pixels, read_image(str(root / names[i]), "BGR"))


@pytest.mark.parametrize("format", FORMATS)
def test_corrections_are_not_overwritten(detect, root, tmp_path, format):
    detections = detect(**{"a.png": instances(masks())})
    save_labels(detections, str(tmp_path), format, str(root))
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=f"labels_{format} exists.*move it away or name another"):
        save_labels(detections, str(tmp_path), format, str(root))
    assert before == {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}


def test_nothing_is_left_of_labels_that_cannot_be_written(detect, root, tmp_path, monkeypatch):
    detections = detect(**{"a.png": instances(masks()), "b.png": instances(masks())})
    with monkeypatch.context() as patch:
        patch.setattr(labels, "_write", lambda *_: os.open(tmp_path / "none" / "a", os.O_WRONLY))
        with pytest.raises(UserError, match=r"Cannot write .*labels_yolo: .*none/a: No such file"):
            save_labels(detections, str(tmp_path / "out"), "yolo", str(root))
    (root / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png: No such file"):
        save_labels(detections, str(tmp_path / "out"), "yolo", str(root))
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match='--save-labels is "csv"'):
        save_labels(detections, str(tmp_path), "csv", str(root))


def test_labelme_opens_the_directory(detect, root, tmp_path):
    """What its ``LabelFile.load`` and ``load_shapes`` take from a file."""
    detections = detect(**{"sub/a.png": instances(masks()), "b.png": instances()})
    save_labels(detections, str(tmp_path), "labelme", str(root))
    label = json.loads((tmp_path / "labels_labelme/sub/a.json").read_text())
    assert label["imageData"] is None and label["flags"] == {}
    assert (label["imagePath"], label["imageHeight"], label["imageWidth"]) == ("a.png", 60, 80)
    shapes = label["shapes"]
    assert [s["label"] for s in shapes] == [CLASSES[i] for i in (0, 1, 2, 2, 2, 0, 1)]
    assert all(s["shape_type"] == "polygon" and s["flags"] == {} for s in shapes)
    assert [s["group_id"] for s in shapes] == [None, None, 3, 3, 3, None, None]
    assert all(len(s["points"]) > 2 and len(p) == 2 for s in shapes for p in s["points"])
    assert json.loads((tmp_path / "labels_labelme/b.json").read_text())["shapes"] == []


def test_yolo_has_the_layout_of_ultralytics(detect, root, tmp_path):
    detections = detect(**{"sub/a.png": instances(masks()), "b.png": instances()})
    save_labels(detections, str(tmp_path), "yolo", str(root))
    out = tmp_path / "labels_yolo"
    data = yaml.safe_load((out / "data.yaml").read_text(encoding="utf-8"))
    assert data == {"train": "images", "val": "images", "names": CLASSES}
    lines = (out / "labels/sub/a.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "0", "1"]
    for line, mask in zip(lines, masks()):
        # Ultralytics fills polygons with OpenCV, which draws their border, too.
        points = np.array(line.split()[1:], float).reshape(-1, 2) * SIZE[::-1]
        drawn = cv2.fillPoly(np.zeros((600, 800), np.uint8), [(points * 10).astype(np.int32)], 1)
        assert (drawn != mask.repeat(10, 0).repeat(10, 1)).mean() < 0.01
    assert (out / "labels/b.txt").read_text() == ""


def test_voc_has_pixels_that_count_from_1(detect, root, tmp_path):
    detections = detect(**{"sub/a.png": instances(boxes=[[10, 5, 30.5, 14]])})
    save_labels(detections, str(tmp_path), "voc", str(root))
    label = ElementTree.parse(tmp_path / "labels_voc/Annotations/sub/a.xml").getroot()
    box = [e.text for e in label.iterfind("object/bndbox/*")]
    assert box == ["11.00", "6.00", "30.50", "14.00"]
    assert [e.text for e in label.iterfind("size/*")] == ["80", "60", "3"]
    assert label.findtext("filename") == "sub/a.png"


def test_coco_has_polygons_and_no_scores(detect, root, tmp_path):
    detections = detect(**{"a.png": instances(masks())})
    save_labels(detections, str(tmp_path), "coco", str(root))
    coco = json.loads((tmp_path / "labels_coco/annotations.json").read_text())
    assert coco["images"] == detections.images and coco["categories"] == detections.categories
    keys = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}
    for annotation, found in zip(coco["annotations"], detections.annotations):
        assert set(annotation) == keys and isinstance(annotation["segmentation"], list)
        assert all(annotation[key] == found[key] for key in keys - {"segmentation"})
