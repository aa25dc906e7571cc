"""
Whatever is in an annotation file, Detectron2 and pycocotools read it, or a UserError says why not.
For long: pytest tests/data/test_check_fuzz.py --hypothesis-profile fuzz --hypothesis-seed 0.
"""

import contextlib
import copy
import json
import logging

import pycocotools.mask as mask_util
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from fuzz import Choice, decisions, mutate_bytes, outcome
from hypothesis import assume, given
from hypothesis import strategies as st

from gnws_d2.data.check import find_issues, read_coco_json
from gnws_d2.data.coco import check_coco_json
from gnws_d2.evaluation import read_truth
from gnws_d2.utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    logging.disable(logging.CRITICAL)
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (directory / "images" / name).write_bytes(b"")
    yield directory
    logging.disable(logging.NOTSET)


structured = st.binary(min_size=2, max_size=20)
COCO = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 8, "height": 6},
        {"id": 2, "file_name": "b.jpg", "width": 6, "height": 8},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4.5, 3], "area": 9, "iscrowd": 0,
         "segmentation": [[1, 1, 5.5, 1, 1, 4]], "keypoints": [1, 1, 2]},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 8, 6], "area": 48, "iscrowd": 1,
         "segmentation": {"size": [6, 8], "counts": [8, 40]}},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 3, 3], "area": 9, "iscrowd": 0,
         "segmentation": {"size": [8, 6], "counts": "035000h0"}},
    ],
    "categories": [{"id": 1, "name": "a"}, {"id": 3, "name": "b"}],
}  # fmt: skip
ODD = [
    None, True, False, 0, 1, 2, 3, -1, 1.0, 1.5, 8, 1e9, -1e300, 10**9, 2**31, 2**63, 10**30,
    float("nan"), float("inf"), "", "1", "a", "{x}", "a.jpg", "../a.jpg", "/etc/passwd",
    "a\0", "\ud800", "é", "PPPP", "o" * 40, "X" * 5000, [], {}, [[]], [{}], [1], [1, 2, 3, 4],
    [1, 1, 5, 1, 1, 4], [[1, 2]], [None] * 4, {"id": 1}, {"size": [6, 8], "counts": [48]},
    {"size": [6, 8], "counts": "P"}, {"size": [8, 6], "counts": "`1"}, {"counts": []}, "id",
    "width", "ignore", "keypoints", "bbox",
]  # fmt: skip
KEYS_OF_COCO = {key for items in COCO.values() for item in items for key in item} | {"ignore", "x"}
JSON_TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"NaN", b"-Infinity", b"1e999",
    b"9" * 5000, b"[" * 3000, b'{"":' * 3000, b"\\ud800", b"\xff", b"\0", b'"images":',
    b'"annotations":null', b"-",
]  # fmt: skip


def mutate_json(content, choice):
    whole = [content]
    while choice:
        parent, key = whole, 0
        while isinstance(parent[key], (dict, list)) and parent[key] and choice.below(5):
            parent = parent[key]
            key = choice.of(list(parent)) if isinstance(parent, dict) else choice.below(len(parent))
        kind = choice.below(4)
        if kind == 0 and parent is not whole:
            del parent[key]
        elif kind == 1 and isinstance(parent, list) and parent is not whole:
            parent.append(copy.deepcopy(parent[key]))
        elif kind == 1 and isinstance(parent[key], dict):
            parent[key][choice.of(sorted(KEYS_OF_COCO))] = copy.deepcopy(choice.of(ODD))
        else:
            parent[key] = copy.deepcopy(choice.of(ODD))
    return whole[0]


def is_checked(value):
    """Whether keypoints are numbers, which nothing checks."""
    if isinstance(value, dict):
        keypoints = value.get("keypoints") or []
        if not isinstance(keypoints, list) or not {int, float}.issuperset(map(type, keypoints)):
            return False
        value = list(value.values())
    return not isinstance(value, list) or all(map(is_checked, value))


@given(structured, decisions, st.sampled_from(["json", "json", "bytes", "both"]))
def test_annotations(directory, first, second, how):
    path = directory / "a.json"
    content = copy.deepcopy(COCO)
    if how != "bytes":
        content = mutate_json(content, Choice(first))
    content = json.dumps(content).encode()
    if how != "json":
        content = mutate_bytes(content, Choice(second), JSON_TOKENS)
    path.write_bytes(content)
    with contextlib.suppress(ValueError, RecursionError):
        assume(is_checked(json.loads(content)))

    def check_file():
        return check_coco_json(str(path), str(directory / "images"), masks=True, evaluation=True)

    classes = outcome(check_file)
    if classes is None:
        return
    # Detectron2 and hotcoco read what passes, and pycocotools makes masks of it.
    records = load_coco_json(str(path), str(directory / "images"), "fuzz")
    names = MetadataCatalog.pop("fuzz").thing_classes
    assert names == list(classes.values()) and len(records) > 0
    read_truth(str(path))
    for record in records:
        size = record["height"], record["width"]
        for annotation in record["annotations"]:
            assert 0 <= annotation["category_id"] < len(names)
            masks = annotation["segmentation"]
            if isinstance(masks, list):
                masks = mask_util.merge(mask_util.frPyObjects(masks, *size))
            assert mask_util.area(masks) <= size[0] * size[1]


@given(structured)
def test_any_content_has_issues_with_messages(directory, seed):
    """Whatever it is, there is no other error."""
    path = directory / "b.json"
    path.write_text(json.dumps(mutate_json(copy.deepcopy(COCO), Choice(seed))))
    try:
        coco = read_coco_json(str(path))
    except UserError:
        return
    for issue in find_issues(coco, str(directory / "images"), masks=True):
        assert issue.message.startswith(f"{issue.item} id ") and issue.message.endswith(".")


def test_what_is_mutated_is_taken_as_it_is(directory):
    path = directory / "whole.json"
    path.write_text(json.dumps(COCO))
    names = check_coco_json(str(path), str(directory / "images"), masks=True, evaluation=True)
    assert names == {1: "a", 3: "b"}
