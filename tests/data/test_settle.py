"""Objects are repaired, left out or refused; labelme, VIA and CVAT give the hand-made COCO."""

import base64
import io
import json
import logging
import math

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image, ImageDraw, ImageOps

from gnws_d2.data.formats import Notes, describe, read_dataset
from gnws_d2.utils.errors import UserError

W, H = 40, 30


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", content).save(path)
        elif isinstance(content, Image.Image):
            content.save(path)
        elif isinstance(content, np.ndarray):
            Image.fromarray(content).save(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(root)


def read(root, files, **options):
    notes = Notes()
    coco = read_dataset(write(root, files), notes, **options)
    return coco["all"], notes


def decode(annotation, height=H, width=W):
    rle = annotation["segmentation"]
    if isinstance(rle, list):
        rle = mask_util.merge(mask_util.frPyObjects(rle, height, width))
    return mask_util.decode(rle).astype(bool)


def rectangle(x, y, w, h, height=H, width=W):
    mask = np.zeros((height, width), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def corners(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def names_of(coco):
    return {c["id"]: c["name"] for c in coco["categories"]}


def assert_objects(coco, wanted):
    """Compare class, box, area and mask with [(class, box, mask or None)], in their order."""
    assert [names_of(coco)[a["category_id"]] for a in coco["annotations"]] == [w[0] for w in wanted]
    for a, (_, box, mask) in zip(coco["annotations"], wanted):
        assert a["bbox"] == pytest.approx(box, abs=0.5)
        assert ("segmentation" in a) == (mask is not None)
        if mask is not None:
            difference = int((decode(a) != mask).sum())
            assert difference <= 0.06 * mask.sum(), difference
            assert a["area"] == pytest.approx(mask.sum(), rel=0.06)


BOX = [4, 6, 10, 12]


def coco_file(*annotations, size=(W, H), **more):
    """A COCO file of one picture; each annotation is the good one with some other fields."""
    good = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 120, "bbox": BOX}
    good |= {"segmentation": [corners(*BOX)]}
    own = [{"id": i, **good, **a} for i, a in enumerate(annotations, 1)]
    own = [{k: v for k, v in a.items() if v != "no"} for a in own]
    image = {"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": [image], "annotations": own, "categories": categories} | more


def read_coco(root, *annotations, size=(W, H), options=(), **more):
    label = coco_file(*annotations, size=size, **more)
    return read(root, {"a.png": (W, H), "labels.json": label}, **dict(options))


@pytest.mark.parametrize(
    "changes, repair",
    [
        ({}, None),
        ({"image_id": "1", "category_id": "1"}, "image_id that was a string"),
        ({"bbox": ["4", "6", "10", "12"]}, "number that was a string"),
        ({"segmentation": corners(*BOX)}, "polygon without the list around it"),
        ({"bbox": "no"}, None),
        ({"bbox": [4, 6, 30, 12]}, "box, which is computed from the outline"),
        ({"bbox": []}, "box, which is computed from the outline"),
        ({"area": "no"}, None),
        ({"area": -1}, None),
        ({"area": "120"}, None),
        ({"iscrowd": "no"}, None),
        ({"iscrowd": False}, None),
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


def test_box_as_polygon_of_two_points_is_left_out_among_outlines(tmp_path):
    own = [{}] * 12 + [{"segmentation": [[4, 6, 14, 18]]}]
    coco, notes = read_coco(tmp_path, *own)
    assert len(coco["annotations"]) == 12
    (line,) = [line for line in notes.lines() if line.startswith("Left out")]
    assert "1 x object: it has a box without an outline" in line and "annotation id 13" in line


BAD = [
    ({"bbox": [4, 6, 0, 12], "segmentation": "no"}, "has no area"),
    ({"bbox": [4, 6, -3, 12], "segmentation": "no"}, "has no area"),
    ({"bbox": [50, 6, 3, 12], "segmentation": "no"}, "outside of the picture"),
    ({"bbox": [-9, 6, 3, 12], "segmentation": "no"}, "outside of the picture"),
    ({"bbox": [4, 6, "x", 12], "segmentation": "no"}, "not four numbers"),
    ({"bbox": {"x": 4}, "segmentation": "no"}, "not four numbers"),
    ({"bbox": [4, 6, 1], "segmentation": "no"}, "not four numbers"),
    ({"bbox": None, "segmentation": []}, "neither an outline nor a box"),
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
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)).save(png, "png")
    files = {"a.png": (W, H), "labels.json": label}
    if damage != "missing":
        files["b.png"] = png.getvalue()[:600] if damage == "cut" else b""
    with pytest.raises(UserError, match=r"b\.png"):
        read(tmp_path, files)
    coco, notes = read(tmp_path, files, skip_bad_images=True)
    assert [i["file_name"] for i in coco["images"]] == ["a.png"]
    assert len(coco["annotations"]) == 1
    assert len(notes.lines()) == 1 and "Left out 1 x" in notes.lines()[0]


@pytest.mark.parametrize("kind", ["polygon", "rle", "box"])
@pytest.mark.parametrize(
    "frame, orientation",  # in 2 to 4 the sizes do not tell the frames apart
    [*(("seen", i) for i in range(1, 9)), *(("stored", i) for i in (1, 5, 6, 7, 8))],
)
def test_labels_of_a_turned_picture_are_read_in_either_frame(tmp_path, orientation, kind, frame):
    picture = Image.new("L", (W, H))
    points = [(3, 4), (20, 4), (20, 9), (8, 9), (8, 25), (3, 25)]
    ImageDraw.Draw(picture).polygon(points, fill=255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = tmp_path / "mask.png"
    picture.save(turned, exif=exif)
    seen = np.array(ImageOps.exif_transpose(Image.open(turned))) > 0
    turned.unlink()
    mask = np.array(picture) > 0 if frame == "stored" else seen
    height, width = mask.shape
    (rle,) = (mask_util.encode(np.asfortranarray(mask, np.uint8)),)
    x, y, w, h = mask_util.toBbox(rle).tolist()
    own = {"bbox": [x, y, w, h], "area": "no", "segmentation": "no"}
    if kind == "rle":
        own["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    elif kind == "polygon":
        found, _ = cv2.findContours(np.kron(mask, np.ones((8, 8))).astype(np.uint8), 0, 1)
        own["segmentation"] = [((found[0] + 0.5) / 8).ravel().tolist()]
    files = {"a.jpg": b"", "labels.json": coco_file(own, size=(width, height))}
    files["labels.json"]["images"][0]["file_name"] = "a.jpg"
    write(tmp_path, files)
    Image.new("RGB", (W, H)).save(tmp_path / "a.jpg", exif=exif)
    coco = read_dataset(str(tmp_path))["all"]
    (image,), (a,) = coco["images"], coco["annotations"]
    assert (image["height"], image["width"]) == seen.shape
    rle = mask_util.encode(np.asfortranarray(seen, np.uint8))
    assert a["bbox"] == pytest.approx(mask_util.toBbox(rle).tolist(), abs=0.2)
    if kind != "box":
        assert np.array_equal(decode(a, *seen.shape), seen)
        assert a["area"] == pytest.approx(seen.sum())


def png64(mask):
    png = io.BytesIO()
    Image.fromarray(mask).save(png, "png")
    return base64.b64encode(png.getvalue()).decode()


def disk(cx, cy, rx, ry, degrees=0):
    """Pixels whose centers are in an ellipse that is turned clockwise."""
    y, x = np.mgrid[:H, :W] + 0.5
    t = math.radians(degrees)
    u, v = (x - cx) * math.cos(t) + (y - cy) * math.sin(t), (y - cy) * math.cos(t)
    return (u / rx) ** 2 + ((v - (x - cx) * math.sin(t)) / ry) ** 2 <= 1


def shape(kind, *points, label="cat", **more):
    return {"label": label, "shape_type": kind, "points": [list(p) for p in points]} | more


def labelme(*shapes, path="a.png", **more):
    return {"shapes": shapes, "imagePath": path, "imageWidth": W, "imageHeight": H} | more


OUTLINE = ((20, 2), (30, 2), (30, 12), (20, 12))
GOOD = shape("polygon", *OUTLINE)
WANTED = ("cat", [20, 2, 10, 10], rectangle(20, 2, 10, 10))
BOX_WANTED = ("cat", BOX, rectangle(*BOX))


@pytest.mark.parametrize(
    "shapes, wanted",
    [
        ([shape("rectangle", (14, 18), (4, 6))], [BOX_WANTED]),
        ([shape("rectangle", (4, 6), (14, 6), (14, 18), (4, 18))], [BOX_WANTED]),
        ([shape("rotation", (4, 6), (14, 6), (14, 18), (4, 18))], [BOX_WANTED]),
        ([shape("rotation", (15.2, 5), (25.2, 15), (15.2, 25), (5.2, 15))],
         [("cat", [5.2, 5, 20, 20],
           np.abs(np.mgrid[:H, :W] - [[[14.5]], [[14.7]]]).sum(0) < 10)]),
        ([shape("circle", (12, 12), (12, 20))], [("cat", [4, 4, 16, 16], disk(12, 12, 8, 8))]),
        ([shape("mask", (4, 6), (13, 17), mask=png64(np.ones((12, 10), bool)))], [BOX_WANTED]),
        ([shape("mask", (34, 6), (43, 17), mask=png64(np.ones((12, 10), bool)))],
         [("cat", [34, 6, 6, 12], rectangle(34, 6, 6, 12))]),
        ([shape("mask", (-4, 6), (5, 17), mask=png64(np.ones((12, 10), bool)))],
         [("cat", [0, 6, 6, 12], rectangle(0, 6, 6, 12))]),
        ([shape(None, *OUTLINE)], [WANTED]),
        ([shape("polygon", (4, 6), (9, 6), (9, 18), (4, 18), group_id=3),
          shape("rectangle", (9, 6), (14, 18), group_id=3)], [BOX_WANTED]),
        ([shape("polygon", *OUTLINE, group_id=3),
          shape("rectangle", (4, 6), (14, 18), group_id=3, label="dog")],
         [WANTED, ("dog", *BOX_WANTED[1:])]),
    ],
)  # fmt: skip
def test_labelme(tmp_path, shapes, wanted):
    coco, notes = read(tmp_path, {"a.png": (W, H), "a.json": labelme(GOOD, *shapes)})
    assert_objects(coco, [WANTED, *wanted])
    assert not notes.left_out and not notes.repairs


@pytest.mark.parametrize("path", [r"C:\old\a.png", "../gone/a.png", "b.jpg", "/x/A.PNG", "", None])
def test_stale_path_in_labelme_is_of_the_picture_beside_it(tmp_path, path):
    files = {"x/a.png": (W, H), "x/a.json": labelme(GOOD, path=path, imageData="AAAA")}
    coco, _ = read(tmp_path, files)
    assert [i["file_name"] for i in coco["images"]] == ["x/a.png"]
    assert_objects(coco, [WANTED])


def test_background_of_labelme_is_left_out_and_ignored_regions_are_crowds_of_all_classes(tmp_path):
    ignored = shape("rectangle", (4, 6), (14, 18), label="__ignore__")
    other = shape("polygon", *OUTLINE, label="dog")
    background = shape("polygon", *OUTLINE, label="_background_")
    files = {"a.png": (W, H), "a.json": labelme(GOOD, other, ignored, background)}
    coco, _ = read(tmp_path, files)
    crowds = [("cat", *BOX_WANTED[1:]), ("dog", *BOX_WANTED[1:])]
    assert_objects(coco, [WANTED, ("dog", *WANTED[1:]), *crowds])
    assert [a["iscrowd"] for a in coco["annotations"]] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "bad, message",
    [
        *((shape(kind, (1, 1), (5, 9)), "not a region") for kind in ("point", "line", "linestrip")),
        (shape("polygon", (1, 1), label=""), "it has no label"),
        (shape("rectangle", (4, 6)), "two or four points"),
        (shape("rectangle", (4, 6), (14, 6), (14, 18)), "two or four points"),
        (shape("circle", (4, 6)), "circle"),
        (shape("polygon", (1, "x"), (2, 2), (3, 4)), "not pairs of numbers"),
        (shape("mask", (4, 6), (13, 17), mask="AAAA"), "PNG"),
        (shape("mask", (4, 6), (13, 17)), "PNG"),
        ({"label": "cat"}, "not pairs of numbers"),
        (None, "it has no label"),
    ],
)
def test_shape_of_labelme_that_is_no_region_is_left_out_and_named(tmp_path, bad, message):
    files = {"a.png": (W, H), "a.json": labelme(*[GOOD] * 9, bad)}
    coco, notes = read(tmp_path, files)
    assert_objects(coco, [WANTED] * 9)
    (line,) = notes.lines()
    assert "Left out 1 x object" in line and "a.json, shape 10" in line and message in line


def via(regions, project):
    item = {"a.png123": {"filename": "a.png", "size": 123, "regions": regions}}
    return {"_via_settings": {}, "_via_img_metadata": item} if project else item


def region(name, attributes=(("kind", "cat"),), **values):
    return {"shape_attributes": {"name": name} | values, "region_attributes": dict(attributes)}


VIA = [
    region("polygon", all_points_x=[20, 30, 30, 20], all_points_y=[2, 2, 12, 12]),
    region("rect", [("kind", "dog")], x=4, y=6, width=10, height=12),
    region("circle", cx=12, cy=12, r=8),
    region("ellipse", cx=20, cy=15, rx=12, ry=6, theta=math.radians(30)),
]
SLANTED = disk(20, 15, 12, 6, 30)


def box_of(mask):
    return mask_util.toBbox(mask_util.encode(np.asfortranarray(mask, np.uint8))).tolist()


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_via(tmp_path, project, as_dict):
    regions = {str(i): r for i, r in enumerate(VIA)} if as_dict else VIA
    coco, notes = read(tmp_path, {"a.png": (W, H), "via.json": via(regions, project)})
    circle = ("cat", [4, 4, 16, 16], disk(12, 12, 8, 8))
    wanted = [WANTED, ("dog", *BOX_WANTED[1:]), circle, ("cat", box_of(SLANTED), SLANTED)]
    assert_objects(coco, [(n, [pytest.approx(v, abs=1) for v in b], m) for n, b, m in wanted])
    assert not notes.left_out and not notes.repairs


@pytest.mark.parametrize(
    "attributes, wanted",
    [
        ([{"id": "1", "kind": "a"}, {"id": "2", "kind": "b"}, {"id": "3", "kind": "a"}], "aba"),
        ([{"kind": {"a": True}}, {"kind": {"a": False, "b": True}}, {"kind": "a"}], "aba"),
        ([{}, {}, {}], ["object"] * 3),
        ([{"note": "dark"}, {}, {}], ["object"] * 3),
    ],
)
def test_class_of_via_is_the_attribute_with_the_fewest_values(tmp_path, attributes, wanted):
    regions = [VIA[0] | {"region_attributes": own} for own in attributes]
    coco, _ = read(tmp_path, {"a.png": (W, H), "via.json": via(regions, True)})
    assert [names_of(coco)[a["category_id"]] for a in coco["annotations"]] == list(wanted)


@pytest.mark.parametrize(
    "bad, message",
    [
        (region("polyline", all_points_x=[1, 2, 3], all_points_y=[1, 5, 1]), "not a region"),
        (region("point", cx=4, cy=5), "not a region"),
        (region("polygon", all_points_x=[1, 2, 3], all_points_y=[1, 5]), "not a polygon"),
        (region("rect", x=4, y=6, width=10), "height"),
        (region("circle", cx=12, cy=12, r=-8), "radius"),
        (VIA[0] | {"region_attributes": {}}, "no kind"),
        (VIA[0] | {"region_attributes": ["x"]}, "no kind"),
        (region("rect") | {"shape_attributes": [1]}, "not a region"),
        (None, "no kind, which others have"),
    ],
)
def test_region_of_via_that_cannot_be_used_is_left_out_and_named(tmp_path, bad, message):
    files = {"a.png": (W, H), "via.json": via([VIA[0]] * 9 + [bad], False)}
    coco, notes = read(tmp_path, files)
    assert_objects(coco, [WANTED] * 9)
    (line,) = notes.lines()
    assert "via.json, a.png, region 10" in line and message in line


def cvat(*items, name="a.png"):
    image = f'<image id="0" name="{name}" width="{W}" height="{H}">{"".join(items)}</image>'
    return f'<?xml version="1.0"?>\n<annotations><version>1.1</version>{image}</annotations>'


def element(tag, label="cat", **values):
    return f'<{tag} label="{label}" {" ".join(f"""{k}="{v}" """ for k, v in values.items())}/>'


POLYGON = element("polygon", points="20,2;30,2;30,12;20,12")
TURNED = dict(xtl=8, ytl=10, xbr=32, ybr=20, rotation=90)


@pytest.mark.parametrize(
    "item, wanted",
    [
        (element("box", "dog", xtl=4, ytl=6, xbr=14, ybr=18), ("dog", *BOX_WANTED[1:])),
        (element("box", **TURNED), ("cat", [15, 3, 10, 24], rectangle(15, 3, 10, 24))),
        (element("box", **TURNED | {"rotation": 0}), ("cat", [8, 10, 24, 10],
                                                      rectangle(8, 10, 24, 10))),
        (element("mask", rle="2,3,1,4", left=5, top=7, width=5, height=2),
         ("cat", [6, 7, 4, 2], np.pad([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], ((7, 21), (5, 30))) > 0)),
        (element("mask", rle="0,50", left=-5, top=0, width=10, height=5),
         ("cat", [0, 0, 5, 5], rectangle(0, 0, 5, 5))),
        (element("ellipse", cx=12, cy=12, rx=8, ry=6), ("cat", [4, 6, 16, 12],
                                                        disk(12, 12, 8, 6))),
        (element("ellipse", cx=20, cy=15, rx=12, ry=6, rotation=30),
         ("cat", [pytest.approx(v, abs=1) for v in box_of(SLANTED)], SLANTED)),
    ],
)  # fmt: skip
def test_cvat(tmp_path, item, wanted):
    coco, notes = read(tmp_path, {"a.png": (W, H), "annotations.xml": cvat(POLYGON, item)})
    assert_objects(coco, [WANTED, wanted])
    assert not notes.left_out and not notes.repairs


@pytest.mark.parametrize(
    "bad, message",
    [
        (element("polyline", points="1,2;3,4;5,1"), "a polyline is not a region"),
        (element("points", points="1,2"), "a points is not a region"),
        (element("box", "", xtl=4, ytl=6, xbr=14, ybr=18), "it has no label"),
        (element("box", xtl=4, ytl="x", xbr=14, ybr=18), "not numbers"),
        (element("mask", rle="2,3", left=5, top=7, width=5, height=2), "RLE"),
        (element("mask", rle="", left=5, top=7, width=5, height=2), "RLE"),
        (element("mask", rle="9" * 12, left=5, top=7, width=5, height=2), "RLE"),
    ],
)
def test_element_of_cvat_that_cannot_be_used_is_left_out_and_named(tmp_path, bad, message):
    files = {"a.png": (W, H), "annotations.xml": cvat(*[POLYGON] * 9, bad)}
    coco, notes = read(tmp_path, files)
    assert_objects(coco, [WANTED] * 9)
    (line,) = notes.lines()
    assert "annotations.xml, a.png" in line and " 10: " in line and message in line


@pytest.mark.parametrize(
    "file", [{"l.json": {"x": {"filename": "", "regions": []}}}, {"l.xml": cvat(name="")}]
)
def test_picture_without_a_name_is_told(tmp_path, file):
    with pytest.raises(UserError, match="picture 1 has no name"):
        read(tmp_path, {"a.png": (W, H)} | file)
