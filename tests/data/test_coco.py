import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from gnws_d2.config import load_config
from gnws_d2.data import check_datasets, register_coco_datasets
from gnws_d2.data.coco import dataset_classes
from gnws_d2.utils.errors import UserError


def config_of(name, *keys):
    keys = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", *keys]
    return load_config("quick_start", keys)


def test_registering_reads_nothing_and_may_be_repeated(photographs, tmp_path):
    dataset = ["fruits_registered", str(photographs.json_file), str(photographs.images)]
    register_coco_datasets([dataset])
    register_coco_datasets([dataset, ["not_there_yet", str(tmp_path / "x.json"), str(tmp_path)]])
    assert len(DatasetCatalog.get("fruits_registered")) == 18
    with pytest.raises(UserError, match="fruits_registered"):
        register_coco_datasets([[dataset[0], "other.json", dataset[2]]])
    with pytest.raises(UserError, match="coco_2017_val"):
        register_coco_datasets([["coco_2017_val", *dataset[1:]]])


def test_file_that_has_changed_is_checked_and_loaded_anew(photographs, tmp_path):
    """As in a notebook that fine-tunes twice in the same directory."""
    content, path = photographs.coco(), tmp_path / "changing.json"
    path.write_text(json.dumps(content))
    register_coco_datasets([["fruits_changing", str(path), str(photographs.images)]])
    check_datasets(config_of("fruits_changing"), ("TRAIN",))
    DatasetCatalog.get("fruits_changing")
    for number, category in enumerate(content["categories"]):
        category["name"] = f"fruit {number}"
    path.write_text(json.dumps(content))
    register_coco_datasets([["fruits_changing", str(path), str(photographs.images)]])
    check_datasets(config_of("fruits_changing"), ("TRAIN",))
    names = ["fruit 0", "fruit 1", "fruit 2"]
    assert list(dataset_classes("fruits_changing").values()) == names
    DatasetCatalog.get("fruits_changing")
    assert MetadataCatalog.get("fruits_changing").thing_classes == names


def test_dataset_of_a_function_needs_no_file_and_no_names():
    DatasetCatalog.register("of_a_function_alone", list)
    check_datasets(config_of("of_a_function_alone"), ("TRAIN",))
    MetadataCatalog.get("of_a_function_alone").thing_classes = ["a", "b"]
    with pytest.raises(UserError, match="of_a_function_alone has 2 classes"):
        check_datasets(config_of("of_a_function_alone"), ("TRAIN",))
    DatasetCatalog.remove("of_a_function_alone")
    MetadataCatalog.remove("of_a_function_alone")
