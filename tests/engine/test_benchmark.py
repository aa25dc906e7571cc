import contextlib
import sys

import pytest
import torch

from gnws_d2 import model_zoo
from gnws_d2.engine import benchmark
from gnws_d2.layers import WSConv2d

CPU = torch.device("cpu")


def test_variants_take_turns_and_warm_up_in_each(monkeypatch):
    monkeypatch.setattr(benchmark, "_memory_of", lambda *_: contextlib.nullcontext())
    calls = []
    variants = [benchmark.Variant(n, lambda n=n: calls.append(n)) for n in "ab"]
    benchmark.measure(variants, CPU, turns=2, runs=1, memory=False)
    assert "".join(calls) == "aaabbbbbbaaa"
    assert [len(v.seconds) for v in variants] == [2, 2]
    assert variants[0].record()["median_s"] == variants[0].median


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("keep_memory", [False, True])
def test_peak_memory_is_that_of_the_run(keep_memory):
    mib = 2**20

    def run():
        a = torch.ones(64 * mib // 4)
        b = a + 1
        del a, b
        torch.ones(32 * mib // 4)

    variant = benchmark.Variant("v", run, keep_memory)
    benchmark.measure([variant], CPU, turns=1)
    assert variant.peak_bytes == pytest.approx(128 * mib, abs=40 * mib)


def test_models_have_the_same_weights():
    cfg = model_zoo.get_config("mask_rcnn_R50_gnws_2x")
    cfg.MODEL.DEVICE = "cpu"
    (x,) = benchmark.make_inputs(cfg, 96, 128, 1)
    models = benchmark.build_models(cfg, list(benchmark.MODELS), x["image"])
    image = (x["image"][None] - models["GN"].pixel_mean) / models["GN"].pixel_std
    with torch.no_grad():
        features = {name: m.eval().backbone(image)["p3"] for name, m in models.items()}
    expected = features["GN, Detectron2"]
    for name in ("GN+WS", "GN", "GN+WS, reference"):
        assert (features[name] - expected).norm() < 1e-3 * expected.norm()
    # Frozen BN with the statistics of this image: activations as large as those of the others.
    assert 0.1 < features["FrozenBN"].std() / expected.std() < 10
    kinds = {n: {type(m) for m in model.modules()} for n, model in models.items()}
    assert [n for n in kinds if WSConv2d in kinds[n]] == ["GN+WS", "GN+WS, reference"]


def test_inputs_have_objects_inside_the_image():
    cfg = model_zoo.get_config("quick_start")
    for x in benchmark.make_inputs(cfg, 80, 120, 2):
        boxes = x["instances"].gt_boxes
        assert x["image"].shape == (3, 80, 120)
        assert boxes.inside_box((80, 120)).all() and boxes.nonempty().all()
        assert x["instances"].gt_classes.max() < cfg.MODEL.ROI_HEADS.NUM_CLASSES
        assert x["instances"].gt_masks.nonempty().all()
