"""Keypoints are evaluated as in Detectron2; datasets of other types than COCO are refused."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator as Detectron2sEvaluator
from test_coco_evaluation import run_evaluator

from gnws_d2.config import load_config
from gnws_d2.evaluation import build_evaluator, check_evaluators
from gnws_d2.utils.errors import UserError

NAMES = ["date", "fig", "hazelnut"]


@pytest.fixture
def forget():
    """Remove the datasets that a test has registered."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def config_of(name, tmp_path, *keys):
    keys = ["DATASETS.TEST", f"('{name}',)", "DATASETS.TRAIN", "()", *keys]
    return load_config("quick_start", [*keys, "OUTPUT_DIR", str(tmp_path / "out")])


def test_keypoints_are_evaluated_with_the_sigmas_of_the_config(photographs, tmp_path, forget):
    coco = photographs.coco()
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        points = [(x, y), (x + w, y), (x, y + h), (x + w, y + h), (x + w / 2, y + h / 2)]
        a["keypoints"] = [round(v) for px, py in points for v in (px, py, 2)]
        a["num_keypoints"] = 5
    path = tmp_path / "keypoints.json"
    path.write_text(json.dumps(coco))
    register_coco_instances("key_fruits", {}, str(path), str(photographs.images))
    metadata = MetadataCatalog.get("key_fruits")
    metadata.set(thing_classes=NAMES, thing_dataset_id_to_contiguous_id={1: 0, 2: 1, 3: 2})
    sigmas = [0.1, 0.05, 0.05, 0.05, 0.02]
    keys = ["MODEL.KEYPOINT_ON", "True", "MODEL.MASK_ON", "False"]
    keys += ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "5", "TEST.KEYPOINT_OKS_SIGMAS", str(sigmas)]
    cfg = config_of("key_fruits", tmp_path, *keys)
    check_evaluators(cfg)
    reference = Detectron2sEvaluator(
        "key_fruits", ("bbox", "keypoints"), use_fast_impl=False, kpt_oks_sigmas=sigmas
    )
    records = DatasetCatalog.get("key_fruits")
    results = run_evaluator(build_evaluator(cfg, "key_fruits"), records)
    expected = run_evaluator(reference, records)
    assert results.keys() == expected.keys() == {"bbox", "keypoints"}
    for task in results:
        assert results[task] == pytest.approx(expected[task], nan_ok=True)
    assert 20 < results["keypoints"]["AP"] < 95
    keys[-1] = "[]"
    with pytest.raises(UserError, match=r"TEST.KEYPOINT_OKS_SIGMAS has 17 values"):
        check_evaluators(config_of("key_fruits", tmp_path, *keys))


@pytest.mark.parametrize("name", ["lvis_v1_val", "voc_2007_val", "cityscapes_fine_sem_seg_val"])
def test_other_evaluators_are_refused(tmp_path, name):
    cfg = config_of(name, tmp_path)
    for use in (check_evaluators, lambda cfg: build_evaluator(cfg, name)):
        with pytest.raises(UserError, match=f"{name} has the evaluator_type .* only coco"):
            use(cfg)
