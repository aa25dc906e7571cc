import json
import logging
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest

from gnws_d2.data import check_coco_json
from gnws_d2.data.check import check_dataset, find_issues, read_coco_json
from gnws_d2.data.coco import read_categories
from gnws_d2.utils.errors import UserError

H, W = 600, 800  # of the photographs


def issues_of(coco, image_root, masks=True):
    return {
        (i.level, i.kind, i.item, i.id) for i in find_issues(coco, str(image_root), masks=masks)
    }


def annotation(**values):
    return lambda coco: coco["annotations"][0].update(values)


def rle(counts, size=(H, W)):
    return annotation(segmentation={"size": list(size), "counts": counts})


def image(**values):
    return lambda coco: coco["images"][0].update(values)


@pytest.mark.parametrize(
    "change, level, kind",
    [
        (annotation(image_id=99), "error", "annotation without image"),
        (annotation(category_id="1"), "error", "unknown category"),
        (annotation(category_id=[1]), "error", "unknown category"),
        (annotation(image_id={}), "error", "annotation without image"),
        (annotation(bbox=None), "error", "box"),
        (annotation(bbox=["1", 2, 3, 4]), "error", "box"),
        (annotation(bbox=[True, 2, 3, 4]), "error", "box"),
        (annotation(bbox=[1, 2, float("inf"), 4]), "error", "box"),
        (annotation(bbox=[-(10**300), 2, 10**300, 4]), "error", "box outside its image"),
        (annotation(bbox=[10**400, 2, 3, 4]), "error", "box"),
        (annotation(bbox=[W, 2, 3, 4]), "error", "box outside its image"),
        (annotation(bbox=[3, 2, 0, 4]), "warning", "box with no area"),
        (annotation(bbox=[9, 2, 3, -4]), "warning", "box with no area"),
        (annotation(bbox=[W - 9, 2, 30, 4]), "warning", "box over the edge of its image"),
        (annotation(segmentation=[]), "error", "no segmentation"),
        (annotation(segmentation="x"), "error", "no segmentation"),
        (annotation(segmentation=[3]), "error", "polygon"),
        (annotation(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "error", "polygon"),
        (annotation(segmentation=[[1, 2, 3, 4, 5, "6"]]), "error", "polygon"),
        (annotation(segmentation=[[1, 2, 3, 4]]), "evaluation", "polygon without three points"),
        (annotation(segmentation=[[0] * 7]), "evaluation", "polygon without three points"),
        (annotation(segmentation=[[0, 0, 9, 9, 1e9, 9]]), "error", "polygon outside its image"),
        (rle([H * W], (W, H)), "error", "RLE of another size"),
        (rle([H * W], ("a", 0)), "error", "RLE of another size"),
        (rle([H * W + 1, -1]), "error", "broken RLE"),
        (rle([]), "error", "broken RLE"),
        (rle(""), "error", "broken RLE"),
        (rle("P"), "error", "broken RLE"),  # ends within a number
        (rle("é"), "error", "broken RLE"),
        (rle(None), "error", "broken RLE"),
        (annotation(ignore=1), "error", "'ignore'"),
        (annotation(area=None), "evaluation", "no 'iscrowd' or 'area'"),
        (lambda coco: coco["annotations"][0].pop("bbox"), "error", "box"),
        (annotation(area="9"), "evaluation", "no 'iscrowd' or 'area'"),
        (annotation(id=2), "error", "duplicate annotation id"),
        (image(file_name="gone.jpg"), "error", "missing image"),
        (image(file_name="a\0b"), "error", "missing image"),
        (image(file_name="\ud800"), "error", "missing image"),
        (image(file_name=3), "error", "no file name"),
        (image(file_name="../images/0.jpg"), "error", "path out of the image directory"),
        (image(file_name="a/../../images/0.jpg"), "error", "path out of the image directory"),
        (image(file_name="/etc/passwd"), "error", "path out of the image directory"),
        (image(file_name="http://a/0.jpg"), "error", "path out of the image directory"),
        (image(width=0), "error", "image size"),
        (image(height="600"), "error", "image size"),
        (image(width=100_000, height=100_000), "error", "image size"),
        (image(width=float("nan")), "error", "image size"),
        (lambda coco: coco["categories"][0].pop("name"), "error", "category name"),
        (
            lambda coco: coco["categories"].append(coco["categories"][0]),
            "error",
            "duplicate category id",
        ),
        (lambda coco: coco["images"].append(coco["images"][0]), "error", "duplicate image id"),
    ],
)  # fmt: skip
def test_issue_is_found_and_no_other(photographs, change, level, kind):
    coco = photographs.coco()
    assert issues_of(coco, photographs.images) == set()
    change(coco)
    ((*found, item, id_),) = issues_of(coco, photographs.images)
    assert found == [level, kind]
    assert (item, id_) in {("annotation", i) for i in (1, 2)} | {("image", 0), ("category", 1)}


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_item_without_id_is_found(photographs, key):
    coco = photographs.coco()
    coco[key].append({})
    assert "no id" in {kind for _, kind, *_ in issues_of(coco, photographs.images)}


def test_ids_of_two_types_are_found(photographs):
    coco = photographs.coco()
    coco["categories"].append({"id": "x", "name": "x"})
    assert issues_of(coco, photographs.images) == {("error", "no id", "category", "x")}


@pytest.mark.parametrize("name", ["a\x1b[31mred", "two\nlines", "\u202ereversed", None])
def test_class_name_that_a_terminal_would_obey_is_an_error(photographs, tmp_path, name):
    """Detectron2 prints the names in a table."""
    coco = photographs.coco()
    coco["categories"][0]["name"] = name
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco))
    for read in (read_categories, lambda path: check_coco_json(path, str(photographs.images))):
        with pytest.raises(UserError, match=r"category id 1 has the name .* not printable") as e:
            read(str(path))
        assert str(e.value).isprintable()


def test_class_names_of_any_script_are_read_in_the_order_of_their_ids(photographs, tmp_path):
    coco = photographs.coco()
    coco["categories"] = [{"id": 7, "name": "größe 日本"}, {"id": 2, "name": "fig tree"}]
    (tmp_path / "a.json").write_text(json.dumps(coco))
    assert list(read_categories(str(tmp_path / "a.json")).items()) == [
        (2, "fig tree"), (7, "größe 日本")
    ]  # fmt: skip


def test_pipe_is_not_taken_for_an_image(photographs, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    coco = photographs.coco()
    coco["images"] = [{**coco["images"][0], "file_name": "pipe.jpg"}]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] == 0]
    assert issues_of(coco, tmp_path) == {("error", "missing image", "image", 0)}


def test_annotations_without_segmentation_train_boxes_only(photographs, tmp_path):
    coco = photographs.coco()
    for a in coco["annotations"]:
        del a["segmentation"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco))
    check_coco_json(str(path), str(photographs.images))
    assert check_dataset(str(path), str(photographs.images)) == []
    with pytest.raises(
        UserError, match=r"annotation id 1 has the segmentation None.*MODEL.MASK_ON"
    ):
        check_coco_json(str(path), str(photographs.images), masks=True)


def test_what_only_evaluation_needs_does_not_stop_training(photographs, tmp_path):
    coco = photographs.coco()
    coco["annotations"][0].pop("area")
    coco["annotations"][1]["segmentation"].append([1, 2, 3, 4])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco))
    check_coco_json(str(path), str(photographs.images), masks=True)
    with pytest.raises(UserError, match=r"annotation id 1 .*'area'"):
        check_coco_json(str(path), str(photographs.images), masks=True, evaluation=True)


def test_ids_are_not_taken_for_anything_else(photographs):
    coco = photographs.coco()
    for image in coco["images"]:
        image["id"] = f"{{x}} %s {image['id']}"
    for a in coco["annotations"]:
        a["image_id"] = f"{{x}} %s {a['image_id']}"
    assert issues_of(coco, photographs.images) == set()
    coco["annotations"][0]["bbox"] = [W, 0, 3, 4]
    (issue,) = find_issues(coco, str(photographs.images), masks=True)
    assert "its image id '{x} %s 0' of 800x600" in issue.message


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_of_any_mask_is_no_issue_and_a_longer_one_is(photographs, compressed):
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
            ((_, kind, *_),) = issues_of(coco, photographs.images)
            assert kind == "broken RLE"


JSON = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '"images"',
    "NaN",
    "{}",
    '{"images": null, "categories": []}',
    '{"images": {}, "annotations": {}, "categories": {}}',
    '{"images": [], "annotations": [], "categories": []}',
    '{"images": [{}], "annotations": null, "categories": [{}]}',
    '{"images": [3], "annotations": [], "categories": [{}]}',
    '{"images": [{}], "annotations": [], "categories": ["a"]}',
    "[" * 100_000,
    '{"images": ' + "[" * 100_000,
    '{"images": [' + "9" * 5000 + "]}",
    "\ufeff{}",
]


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_json_of_another_kind_is_one_sentence(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)) as e:
        read_coco_json(str(path))
    assert "\n" not in str(e.value)


def test_bytes_that_are_no_text_are_one_sentence(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(UserError, match=str(path)):
        read_coco_json(str(path))


@pytest.fixture
def check(photographs, tmp_path):
    """Check the photographs' annotations after a change to them."""

    def check(change=lambda coco: None):
        coco = photographs.coco()
        change(coco)
        path = tmp_path / "annotations.json"
        path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
        return check_coco_json(str(path), str(photographs.images))

    return check


def test_good_annotations_give_the_class_names_in_order_of_id(check):
    assert check() == ["date", "fig", "hazelnut"]
    assert check(lambda coco: coco["categories"].reverse()) == ["date", "fig", "hazelnut"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            annotation(id=1077, category_id=9),
            "annotation id 1077 has category id 9, .*'categories'",
        ),
        (annotation(id=1077, image_id=99), "annotation id 1077 is of image id 99, .*'images'"),
        (
            annotation(id=1077, bbox=[800, 10, 5, 5]),
            "annotation id 1077 .*outside .* its image id 0",
        ),
        (
            annotation(id=1077, bbox=[-9, 10, 5, 5]),
            "annotation id 1077 .*outside .* its image id 0",
        ),
        (annotation(id=1077, bbox=[1, 2, 3]), "annotation id 1077 .*four finite numbers"),
        (
            annotation(id=1077, bbox=[1, 2, float("nan"), 4]),
            "annotation id 1077 .*four finite numbers",
        ),
        (
            lambda coco: coco["images"][3].update(file_name="gone.jpg"),
            "image id 3 has a file that does not exist .*gone.jpg",
        ),
        (lambda coco: coco.pop("categories"), "COCO's instances format: no list 'categories'"),
        (lambda coco: coco["annotations"][0].pop("bbox"), "annotation id 1 has the box None"),
    ],
)
def test_first_error_is_named(check, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as e:
        check(change)
    assert str(tmp_path / "annotations.json") in str(e.value)
    assert "\n" not in str(e.value)


def test_box_over_the_edge_is_clipped_with_one_warning(check, caplog):
    with caplog.at_level(logging.WARNING):
        check(annotation(id=1077, bbox=[780, 10, 50, 50]))
    assert "1 x box over the edge" in caplog.text and "annotation id 1077" in caplog.text


def test_boxes_of_corners_are_recognized(photographs, tmp_path):
    coco = photographs.coco()
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    (tmp_path / "a.json").write_text(json.dumps(coco))
    with pytest.raises(UserError, match="boxes seem to be x1, y1, x2, y2"):
        check_coco_json(str(tmp_path / "a.json"), str(photographs.images))
    check_coco_json(str(photographs.json_file), str(photographs.images))


def test_more_objects_than_the_model_can_find_are_a_warning(photographs, caplog):
    files = str(photographs.json_file), str(photographs.images)
    check_coco_json(*files, object_limits={"TEST.DETECTIONS_PER_IMAGE": 100})
    assert not caplog.text
    check_coco_json(*files, object_limits={"TEST.DETECTIONS_PER_IMAGE": 2, "MODEL.X": 100})
    assert "image with more objects than the model can find; the first: one of " in caplog.text
    assert "raise TEST.DETECTIONS_PER_IMAGE." in caplog.text
