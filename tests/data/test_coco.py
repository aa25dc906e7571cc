import pytest
from detectron2.data import DatasetCatalog

from gnws_d2.data import register_coco_datasets
from gnws_d2.utils.errors import UserError


def test_registering_reads_nothing_and_may_be_repeated(photographs, tmp_path):
    dataset = ["fruits_registered", str(photographs.json_file), str(photographs.images)]
    register_coco_datasets([dataset])
    register_coco_datasets([dataset, ["not_there_yet", str(tmp_path / "x.json"), str(tmp_path)]])
    assert len(DatasetCatalog.get("fruits_registered")) == 18
    with pytest.raises(UserError, match="fruits_registered"):
        register_coco_datasets([[dataset[0], "other.json", dataset[2]]])
    with pytest.raises(UserError, match="coco_2017_val"):
        register_coco_datasets([["coco_2017_val", *dataset[1:]]])
