"""labelme, VIA and CVAT give the hand-made objects, or say which cannot be used."""

import math

import numpy as np
import pytest
from builders import (
    BOX,
    OUTLINE,
    H,
    W,
    assert_objects,
    box_of,
    classes_of,
    cvat,
    disk,
    element,
    files_of,
    labelme,
    mask_shape,
    read,
    rectangle,
    region,
    shape,
    via,
)  # fmt: skip

from gnws_d2.utils.errors import UserError


def an(mask, name="cat", abs=0.5):
    """An object with a mask, and its box but for some pixels."""
    return name, [pytest.approx(v, abs=abs) for v in box_of(mask)], mask


FULL = np.ones((12, 10), bool)
GOOD = shape("polygon", *OUTLINE)
AS_BOX = ((4, 6), (14, 6), (14, 18), (4, 18))
WANTED, BOX_WANTED = an(rectangle(20, 2, 10, 10)), an(rectangle(*BOX))
DIAMOND = np.abs(np.mgrid[:H, :W] - [[[14.5]], [[14.7]]]).sum(0) < 10
CIRCLE, SLANTED = an(disk(12, 12, 8, 8), abs=1), an(disk(20, 15, 12, 6, 30), abs=1)


@pytest.mark.parametrize(
    "shapes, wanted",
    [
        ([shape("rectangle", (14, 18), (4, 6))], [BOX_WANTED]),
        ([shape("rectangle", *AS_BOX)], [BOX_WANTED]),
        ([shape("rotation", *AS_BOX)], [BOX_WANTED]),
        ([shape("rotation", (15.2, 5), (25.2, 15), (15.2, 25), (5.2, 15))], [an(DIAMOND, abs=1)]),
        ([shape("circle", (12, 12), (12, 20))], [CIRCLE]),
        ([mask_shape(4, 6, FULL)], [BOX_WANTED]),
        ([mask_shape(34, 6, FULL)], [an(rectangle(34, 6, 6, 12))]),
        ([mask_shape(-4, 6, FULL)], [an(rectangle(0, 6, 6, 12))]),
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
    assert files_of({"all": coco}) == {"all": ["x/a.png"]}
    assert_objects(coco, [WANTED])


def test_background_of_labelme_is_left_out_and_ignored_regions_are_crowds_of_all_classes(tmp_path):
    shapes = [shape("polygon", *OUTLINE, label=name) for name in ("cat", "dog", "_background_")]
    shapes.insert(2, shape("rectangle", (4, 6), (14, 18), label="__ignore__"))
    coco, _ = read(tmp_path, {"a.png": (W, H), "a.json": labelme(*shapes)})
    assert_objects(coco, [(n, *own[1:]) for own in (WANTED, BOX_WANTED) for n in ("cat", "dog")])
    assert [a["iscrowd"] for a in coco["annotations"]] == [0, 0, 1, 1]


VIA = [
    region("polygon", all_points_x=[20, 30, 30, 20], all_points_y=[2, 2, 12, 12]),
    region("rect", "dog", x=4, y=6, width=10, height=12),
    region("circle", cx=12, cy=12, r=8),
    region("ellipse", cx=20, cy=15, rx=12, ry=6, theta=math.radians(30)),
]


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_via(tmp_path, project, as_dict):
    regions = {str(i): r for i, r in enumerate(VIA)} if as_dict else VIA
    coco, notes = read(tmp_path, {"a.png": (W, H), "via.json": via(regions, project)})
    assert_objects(coco, [WANTED, ("dog", *BOX_WANTED[1:]), CIRCLE, SLANTED])
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
    assert classes_of(coco) == list(wanted)


POLYGON = element("polygon", points="20,2;30,2;30,12;20,12")
TURNED = dict(xtl=8, ytl=10, xbr=32, ybr=20, rotation=90)
RLE = dict(left=5, top=7, width=5, height=2)


@pytest.mark.parametrize(
    "item, wanted",
    [
        (element("box", "dog", xtl=4, ytl=6, xbr=14, ybr=18), ("dog", *BOX_WANTED[1:])),
        (element("box", **TURNED), an(rectangle(15, 3, 10, 24))),
        (element("box", **TURNED | {"rotation": 0}), an(rectangle(8, 10, 24, 10))),
        (element("mask", rle="2,3,1,4", **RLE),
         an(np.pad([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], ((7, 21), (5, 30))) > 0)),
        (element("mask", rle="0,50", left=-5, top=0, width=10, height=5),
         an(rectangle(0, 0, 5, 5))),
        (element("ellipse", cx=12, cy=12, rx=8, ry=6), an(disk(12, 12, 8, 6), abs=1)),
        (element("ellipse", cx=20, cy=15, rx=12, ry=6, rotation=30), SLANTED),
    ],
)  # fmt: skip
def test_cvat(tmp_path, item, wanted):
    coco, notes = read(tmp_path, {"a.png": (W, H), "annotations.xml": cvat(POLYGON, item)})
    assert_objects(coco, [WANTED, wanted])
    assert not notes.left_out and not notes.repairs


@pytest.mark.parametrize(
    "bad, message",
    [
        (shape("point", (1, 1), (5, 9)), "'point' is not a region"),
        (shape("line", (1, 1), (5, 9)), "'line' is not a region"),
        (shape("polygon", (1, 1), label=""), "it has no label"),
        (shape("rectangle", (4, 6)), "two or four points"),
        (shape("rectangle", (4, 6), (14, 6), (14, 18)), "two or four points"),
        (shape("circle", (4, 6)), "circle"),
        (shape("polygon", (1, "x"), (2, 2), (3, 4)), "not pairs of numbers"),
        (shape("mask", (4, 6), (13, 17), mask="AAAA"), "PNG"),
        (shape("mask", (4, 6), (13, 17)), "PNG"),
        ({"label": "cat"}, "not pairs of numbers"),
        ([], "it has no label"),
        (region("polyline", all_points_x=[1, 2, 3], all_points_y=[1, 5, 1]), "not a region"),
        (region("point", cx=4, cy=5), "not a region"),
        (region("polygon", all_points_x=[1, 2, 3], all_points_y=[1, 5]), "not a polygon"),
        (region("rect", x=4, y=6, width=10), "height"),
        (region("circle", cx=12, cy=12, r=-8), "radius"),
        (VIA[0] | {"region_attributes": {}}, "no kind"),
        (VIA[0] | {"region_attributes": ["x"]}, "no kind"),
        (region("rect") | {"shape_attributes": [1]}, "not a region"),
        (None, "no kind, which others have"),
        (element("polyline", points="1,2;3,4;5,1"), "a polyline is not a region"),
        (element("points", points="1,2"), "a points is not a region"),
        (element("box", "", xtl=4, ytl=6, xbr=14, ybr=18), "it has no label"),
        (element("box", xtl=4, ytl="x", xbr=14, ybr=18), "not numbers"),
        (element("mask", rle="2,3", **RLE), "RLE"),
        (element("mask", rle="", **RLE), "RLE"),
        (element("mask", rle="9" * 12, **RLE), "RLE"),
    ],
)
def test_region_that_cannot_be_used_is_left_out_and_named(tmp_path, bad, message):
    name, label, where = "via.json", via([VIA[0]] * 9 + [bad], False), ", a.png, region 10: "
    if isinstance(bad, str):
        name, label, where = "annotations.xml", cvat(*[POLYGON] * 9, bad), " 10: "
    elif bad == [] or (bad and "label" in bad):
        name, label, where = "a.json", labelme(*[GOOD] * 9, bad), ", shape 10: "
    coco, notes = read(tmp_path, {"a.png": (W, H), name: label})
    assert_objects(coco, [WANTED] * 9)
    (line,) = notes.lines()
    assert "Left out 1 x object" in line and name in line and where in line and message in line


@pytest.mark.parametrize(
    "file", [{"l.json": {"x": {"filename": "", "regions": []}}}, {"l.xml": cvat(name="")}]
)
def test_picture_without_a_name_is_told(tmp_path, file):
    with pytest.raises(UserError, match="picture 1 has no name"):
        read(tmp_path, {"a.png": (W, H)} | file)
