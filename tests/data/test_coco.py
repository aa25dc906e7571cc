import json
import logging

import pytest
from detectron2.data import DatasetCatalog

from gnws_d2.data import check_coco_json, register_coco_datasets
from gnws_d2.utils.errors import UserError


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


def set_first(**values):
    return lambda coco: coco["annotations"][0].update(values)


@pytest.mark.parametrize(
    "change, message",
    [
        (set_first(id=1077, category_id=9), "annotation id 1077 has category id 9, .*'categories'"),
        (set_first(id=1077, image_id=99), "annotation id 1077 is of image id 99, .*'images'"),
        (set_first(id=1077, bbox=[800, 10, 5, 5]), "annotation id 1077 .*outside its image id 0"),
        (set_first(id=1077, bbox=[-9, 10, 5, 5]), "annotation id 1077 .*outside its image id 0"),
        (set_first(id=1077, bbox=[1, 2, 3]), "annotation id 1077 .*four finite numbers"),
        (
            set_first(id=1077, bbox=[1, 2, float("nan"), 4]),
            "annotation id 1077 .*four finite numbers",
        ),
        (
            lambda coco: coco["images"][3].update(file_name="gone.jpg"),
            "image id 3 has a file that does not exist: .*gone.jpg",
        ),
        (lambda coco: coco.pop("categories"), "COCO's instances format: .* no list 'categories'"),
        (lambda coco: coco["annotations"][0].pop("bbox"), "annotation id 1 has no 'bbox'"),
    ],
)
def test_fault_is_named(check, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as e:
        check(change)
    assert str(tmp_path / "annotations.json") in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": 3}', "\x80"])
def test_file_that_is_no_coco_json_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin1")
    with pytest.raises(UserError, match=str(path)):
        check_coco_json(str(path), "")


def test_box_over_the_edge_is_clipped_with_one_warning(check, caplog):
    with caplog.at_level(logging.WARNING):
        check(set_first(id=1077, bbox=[780, 10, 50, 50]))
    assert "1 x box over the edge" in caplog.text and "annotation id 1077" in caplog.text


def test_registering_reads_nothing_and_may_be_repeated(photographs, tmp_path):
    dataset = ["fruits_registered", str(photographs.json_file), str(photographs.images)]
    register_coco_datasets([dataset])
    register_coco_datasets([dataset, ["not_there_yet", str(tmp_path / "x.json"), str(tmp_path)]])
    assert len(DatasetCatalog.get("fruits_registered")) == 18
    with pytest.raises(UserError, match="fruits_registered"):
        register_coco_datasets([[dataset[0], "other.json", dataset[2]]])
    with pytest.raises(UserError, match="coco_2017_val"):
        register_coco_datasets([["coco_2017_val", *dataset[1:]]])
