"""Objects are repaired, left out or refused."""

import logging

import cv2
import numpy as np
import pytest
from builders import (
    BOX,
    H,
    W,
    assert_objects,
    box_of,
    coco_file,
    corners,
    decode,
    encode,
    files_of,
    png,
    read,
)  # fmt: skip
from PIL import Image, ImageDraw, ImageOps

from gnws_d2.data.formats import describe
from gnws_d2.utils.errors import UserError


def read_coco(root, *annotations, size=(W, H), options=(), **more):
    label = coco_file(*annotations, size=size, **more)
    return read(root, {"a.png": (W, H), "labels.json": label}, **dict(options))


@pytest.mark.parametrize(
    "changes, repair",
    [
        *((own, None) for own in ({}, {"bbox": "no"}, {"iscrowd": "no"}, {"iscrowd": False})),
        *(({"area": area}, None) for area in ("no", -1, "120")),
        ({"image_id": "1", "category_id": "1"}, "image_id that was a string"),
        ({"bbox": ["4", "6", "10", "12"]}, "number that was a string"),
        ({"segmentation": corners(*BOX)}, "polygon without the list around it"),
        ({"bbox": [4, 6, 30, 12]}, "box, which is computed from the outline"),
        ({"bbox": []}, "box, which is computed from the outline"),
        ({"segmentation": [corners(*BOX), [1, 2]]}, None),
    ],
)
def test_what_can_be_told_is_repaired_and_counted(tmp_path, changes, repair):
    coco, notes = read_coco(tmp_path, changes)
    assert coco == {
        "images": [{"id": 1, "file_name": "a.png", "width": W, "height": H}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX, "iscrowd": 0, "area": 120,
             "segmentation": [corners(*BOX)]}
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }  # fmt: skip
    assert not notes.left_out
    if repair:
        assert list(notes.repairs) == [repair]
        assert "labels.json, annotation id 1" in notes.lines()[0]


@pytest.mark.parametrize("size", [(0, 0), (-1, -1), (None, W), ("a", 3), ("40", "30")])
def test_missing_or_impossible_size_is_read_from_the_picture(tmp_path, size):
    coco, notes = read_coco(tmp_path, {}, size=size)
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (W, H)
    assert len(coco["annotations"]) == 1 and not notes.left_out
    assert len(notes.repairs) == (size != ("40", "30"))


@pytest.mark.parametrize(
    "outline", [[[4, 6, 14, 18]], [[4, 6]], [[]], [], None, [[4, 6, 9, 6, 8, 6]]]
)
def test_object_whose_outline_has_no_area_has_its_box(tmp_path, outline):
    coco, _ = read_coco(tmp_path, {"segmentation": outline, "area": -5})
    assert_objects(coco, [("cat", BOX, None)])
    assert coco["annotations"][0]["area"] == 120


BAD = [
    ({"bbox": [4, 6, 0, 12], "segmentation": "no"}, "has no area"),
    ({"bbox": [4, 6, -3, 12], "segmentation": "no"}, "has no area"),
    ({"bbox": [50, 6, 3, 12], "segmentation": "no"}, "outside of the picture"),
    ({"bbox": [-9, 6, 3, 12], "segmentation": "no"}, "outside of the picture"),
    ({"bbox": [4, 6, "x", 12], "segmentation": "no"}, "not four numbers"),
    ({"bbox": {"x": 4}, "segmentation": "no"}, "not four numbers"),
    ({"bbox": [4, 6, 1], "segmentation": "no"}, "not four numbers"),
    ({"bbox": None, "segmentation": []}, "neither an outline nor a box"),
    ({"segmentation": [[4, 6, 14, 18]]}, "it has a box without an outline"),
    ({"category_id": 7}, "not a category"),
    ({"image_id": 7}, "not that of an image"),
    ({"segmentation": [[0, 0, 1e12, 0, 1e12, 1e12]], "bbox": "no"}, "far outside"),
    ({"bbox": [0, 0, 1e300, 1e300], "segmentation": "no"}, "far outside"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_object_that_cannot_be_used_is_left_out_and_named(tmp_path, changes, message):
    coco, notes = read_coco(tmp_path, *[{}] * 10, changes)
    assert len(coco["annotations"]) == 10
    (line,) = [line for line in notes.lines() if line.startswith("Left out")]
    assert message in line and "annotation id 11" in line and "1 x object" in line


@pytest.mark.parametrize("bad, good", [(1, 9), (1, 8), (3, 20), (2, 18)])
def test_more_than_a_tenth_is_an_error_unless_told_to_keep_going(tmp_path, bad, good):
    own = [{}] * good + [{"category_id": 7}] * bad
    if bad <= 0.1 * (bad + good):
        assert len(read_coco(tmp_path, *own)[0]["annotations"]) == good
        return
    with pytest.raises(UserError, match=rf"annotation id {good + 1}: .* {bad} of {bad + good} obj"):
        read_coco(tmp_path, *own)
    coco, notes = read_coco(tmp_path, *own, options={"keep_going": True})
    assert len(coco["annotations"]) == good and f"Left out {bad} x" in notes.lines()[0]


@pytest.mark.parametrize("boxes", [2, 4, 5, 7])
def test_dataset_has_masks_if_most_objects_have(tmp_path, boxes):
    own = [{"segmentation": "no"}] * boxes + [{}] * (8 - boxes)
    coco, notes = read_coco(tmp_path, *own, options={"keep_going": True})
    masks = [("segmentation" in a) for a in coco["annotations"]]
    assert masks == [True] * (8 - boxes) if boxes <= 4 else [False] * 8
    assert bool(notes.left_out) == (boxes <= 4)
    coco, notes = read_coco(tmp_path, *own, options={"masks": False})
    assert len(coco["annotations"]) == 8 and not notes.left_out
    assert not any("segmentation" in a for a in coco["annotations"])


@pytest.mark.parametrize(
    "crowds, wanted",
    [
        ({"cat": (1, 9), "dog": (0, 3)}, 1),  # crowds and all of a class
        ({"cat": (9, 9), "dog": (0, 12)}, 0),
        ({"cat": (5, 9), "dog": (2, 3)}, 0),
        ({"cat": (4, 9), "dog": (2, 3)}, 6),
    ],
)
def test_crowds_are_objects_if_most_or_all_of_a_class_are(tmp_path, caplog, crowds, wanted):
    rle = {"size": [H, W], "counts": [4 * H + 6, 20, 10 * H - 20 + 4, W * H - 14 * H - 10]}
    own = [
        {"category_id": 1 + (name == "dog")}
        | ({"iscrowd": 1, "segmentation": rle, "bbox": "no"} if i < crowd else {})
        for name, (crowd, every) in crowds.items()
        for i in range(every)
    ]
    with caplog.at_level(logging.WARNING):
        coco, _ = read_coco(tmp_path, *own)
    assert sum(a["iscrowd"] for a in coco["annotations"]) == wanted
    assert len(coco["annotations"]) == len(own)
    assert ("marked as crowds" in caplog.text) == (not wanted)
    assert (f"{wanted} crowds" in describe(coco)) == bool(wanted)
    if not wanted:
        (name, (number, every)) = next(iter(crowds.items()))
        assert f"{number} of {every} objects of the class {name} are marked" in caplog.text


def test_classes_are_numbered_as_in_the_data_without_those_that_have_no_objects(tmp_path):
    categories = [{"id": i, "name": n} for i, n in ((9, "z"), (4, "unused"), (2, "b"))]
    own = [{"category_id": 9}, {"category_id": 2}]
    coco, _ = read_coco(tmp_path, *own, categories=categories)
    assert coco["categories"] == [{"id": 2, "name": "b"}, {"id": 9, "name": "z"}]
    assert [a["category_id"] for a in coco["annotations"]] == [9, 2]


def test_classes_with_numbers_behind_one_name_give_a_hint(tmp_path, caplog):
    categories = [{"id": 1, "name": "cow-1"}, {"id": 2, "name": "cow-2"}]
    coco, _ = read_coco(tmp_path, {}, {"category_id": 2}, categories=categories)
    assert [c["name"] for c in coco["categories"]] == ["cow-1", "cow-2"]
    assert "2 classes are called cow and a number" in caplog.text


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_bad_picture_is_an_error_or_skipped_and_counted(tmp_path, damage):
    label = coco_file({}, {"image_id": 2})
    label["images"].append({"id": 2, "file_name": "b.png", "width": W, "height": H})
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)
    files = {"a.png": (W, H), "labels.json": label}
    if damage != "missing":
        files["b.png"] = png(noise)[:600] if damage == "cut" else b""
    with pytest.raises(UserError, match=r"b\.png"):
        read(tmp_path, files)
    coco, notes = read(tmp_path, files, skip_bad_images=True)
    assert files_of({"all": coco}) == {"all": ["a.png"]} and len(coco["annotations"]) == 1
    assert len(notes.lines()) == 1 and "Left out 1 x" in notes.lines()[0]


@pytest.mark.parametrize("kind", ["polygon", "rle", "box"])
@pytest.mark.parametrize(
    "frame, orientation",  # in 2 to 4 the sizes do not tell the frames apart
    [*(("seen", i) for i in range(1, 9)), *(("stored", i) for i in (1, 5, 6, 7, 8))],
)
def test_labels_of_a_turned_picture_are_read_in_either_frame(tmp_path, orientation, kind, frame):
    picture, exif = Image.new("L", (W, H)), Image.Exif()
    points = [(3, 4), (20, 4), (20, 9), (8, 9), (8, 25), (3, 25)]
    ImageDraw.Draw(picture).polygon(points, fill=255)
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    seen = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))) > 0
    mask = np.array(picture) > 0 if frame == "stored" else seen
    own = {"bbox": box_of(mask), "area": "no", "segmentation": "no"}
    if kind == "rle":
        rle = encode(mask)
        own["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    elif kind == "polygon":
        found, _ = cv2.findContours(np.kron(mask, np.ones((8, 8))).astype(np.uint8), 0, 1)
        own["segmentation"] = [((found[0] + 0.5) / 8).ravel().tolist()]
    coco, _ = read(tmp_path, {"labels.json": coco_file(own, size=mask.shape[::-1])})
    (image,), (a,) = coco["images"], coco["annotations"]
    assert (image["height"], image["width"]) == seen.shape
    assert a["bbox"] == pytest.approx(box_of(seen), abs=0.2)
    if kind != "box":
        assert np.array_equal(decode(a, *seen.shape), seen)
        assert a["area"] == pytest.approx(seen.sum())
