import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_backbone

from gnws_d2 import model_zoo
from gnws_d2.config import load_config
from gnws_d2.layers import GroupNorm, WSConv2d
from gnws_tools import benchmark
from gnws_tools.benchmark import MODELS

benchmark_ops = sys.modules[benchmark.prepare_ops.__module__]

TINY = ["MODEL.RPN.POST_NMS_TOPK_TEST", "10", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "10"]


def test_table_has_medians_ranges_and_ratios_to_the_first_variant():
    first = {"seconds": {"train": [2.0, 3.0]}, "memory_bytes": {"train": [2 * 2**30, 3 * 2**30]}}
    other = {"seconds": {"train": [4.0, 5.0]}, "memory_bytes": {}}
    text = benchmark.format_table({"GN+WS": first, "GN": other})
    rows = [line for line in text.splitlines() if "---" not in line]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        ["", "GN+WS", "GN"],
        ["train, ms", "2500 (2000 - 3000) 1.000x", "4500 (4000 - 5000) 1.800x"],
        ["train, GiB", "2.5 (2 - 3) 1.000x", ""],
    ]


def run_script(*words, cwd):
    script = [sys.executable, str(ROOT / "tools" / "benchmark.py"), *map(str, words)]
    done = subprocess.run(script, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.ci
def test_script_prints_a_table_and_writes_the_times_of_all_turns(tmp_path):
    words = ["inference", "--config-file", "quick_start", "--image-size", "64", "96"]
    words += ["--models", "GN+WS", "FrozenBN", "--turns", "2", "--runs", "2", "--opts", *TINY]
    status, stdout, stderr = run_script(*words, cwd=tmp_path)
    assert status == 0, stderr
    assert "| inference, batch 1, ms " in stdout and " FrozenBN " in stdout
    record = json.loads((tmp_path / "output" / "benchmark" / "inference.json").read_text())
    assert record["image_size"] == [64, 96] and record["opts"] == TINY
    assert list(record["variants"]) == ["GN+WS", "FrozenBN"]
    for measured in record["variants"].values():
        assert len(measured["seconds"]["inference, batch 1"]) == 4
        for memory in measured["memory_bytes"]["inference, batch 1"]:
            assert 10 * 2**20 < memory < 2**30
        assert measured["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.ci
def test_mappers_map_every_image_of_the_dataset(photographs, tmp_path):
    words = ["dataloader", "--config-file", "quick_start", "--turns", "1"]
    words += ["--dataset", "fruits_nuts", photographs.json_file, photographs.images, "--opts"]
    status, stdout, stderr = run_script(*words, "DATASETS.TRAIN", "('fruits_nuts',)", cwd=tmp_path)
    assert status == 0, stderr
    assert "| 18 images, training, ms " in stdout and "| 18 images, test, ms " in stdout


def test_mistake_ends_with_its_sentence(tmp_path):
    status, _, stderr = run_script("train", "--opts", "SOLVER.MAXITER", "3", cwd=tmp_path)
    assert status == 2
    assert stderr.splitlines()[-1].startswith("benchmark.py: error: Command line: there is no key")


def test_gpu_benchmark_measures_operators_and_models(monkeypatch):
    monkeypatch.setattr(benchmark_ops, "model_shapes", lambda n, *_: [(n, 64, 8, 8)])
    cfg = load_config("quick_start", TINY)
    args = benchmark.argument_parser().parse_args(["gpu", "--image-size", "64", "64"])
    parts = benchmark.prepare_models(cfg, "GN+WS, torch", args)
    operator = "GroupNorm + ReLU, 2 x 64 x 8 x 8, float32"
    assert {operator, f"{operator}, forward", "train, batch 8, AMP"} < set(parts)
    for name in (operator, "inference, batch 1", "train, batch 2, AMP"):
        parts[name]()()
    assert set(benchmark.prepare_models(cfg, "FrozenBN", args)) < set(parts)


def test_gpu_benchmark_has_the_shapes_of_the_model():
    cfg = load_config("mask_rcnn_R50_gnws_2x", ["MODEL.DEVICE", "cpu"])
    backbone, shapes = build_backbone(cfg), set()
    for module in backbone.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 64, 96))
    of_heads = {(1000, 256, 7, 7), (100, 256, 14, 14)}
    assert shapes | of_heads == set(benchmark_ops.model_shapes(1, 60, 90))


@pytest.mark.parametrize("train", [True, False])
def test_models_give_comparable_outputs(train):
    cfg = model_zoo.get_config("mask_rcnn_R50_gnws_2x")
    cfg.MODEL.DEVICE = "cpu"
    inputs = benchmark.make_inputs(cfg, [96, 128], 1)
    models = {name: benchmark.build_variant(cfg, name, train, inputs) for name in MODELS}
    assert all(model.training == train for model in models.values())
    image = (inputs[0]["image"][None] - models["GN"].pixel_mean) / models["GN"].pixel_std
    with torch.no_grad():
        features = {name: m.backbone(image)["p3"] for name, m in models.items()}
    expected = features["GN"]
    assert (features["GN+WS"] - expected).norm() < 1e-3 * expected.norm()
    # Frozen BN with the statistics of this image: activations as large as those of the others.
    assert 0.1 < features["FrozenBN"].std() / expected.std() < 10
    has_ws = {n: any(isinstance(c, WSConv2d) for c in m.modules()) for n, m in models.items()}
    assert has_ws == {"GN+WS": train, "GN": False, "FrozenBN": False}


def test_variant_forces_the_kernels_of_all_layers():
    cfg = load_config("quick_start", [])
    inputs = benchmark.make_inputs(cfg, [64, 64], 1)
    model = benchmark.build_variant(cfg, "GN+WS, torch", True, inputs)
    layers = [m for m in model.modules() if isinstance(m, (WSConv2d, GroupNorm))]
    assert len(layers) > 50 and {m.kernels for m in layers} == {"torch"}


@pytest.mark.parametrize("variant", MODELS)
def test_training_step_computes_gradients_and_keeps_the_weights(variant, monkeypatch):
    cfg, models = load_config("quick_start", TINY), []
    build = benchmark.build_variant
    monkeypatch.setattr(
        benchmark, "build_variant", lambda *args: models.append(build(*args)) or models[0]
    )
    step = benchmark.prepare_model(cfg, variant, True, [64, 64], 1, amp=False)
    before = {name: p.clone() for name, p in models[0].named_parameters()}
    gradients = []
    models[0].backbone.fpn_output2.weight.register_hook(gradients.append)
    step()
    assert len(gradients) == 1 and 0 < gradients[0].abs().max() < torch.inf
    assert all(torch.equal(p, before[name]) for name, p in models[0].named_parameters())
