import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_backbone

from gnws_d2 import model_zoo
from gnws_d2.config import load_config
from gnws_d2.layers import GroupNorm, WSConv2d
from gnws_tools import benchmark, benchmark_variants
from gnws_tools.benchmark import ALL_MODELS, MODELS, argument_parser

TINY = ["MODEL.RPN.POST_NMS_TOPK_TEST", "10", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "10"]


def arguments(*words):
    args = argument_parser().parse_args(words)
    args.batch_size = args.batch_size or 1
    return args


@pytest.fixture
def replies(monkeypatch):
    """Processes that end at once and print what the test says; the variants that were started."""
    started, replies = [], []

    def run(command, **_):
        started.append(command[2])
        return replies.pop(0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return started, replies


def test_each_variant_runs_in_its_own_process_in_turns(replies):
    started, outputs = replies
    for seconds in (2.0, 4.0, 5.0, 3.0):
        memory = {"train": [seconds * 2**30]}
        result = {"seconds": {"train": [seconds]}, "memory_bytes": memory, "machine": {}}
        outputs.append(SimpleNamespace(returncode=0, stdout=json.dumps(result)))
    measured = benchmark.measure(["GN+WS", "GN"], arguments("train", "--turns", "2"))
    assert started == ["GN+WS", "GN", "GN", "GN+WS"]
    assert measured["GN+WS"]["seconds"] == {"train": [2.0, 3.0]}
    assert measured["GN"]["seconds"] == {"train": [4.0, 5.0]}
    assert table(benchmark.format_table(measured)) == [
        ["", "GN+WS", "GN"],
        ["train, ms", "2500 (2000 - 3000) 1.000x", "4500 (4000 - 5000) 1.800x"],
        ["train, GiB", "2.5 (2 - 3) 1.000x", "4.5 (4 - 5) 1.800x"],
    ]
    del measured["GN"]["seconds"]["train"]  # as operators, which GN does not have
    assert table(benchmark.format_table(measured))[1][2] == ""


def table(text):
    rows = [line for line in text.splitlines() if "---" not in line]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_killed_variant_ends_the_benchmark(replies):
    replies[1].append(SimpleNamespace(returncode=-9, stdout=""))
    with pytest.raises(SystemExit, match=r"GN was killed \(-9\)"):
        benchmark.measure(["GN"], arguments("train"))


def run_script(*words, cwd):
    script = [sys.executable, str(ROOT / "tools" / "benchmark.py"), *words]
    return subprocess.run(script, cwd=cwd, capture_output=True, text=True)


def test_script_prints_a_table_and_writes_all_times(tmp_path):
    words = ["inference", "--config-file", "quick_start", "--image-size", "64", "96"]
    words += ["--models", "GN+WS", "FrozenBN", "--turns", "1", "--runs", "2", "--opts", *TINY]
    done = run_script(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| inference, ms " in done.stdout and " FrozenBN " in done.stdout
    record = json.loads((tmp_path / "output" / "benchmark" / "inference.json").read_text())
    assert record["image_size"] == [64, 96] and record["opts"] == TINY
    assert list(record["variants"]) == ["GN+WS", "FrozenBN"]
    for measured in record["variants"].values():
        assert len(measured["seconds"]["inference"]) == 2
        (memory,) = measured["memory_bytes"]["inference"]
        assert 10 * 2**20 < memory < 2**30
        assert measured["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_gpu_benchmark_measures_operators_and_models(monkeypatch):
    monkeypatch.setattr(benchmark_variants, "model_shapes", lambda n, *_: [(n, 64, 8, 8)])
    cfg, args = load_config("quick_start", TINY), arguments("gpu", "--image-size", "64", "64")
    parts = benchmark_variants.prepare_gpu(cfg, "GN+WS, triton", args)
    operator = "GroupNorm + ReLU, 2 x 64 x 8 x 8, float32"
    assert {operator, f"{operator}, forward", "train, batch 8, AMP"} < set(parts)
    for name in (operator, "inference, batch 1", "train, batch 2, AMP"):
        parts[name].prepare()()
    assert set(benchmark_variants.prepare_gpu(cfg, "FrozenBN", args)) < set(parts)


def test_gpu_benchmark_has_the_shapes_of_the_model():
    cfg = load_config("mask_rcnn_R50_gnws_2x", ["MODEL.DEVICE", "cpu"])
    backbone, shapes = build_backbone(cfg), set()
    for module in backbone.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 64, 96))
    of_heads = {(1000, 256, 7, 7), (100, 256, 14, 14)}
    assert shapes | of_heads == set(benchmark_variants.model_shapes(1, 60, 90))


@pytest.mark.parametrize("train", [True, False])
def test_models_give_the_same_outputs(train):
    cfg = model_zoo.get_config("mask_rcnn_R50_gnws_2x")
    cfg.MODEL.DEVICE = "cpu"
    inputs = benchmark_variants.make_inputs(cfg, [96, 128], 1)
    models = {name: benchmark_variants.build_variant(cfg, name, train, inputs) for name in MODELS}
    assert all(model.training == train for model in models.values())
    image = (inputs[0]["image"][None] - models["GN"].pixel_mean) / models["GN"].pixel_std
    with torch.no_grad():
        features = {name: m.backbone(image)["p3"] for name, m in models.items()}
    expected = features["GN, Detectron2"]
    for name in ("GN+WS", "GN", "GN+WS, reference"):
        assert (features[name] - expected).norm() < 1e-3 * expected.norm()
    # Frozen BN with the statistics of this image: activations as large as those of the others.
    assert 0.1 < features["FrozenBN"].std() / expected.std() < 10
    kinds = {n: {type(m) for m in model.modules()} for n, model in models.items()}
    standardized = [n for n in kinds if WSConv2d in kinds[n]]
    assert standardized == ["GN+WS"] * train + ["GN+WS, reference"]


def test_variant_forces_the_kernels_of_all_layers():
    cfg = load_config("quick_start", [])
    inputs = benchmark_variants.make_inputs(cfg, [64, 64], 1)
    model = benchmark_variants.build_variant(cfg, "GN+WS, triton", True, inputs)
    layers = [m for m in model.modules() if isinstance(m, (WSConv2d, GroupNorm))]
    assert len(layers) > 50 and {m.kernels for m in layers} == {"triton"}


@pytest.mark.parametrize("variant", ALL_MODELS)
def test_training_step_computes_gradients_and_keeps_the_weights(variant, monkeypatch):
    cfg = load_config("quick_start", TINY)
    models = []
    build = benchmark_variants.build_variant
    monkeypatch.setattr(
        benchmark_variants, "build_variant", lambda *args: models.append(build(*args)) or models[0]
    )
    step = benchmark_variants.prepare_model(cfg, variant, True, [64, 64], 1)
    before = {name: p.clone() for name, p in models[0].named_parameters()}
    gradients = []
    models[0].backbone.fpn_output2.weight.register_hook(gradients.append)
    step()
    assert len(gradients) == 1 and 0 < gradients[0].abs().max() < torch.inf
    assert all(torch.equal(p, before[name]) for name, p in models[0].named_parameters())


def test_operators_of_all_kernels_are_the_same_function():
    w, x, bias = torch.randn(8, 4, 3, 3), torch.randn(2, 64, 5, 5), torch.randn(64)
    for kernels in ("auto", "triton", "torch"):
        for f, tensors in (
            (lambda k, *t: benchmark_variants.standardize(torch.float16, k, *t), (w,)),
            (benchmark_variants.normalize, (x, torch.ones(64), bias)),
        ):
            expected = f("reference", *tensors)
            torch.testing.assert_close(f(kernels, *tensors), expected)


def test_mappers_map_every_image_of_the_dataset(photographs, tmp_path):
    data = ["--dataset", "fruits_nuts", photographs.json_file, photographs.images]
    words = ["dataloader", "--config-file", "quick_start", "--turns", "1", *map(str, data)]
    done = run_script(*words, "--opts", "DATASETS.TRAIN", "('fruits_nuts',)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("18 images, training", "18 images, test"):
        assert f"| {part}, ms " in done.stdout
