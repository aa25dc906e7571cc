"""One hand-made dataset in each format gives the COCO file that was written by hand."""

import base64
import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from gnws_d2.data.formats import complete_coco, read_dataset
from gnws_d2.data.formats.dataset import image_size
from gnws_d2.utils.errors import UserError

SIZES = {"a": (40, 30), "b c": (20, 50)}  # width, height
# (image, class, box as x, y, width, height)
BOXES = [
    ("a", "cat", [4, 6, 10, 12]),
    ("a", "dog", [20, 3, 8, 20]),
    ("b c", "dog", [2, 10, 12, 30]),
]


def expected(names, masks=True):
    """The COCO dataset, with rectangles for masks; `names` are the paths of the images."""
    ids = {stem: i for i, stem in enumerate(names, 1)}
    images = [
        {"id": i, "file_name": names[s], "width": SIZES[s][0], "height": SIZES[s][1]}
        for s, i in ids.items()
    ]
    annotations = []
    for number, (stem, name, (x, y, w, h)) in enumerate(BOXES, 1):
        annotation = {
            "id": number, "image_id": ids[stem], "category_id": 1 + (name == "dog"), "iscrowd": 0,
            "bbox": [x, y, w, h], "area": w * h,
        }  # fmt: skip
        if masks:
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append(annotation)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_images(root, directory="images", suffix="jpg"):
    (root / directory).mkdir(parents=True, exist_ok=True)
    for stem, size in SIZES.items():
        Image.new("RGB", size).save(root / directory / f"{stem}.{suffix}")
    return {stem: f"{directory}/{stem}.{suffix}" for stem in SIZES}


def filled(box, size):
    mask = np.zeros(size[::-1], np.uint8)
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    return mask


def assert_same(actual, wanted):
    assert actual["images"] == wanted["images"]
    assert actual["categories"] == wanted["categories"]
    assert len(actual["annotations"]) == len(wanted["annotations"])
    sizes = {i["id"]: (i["height"], i["width"]) for i in wanted["images"]}
    for a, b in zip(actual["annotations"], wanted["annotations"]):
        assert a["bbox"] == pytest.approx(b["bbox"]) and a["area"] == pytest.approx(b["area"])
        for key in ("id", "image_id", "category_id", "iscrowd"):
            assert a[key] == b[key]
        assert ("segmentation" in a) == ("segmentation" in b)
        if "segmentation" in a:
            size = sizes[a["image_id"]]
            given = a["segmentation"]
            masks = [
                mask_util.decode(mask_util.merge(mask_util.frPyObjects(s, *size)))
                if isinstance(s, list)
                else mask_util.decode(s)
                for s in (given, b["segmentation"])
            ]
            assert np.array_equal(*masks)


@pytest.mark.parametrize("segments", [False, True])
def test_yolo(tmp_path, segments):
    names = write_images(tmp_path, "images/train") | {}
    (tmp_path / "labels" / "train").mkdir(parents=True)
    for stem, (width, height) in SIZES.items():
        lines = []
        for image, name, (x, y, w, h) in BOXES:
            values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            if segments:
                corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
                values = [v for cx, cy in corners for v in (cx / width, cy / height)]
            if image == stem:
                lines.append(" ".join(map(str, [int(name == "dog"), *values])))
        (tmp_path / "labels" / "train" / f"{stem}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: {0: cat, 1: dog}\n")
    coco = read_dataset(str(tmp_path))
    assert_same(coco["all"], expected(names, masks=segments))


def test_yolo_split_as_roboflow_does_and_a_picture_without_objects(tmp_path):
    for split, stem in (("train", "a"), ("valid", "b c")):
        for part in ("images", "labels"):
            (tmp_path / split / part).mkdir(parents=True)
        Image.new("RGB", SIZES[stem]).save(tmp_path / split / "images" / f"{stem}.png")
    (tmp_path / "train" / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\nnames: [x]\n"
    )
    splits = read_dataset(str(tmp_path))
    assert list(splits) == ["train", "val"]
    assert splits["train"]["annotations"][0]["bbox"] == [15, 7.5, 10, 15]
    assert splits["val"]["images"][0]["file_name"] == "valid/images/b c.png"
    assert splits["val"]["annotations"] == []


def test_pascal_voc(tmp_path):
    names = write_images(tmp_path, "JPEGImages")
    (tmp_path / "Annotations").mkdir()
    for stem, (width, height) in SIZES.items():
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
            f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for image, name, (x, y, w, h) in BOXES
            if image == stem
        )
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>{width}</width><height>"
            f"{height}</height></size>{objects}</annotation>"
        )
    assert_same(read_dataset(str(tmp_path))["all"], expected(names, masks=False))
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    splits = read_dataset(str(tmp_path))
    assert [len(splits[s]["images"]) for s in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("kind", ["polygon", "mask"])
def test_labelme(tmp_path, kind):
    names = write_images(tmp_path, "pictures")
    for stem in SIZES:
        shapes = []
        for image, name, (x, y, w, h) in BOXES:
            shape = {"label": name, "shape_type": kind, "group_id": None}
            shape["points"] = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
            if kind == "mask":
                _, png = cv2.imencode(".png", np.full((h, w), 255, np.uint8))
                shape |= {"points": [[x, y], [x + w, y + h]]}
                shape["mask"] = base64.b64encode(png.tobytes()).decode()
            if image == stem:
                shapes.append(shape)
        content = {"shapes": shapes, "imagePath": f"..\\pictures\\{stem}.jpg", "imageData": None}
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{stem}.json").write_text(json.dumps(content))
    assert_same(read_dataset(str(tmp_path))["all"], expected(names))


def test_parts_of_a_group_of_labelme_are_one_object(tmp_path):
    write_images(tmp_path, ".")
    square = [[0, 0], [4, 0], [4, 4], [0, 4]]
    shapes = [
        {"label": "x", "shape_type": "polygon", "group_id": 1, "points": square},
        {"label": "x", "shape_type": "rectangle", "group_id": 1, "points": [[10, 10], [14, 14]]},
        {"label": "x", "shape_type": "circle", "group_id": None, "points": [[20, 15], [20, 20]]},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"shapes": shapes, "imagePath": "a.jpg"}))
    first, second = read_dataset(str(tmp_path))["all"]["annotations"]
    assert first["bbox"] == [0, 0, 14, 14] and first["area"] == 32
    assert second["area"] == pytest.approx(np.pi * 25, rel=0.05)


def one_class(coco):
    for annotation in coco["annotations"]:
        annotation["category_id"] = 1
    return coco | {"categories": [{"id": 1, "name": "object"}]}


@pytest.mark.parametrize("layout", ["numbers", "colors", "directories", "names", "per image"])
def test_masks(tmp_path, layout):
    names = write_images(tmp_path)
    if layout == "per image":
        names = {}
        for stem, size in SIZES.items():
            (tmp_path / stem / "images").mkdir(parents=True)
            names[stem] = f"{stem}/images/{stem}.jpg"
            Image.new("RGB", size).save(tmp_path / names[stem])
        for path in (tmp_path / "images").iterdir():
            path.unlink()
    for stem, size in SIZES.items():
        boxes = [box for image, _, box in BOXES if image == stem]
        one = np.zeros(size[::-1], np.uint16)
        for i, box in enumerate(boxes, 1):
            mask = filled(box, size)
            one[mask > 0] = i * 300
            path = {
                "directories": tmp_path / "masks" / stem / f"{i}.png",
                "names": tmp_path / "masks" / f"{stem}_{i}.png",
                "per image": tmp_path / stem / "masks" / f"{i}x.png",
            }.get(layout)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask * 255).save(path)
        (tmp_path / "masks").mkdir(exist_ok=True)
        if layout == "numbers":
            cv2.imwrite(str(tmp_path / "masks" / f"{stem}.png"), one)
        elif layout == "colors":
            colors = np.stack([one // 300 * 90, one // 300 * 20, one * 0], axis=2)
            cv2.imwrite(str(tmp_path / "masks" / f"{stem}.png"), colors.astype(np.uint8))
    assert_same(read_dataset(str(tmp_path))["all"], one_class(expected(names)))


@pytest.mark.parametrize("layout", ["roboflow", "cvat", "fiftyone"])
def test_coco_as_exported(tmp_path, layout):
    if layout == "roboflow":
        for split in ("train", "valid"):
            names = write_images(tmp_path, split)
            coco = expected({stem: f"{stem}.jpg" for stem in names})
            (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(coco))
        splits = read_dataset(str(tmp_path))
        assert_same(splits["train"], expected({s: f"train/{s}.jpg" for s in SIZES}))
        assert_same(splits["val"], expected({s: f"valid/{s}.jpg" for s in SIZES}))
        return
    directory, json_file = {
        "cvat": ("images", "annotations/instances_default.json"),
        "fiftyone": ("data", "labels.json"),
    }[layout]
    names = write_images(tmp_path, directory)
    coco = expected({stem: f"{stem}.jpg" for stem in names})
    for annotation in coco["annotations"]:
        del annotation["iscrowd"], annotation["area"]
    (tmp_path / json_file).parent.mkdir(exist_ok=True)
    (tmp_path / json_file).write_text(json.dumps(coco))
    assert_same(read_dataset(str(tmp_path))["all"], expected(names))


def test_missing_box_area_and_iscrowd_are_computed():
    image = {"id": 1, "width": 40, "height": 30}
    segmentation = [[4, 6, 14, 6, 14, 18, 4, 18]]
    coco = complete_coco(
        {"images": [image], "annotations": [{"image_id": 1, "segmentation": segmentation}]}
    )
    (annotation,) = coco["annotations"]
    assert annotation["bbox"] == [4, 6, 10, 12]
    assert annotation["area"] == 120 and annotation["iscrowd"] == 0


def test_size_of_a_turned_image_is_that_of_what_is_seen(tmp_path):
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert image_size(str(tmp_path / "a.jpg")) == (30, 40)
    assert cv2.imread(str(tmp_path / "a.jpg")).shape[:2] == (40, 30)


def tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("L", content).save(path)
        else:
            path.write_text(content)


COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
    }
)
SHAPES = '{"shapes": [%s], "imagePath": "a.png"}'


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"holds no files, and none of COCO JSON"),
        ({"a.png": (8, 8)}, r"holds 1 files \(.png\), and none of COCO JSON"),
        ({"notes.docx": "", "x.csv": ""}, r"holds 2 files \(.csv, .docx\)"),
        (
            {"labels.json": COCO, "a.png": (8, 8), "a.json": SHAPES % ""},
            r"holds COCO \(labels.json\) and labelme \(a.json\): leave one",
        ),
        ({"one.json": COCO, "two.json": COCO, "a.png": (8, 8)}, "annotation files one.json, two"),
        ({"labels.json": COCO}, "labels.json names a.png, but there is no such image"),
        ({"l.json": COCO, "x/a.png": (8, 8), "y/a.png": (8, 8)}, "2 files called that"),
        (
            {"labels/a.txt": "0 .5 .5 .1 .1", "data.yaml": "names: [x]", "images/b.png": (8, 8)},
            "labels/a.txt has no image",
        ),
        ({"labels/a.txt": "0 .5 .5 .1 .1", "images/a.png": (8, 8)}, "no data.yaml with the"),
        (
            {"labels/a.txt": "7 .5 .5 .1 .1", "data.yaml": "names: [x]", "images/a.png": (8, 8)},
            "labels/a.txt, line 1: '7 .5 .5 .1 .1' is not the number of a class",
        ),
        (
            {"labels/a.txt": "0 .5 .5", "data.yaml": "names: [x]", "images/a.png": (8, 8)},
            r"line 1: 2 coordinates are neither a box \(4\) nor a polygon",
        ),
        ({"a.xml": "<annotation>"}, "a.xml has no image"),
        ({"a.xml": "<annotation>", "a.png": (8, 8)}, "a.xml is not a Pascal VOC annotation"),
        ({"a.json": SHAPES % ""}, "a.json has no image: a.png is not in"),
        (
            {
                "a.json": SHAPES % '{"label": "x", "shape_type": "line", "points": [[0, 0]]}',
                "a.png": (8, 8),
            },
            "a.json: a shape of 'x' cannot be used: line is not a region",
        ),
        ({"images/a.png": (8, 8), "masks/a.png": (9, 8)}, "masks/a.png is of 9x8, but .* 8x8"),
        (
            {"images/a.png": (8, 8), "images/b.png": (8, 8), "masks/a.png": (8, 8)},
            "images/b.png has no mask",
        ),
        (
            {"images/a.png": (8, 8), "masks/a.png": (8, 8), "masks/c.png": (8, 8)},
            "masks/c.png is the mask of no image",
        ),
        (
            {"val/l.json": COCO, "test/l.json": COCO, "val/a.png": (8, 8), "test/a.png": (8, 8)},
            "has the splits test, val: one of them has to be train",
        ),
        ({"images/a.png": "", "masks/a.png": (8, 8)}, "images/a.png is damaged or not an image"),
    ],
)
def test_mistake_is_told_in_one_sentence(tmp_path, files, message):
    tree(tmp_path, files)
    with pytest.raises(UserError, match=message):
        read_dataset(str(tmp_path))


def test_directory_that_is_not_there():
    with pytest.raises(UserError, match="--data gone: there is no such directory"):
        read_dataset("gone")
