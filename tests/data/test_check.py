import json
import logging
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest

from gnws_d2.data import check_coco_json
from gnws_d2.data.check import find_issues, read_coco_json
from gnws_d2.data.coco import read_categories
from gnws_d2.utils.errors import UserError

H, W = 600, 800  # of the photographs


@pytest.fixture
def check(photographs, tmp_path):
    """Check the photographs' annotations after a change to them."""

    def check(change, function=check_coco_json, **options):
        coco = photographs.coco()
        change(coco)
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(coco))
        return function(str(path), str(photographs.images), **options)

    return check


def issues_of(coco, image_root, masks=True):
    issues = find_issues(coco, str(image_root), masks=masks)
    return {(issue.level, issue.item, issue.id, issue.key) for issue in issues}


def annotation(**values):
    return lambda coco: coco["annotations"][0].update(values)


def image(**values):
    return lambda coco: coco["images"][0].update(values)


def rle(counts, size=(H, W)):
    return {"size": [*size], "counts": counts}


# What is wrong in each field, by the level of the issue, and the item.
FAULTS = {
    ("error", "annotation"): {
        "id": [2],
        "image_id": [99, {}],
        "category_id": ["1", [1]],
        "ignore": [1],
        "bbox": [
            None, ["1", 2, 3, 4], [True, 2, 3, 4], [1, 2, float("inf"), 4], [W, 2, 3, 4],
            [-(10**300), 2, 10**300, 4], [10**400, 2, 3, 4],
        ],
        "segmentation": [
            [], "x", [3], [[1, 2, 3, 4, 5, None]], [[0, 0, 9, 9, 1e9, 9]], rle([]), rle(None),
            rle([H * W], (W, H)), rle([H * W], ("a", 0)), rle([H * W + 1, -1]), rle("é"),
            rle("P"),  # ends within a number
        ],
    },
    ("warning", "annotation"): {"bbox": [[3, 2, 0, 4], [9, 2, 3, -4], [W - 9, 2, 30, 4]]},
    ("evaluation", "annotation"): {
        "area": [None, "9"], "segmentation": [[[1, 2, 3, 4]], [[0] * 7]],
    },
    ("error", "image"): {
        "file": ["gone.jpg", "a\0b", "\ud800"],
        "file_name": [
            3, "../images/0.jpg", "a/../../images/0.jpg", "/etc/passwd", "http://a/0.jpg"
        ],
        "size": [(0, H), (W, "600"), (100_000, 100_000), (float("nan"), H)],
        "id": [1],
    },
    ("error", "category"): {"name": [None, 3], "id": [2]},
}  # fmt: skip


@pytest.mark.parametrize(
    "level, item, key, value",
    [(*k, key, v) for k, fields in FAULTS.items() for key, own in fields.items() for v in own],
)
def test_issue_is_found_and_no_other(photographs, level, item, key, value):
    coco = photographs.coco()
    assert issues_of(coco, photographs.images) == set()
    items = coco["categories" if item == "category" else f"{item}s"]
    own = items[0]
    if key == "id" and item != "annotation":  # others refer to it
        items.append({**items[1], "id": value})
    elif key == "size":
        own["width"], own["height"] = value
    else:
        own["file_name" if key == "file" else key] = value
    ((*found, id_, found_key),) = issues_of(coco, photographs.images)
    assert (*found, found_key) == (level, item, key)
    assert id_ in (0, 1, 2)


@pytest.mark.parametrize("id_", ["x", -1, 1.5, 2**60, True, [1]])
@pytest.mark.parametrize("items", ["images", "annotations", "categories"])
def test_id_that_is_not_a_whole_number_is_found(photographs, items, id_):
    coco = photographs.coco()
    coco[items].append({**coco[items][0], "id": id_})
    issues = find_issues(coco, str(photographs.images), masks=True)
    assert [(issue.id, issue.key) for issue in issues] == [(id_, "id")]


@pytest.mark.parametrize("name", ["a\x1b[31mred", "two\nlines", "\u202ereversed", None])
def test_class_name_that_a_terminal_would_obey_is_an_error(check, name):
    """Detectron2 prints the names in a table."""

    for function in (check_coco_json, lambda path, *_: read_categories(path)):
        with pytest.raises(UserError, match=r"category id 1 has the name .* not printable") as e:
            check(lambda coco: coco["categories"][0].update(name=name), function)
        assert str(e.value).isprintable()


def test_class_names_of_any_script_are_read_in_the_order_of_their_ids(check):
    categories = [{"id": 7, "name": "größe 日本"}, {"id": 2, "name": "fig tree"}]
    change = {"categories": categories}
    names = check(lambda coco: coco.update(change), lambda path, *_: read_categories(path))
    assert list(names.items()) == [(2, "fig tree"), (7, "größe 日本")]
    names = check(lambda coco: coco["categories"].reverse())
    assert list(names.items()) == [(1, "date"), (2, "fig"), (3, "hazelnut")]


def test_pipe_is_not_taken_for_an_image(photographs, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    coco = photographs.coco()
    coco["images"] = [{**coco["images"][0], "file_name": "pipe.jpg"}]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] == 0]
    assert issues_of(coco, tmp_path) == {("error", "image", 0, "file")}


def test_annotations_without_segmentation_train_boxes_only(check):
    def change(coco):
        for a in coco["annotations"]:
            del a["segmentation"]

    check(change)
    with pytest.raises(UserError, match=r"id 1 has the segmentation None.*MODEL.MASK_ON"):
        check(change, masks=True)


def test_what_only_evaluation_needs_does_not_stop_training(check):
    def change(coco):
        coco["annotations"][0].pop("area")
        coco["annotations"][1]["segmentation"].append([1, 2, 3, 4])

    check(change, masks=True)
    with pytest.raises(UserError, match=r"annotation id 1 .*'area'"):
        check(change, masks=True, evaluation=True)


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_is_decoded_and_a_longer_one_is_an_issue(photographs, compressed):
    """The reference is pycocotools' own encoder."""
    rng = np.random.RandomState(0)
    coco = photographs.coco()
    coco["annotations"] = coco["annotations"][:1]
    for scale in (1, 20, 400):
        for density in (0, 0.02, 0.5, 1):
            small = rng.rand(-(-H // scale), -(-W // scale)) < density
            mask = np.kron(small, np.ones((scale, scale)))[:H, :W].astype(np.uint8)
            segmentation = mask_util.encode(np.asfortranarray(mask))
            segmentation["counts"] = segmentation["counts"].decode()
            if not compressed:
                flat = mask.ravel(order="F")
                edges = np.flatnonzero(np.diff(flat)) + 1
                runs = np.diff([0, *edges, H * W]).tolist()
                segmentation["counts"] = [0, *runs] if flat[0] else runs
                assert mask_util.area(mask_util.frPyObjects(segmentation, H, W)) == mask.sum()
            coco["annotations"][0]["segmentation"] = segmentation
            assert not issues_of(coco, photographs.images)
            segmentation["counts"] += "9" if compressed else [9]
            (issue,) = find_issues(coco, str(photographs.images), masks=True)
            assert "has RLE that cannot be decoded" in issue.message


JSON = [
    "", "{", "[]", "NaN", "{}", "[" * 100_000, '{"images": ' + "[" * 100_000,
    '{"images": [' + "9" * 5000 + "]}", b'{"images": "\xff\xfe"}',
    '{"images": {}, "annotations": {}, "categories": {}}',
    '{"images": [], "annotations": [], "categories": []}',
    '{"images": [{}], "annotations": null, "categories": [{}]}',
    '{"images": [3], "annotations": [], "categories": [{}]}',
    '{"images": [{}], "annotations": [], "categories": ["a"]}',
]  # fmt: skip


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_file_that_is_not_coco_json_is_an_error_of_one_sentence(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=str(path)) as e:
        read_coco_json(str(path))
    assert "\n" not in str(e.value)


def to_corners(coco):
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x, y, x + w, y + h]


@pytest.mark.parametrize(
    "change, message",
    [
        (annotation(id=7, category_id=9), "annotation id 7 has category id 9, .*'categories'"),
        (annotation(id=7, bbox=[800, 10, 5, 5]),
         "annotation id 7 .* its image id 0 of 800x600: its box is outside of"),
        (annotation(id=7, bbox=[1, 2, 3]), "annotation id 7 .*four finite numbers"),
        (image(file_name="gone.jpg"), "image id 0 has a file that does not exist .*gone.jpg"),
        (image(file_name="../0.jpg"), r"image id 0 has the file name '\.\./0\.jpg'"),
        (lambda coco: coco.pop("categories"), "COCO's instances format: no list 'categories'"),
        (to_corners, "boxes seem to be x1, y1, x2, y2"),
    ],
)  # fmt: skip
def test_first_error_names_the_file_and_the_item(check, tmp_path, change, message):
    def change_with_warning(coco):
        coco["annotations"][4]["bbox"] = [3, 2, 0, 4]
        change(coco)

    own = change if change is to_corners else change_with_warning
    with pytest.raises(UserError, match=message) as e:
        check(own, skip_bad_images="gone" not in message)
    assert str(tmp_path / "annotations.json") in str(e.value)
    assert "\n" not in str(e.value)


def test_clipped_boxes_and_skipped_images_are_warnings(check, caplog):
    def change(coco):
        coco["images"][3]["file_name"] = "gone.jpg"
        for a in coco["annotations"][:2]:
            a["bbox"] = [780, 10, 50, 50]

    with pytest.raises(UserError, match="image id 3"):
        check(change)
    with caplog.at_level(logging.WARNING):
        check(change, skip_bad_images=True)
    assert "1 warning(s) about 'file'; the first: image id 3 has a file" in caplog.text
    assert "2 warning(s) about 'bbox'; the first: annotation id 1 has the box" in caplog.text
