import pytest
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from gnws_d2.config import load_config
from gnws_d2.data import check_datasets, coco_json, register_coco_datasets
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


@pytest.mark.parametrize("keep", [True, False])
def test_file_is_read_once_where_the_check_keeps_it(photographs, monkeypatch, keep):
    reads, read = [], coco_json.orjson.loads
    monkeypatch.setattr(coco_json.orjson, "loads", lambda text: reads.append(1) or read(text))
    files = [str(photographs.json_file), str(photographs.images)]
    name = f"fruits_read_once_{keep}"
    register_coco_datasets([[name, *files]])
    keys = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
    cfg = load_config(str(ROOT / "configs" / "quick_start.yaml"), keys)
    check_datasets(cfg, ("TRAIN", "TEST"), keep=keep)
    assert len(DatasetCatalog.get(name)) == 18 and len(reads) == (1 if keep else 2)
    assert coco_json._kept == {}
    assert len(DatasetCatalog.get(name)) == 18  # again, when nothing is kept


@pytest.mark.parametrize("source", ["shapes", "photographs"])
def test_dataset_dicts_are_detectron2s(source, photographs, shapes_root):
    if source == "shapes":
        DatasetCatalog.get("shapes_val")  # generates them
        metadata = MetadataCatalog.get("shapes_val")
        files = metadata.json_file, metadata.image_root
    else:
        files = str(photographs.json_file), str(photographs.images)
    ours = coco_json.load_coco_json(*files, f"{source}_ours")
    assert ours == load_coco_json(*files, f"{source}_detectron2") and len(ours) > 10
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        values = [MetadataCatalog.get(f"{source}_{who}").get(key) for who in ("ours", "detectron2")]
        assert values[0] == values[1]
