import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import cv2
import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_backbone

from gnws_d2 import model_zoo
from gnws_d2.config import load_config
from gnws_d2.data import register_coco_datasets
from gnws_d2.layers import GroupNorm, WSConv2d
from gnws_tools import benchmark, benchmark_gpu, benchmark_variants
from gnws_tools.benchmark import ALL_MODELS, MODELS, SCALE, argument_parser

TINY = ["MODEL.RPN.POST_NMS_TOPK_TEST", "10", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "10"]


def arguments(*words):
    args = argument_parser().parse_args(words)
    args.batch_size = args.batch_size or 1
    return args


@pytest.fixture
def replies(monkeypatch):
    """Processes that end at once, with what the test puts here; returns the variants started."""
    started, replies = [], []

    def run(command, **_):
        started.append(command[2])
        return replies.pop(0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return started, replies


def test_variants_take_turns_in_processes_of_their_own(replies):
    started, outputs = replies
    for seconds in (2.0, 4.0, 5.0, 3.0):
        result = {"seconds": {"train": [seconds]}, "memory_bytes": seconds * 2**30, "machine": {}}
        outputs.append(SimpleNamespace(returncode=0, stdout=json.dumps(result)))
    measured = benchmark.measure(["GN+WS", "GN"], arguments("train", "--turns", "2"))
    assert started == ["GN+WS", "GN", "GN", "GN+WS"]
    assert measured["GN+WS"]["seconds"] == {"train": [2.0, 3.0]}
    assert measured["GN"]["seconds"] == {"train": [4.0, 5.0]}
    lines = benchmark.format_table(measured).splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows == [
        ["train", "GN+WS", "2500", "2000 - 3000", "1.000x", "2.00", "1.000x"],
        ["train", "GN", "4500", "4000 - 5000", "1.800x", "4.00", "2.000x"],
    ]


@pytest.mark.parametrize(
    "returncode, status",
    [(2, 2), (-9, "benchmark.py: error: GN was killed (-9).")],
)
def test_failure_of_a_variant_ends_the_benchmark(replies, returncode, status):
    replies[1].append(SimpleNamespace(returncode=returncode, stdout=""))
    with pytest.raises(SystemExit) as e:
        benchmark.measure(["GN"], arguments("train"))
    assert e.value.code == status


@pytest.mark.parametrize(
    "words, message",
    [
        (["--turns", "0"], "--turns, --runs, --batch-size and --image-size must be at least 1"),
        (["--image-size", "800", "0"], "--image-size must be at least 1"),
        (["--models", "GN+WS", "BN"], "argument --models: invalid choice: 'BN'"),
        (["--output", "/dev/null/a"], "--output /dev/null/a cannot be written: Not a directory"),
    ],
)
def test_wrong_argument_is_named_before_anything_is_started(
    replies, monkeypatch, capsys, words, message
):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "inference", *words])
    with pytest.raises(SystemExit) as e:
        benchmark.main()
    assert e.value.code == 2 and message in capsys.readouterr().err


def run_script(*words, cwd):
    script = [sys.executable, str(ROOT / "tools" / "benchmark.py"), *words]
    return subprocess.run(script, cwd=cwd, capture_output=True, text=True)


def test_script_writes_a_table_and_all_times(tmp_path):
    words = ["inference", "--config-file", "quick_start", "--image-size", "64", "96"]
    words += ["--models", "GN+WS", "FrozenBN", "--turns", "1", "--runs", "2", "--opts", *TINY]
    done = run_script(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "output" / "benchmark" / "inference.md").read_text()
    assert text == done.stdout[:-1] and "| FrozenBN |" in text
    record = json.loads((tmp_path / "output" / "benchmark" / "inference.json").read_text())
    assert record["image_size"] == [64, 96] and record["opts"] == TINY
    assert list(record["variants"]) == ["GN+WS", "FrozenBN"]
    for measured in record["variants"].values():
        assert len(measured["seconds"]["inference"]) == 2
        assert 10 * 2**20 < measured["memory_bytes"] < 2**30
        assert measured["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.ci
def test_scale_measures_each_job_beside_detectron2_with_the_same_ap(tmp_path):
    done = run_script("scale", "--share", "0.0005", "--turns", "1", "--pycocotools", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "output" / "benchmark" / "scale.json").read_text())
    assert list(record["variants"]) == list(SCALE)
    for job, of_job in record["variants"].items():
        assert set(SCALE[job]) <= set(of_job) and f"| {job} " in done.stdout
        results = [measured["result"] for measured in of_job.values()]
        if job.endswith("AP"):
            assert len(results) == 3 and results[0][0] > 0.1
            assert results[1] == results[2] == pytest.approx(results[0], abs=1e-6)
        assert all(len(measured["seconds"][job]) == 1 for measured in of_job.values())


@pytest.mark.ci
def test_dry_run_of_the_gpu_benchmark_measures_everything_on_the_cpu(tmp_path):
    done = run_script("gpu", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "benchmark" / "gpu.md").read_text() == done.stdout[:-1]
    record = json.loads((tmp_path / "output" / "benchmark" / "gpu.json").read_text())
    operators, *precisions = record["variants"].values()
    assert list(record["variants"]) == ["operators", "float32", "float16"]
    names = {row["operator"] for row in operators["rows"]}
    assert names == {"GroupNorm + ReLU", "weight standardization"} and len(operators["rows"]) > 30
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
    for row in operators["rows"]:
        assert max(row["error"]) < tolerance[row["precision"]], row
        for times in (row["forward"], row["wall"], row["forward and backward"]):
            assert {"triton", "torch", "auto"} < set(times) and min(times.values()) > 0
    for result in precisions:
        assert list(result["parts"]) == ["inference, batch 1", "train, batch 2"]
        for of_part in result["parts"].values():
            assert list(of_part) == benchmark_gpu.MODELS
            assert all(min(measured["seconds"]) > 0 for measured in of_part.values())


def test_gpu_table_has_the_ratios_of_the_goals():
    row = {
        "operator": "GroupNorm + ReLU",
        "shape": [1, 64, 400, 672],
        "precision": "float16",
        "bytes": 60e6,
        "forward": {"triton": 0.05, "torch": 0.4, "channels-last": 0.5, "auto": 0.05},
        "forward and backward": {"triton": 0.2, "torch": 0.5, "auto": 0.25},
        "error": [1e-3, 2e-3],
    }
    part = "train, batch 2"

    def model(seconds, gpu_seconds, gib):
        memory = gib * 2**30
        return {"seconds": seconds, "gpu_seconds": gpu_seconds, "memory_bytes": memory}

    exact = {"GN+WS": model([0.3, 0.2, 0.4], 0.15, 4), "FrozenBN": model([0.25], 0.1, 2)}
    half = {"GN+WS": model([0.1], 0.05, 2), "FrozenBN": model([0.125], 0.1, 2)}
    text = benchmark.format_gpu(
        {
            "operators": {"rows": [row], "copy_bandwidth": 2e12, "choices": ""},
            "float32": {"parts": {part: exact}, "choices": ""},
            "float16": {"parts": {part: half}, "choices": "all"},
        }
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    # 60 MB in 50 us is 1.2 TB/s.
    assert [
        "GroupNorm + ReLU 1 x 64 x 400 x 672, float16", "50.0", "400.0", "8.00x", "10.00x", "60%",
        "2.50x", "2.00x", "2e-03",
    ] in rows  # fmt: skip
    assert [
        part, "GN+WS", "float32", "300.0", "200.0", "150.0", "0.800x", "1.500x", "1.000x", "1.000x",
        "4.00", "1.00x",
    ] in rows  # fmt: skip
    assert [
        part, "GN+WS", "float16", "100.0", "100.0", "50.0", "0.800x", "0.500x", "0.500x", "0.333x",
        "2.00", "0.50x",
    ] in rows  # fmt: skip
    assert "Copy bandwidth: 2.00 TB/s." in text and text.endswith("float16: all")


def test_gpu_benchmark_has_the_shapes_of_the_model():
    cfg = load_config("mask_rcnn_R50_gnws_2x", ["MODEL.DEVICE", "cpu"])
    backbone, shapes = build_backbone(cfg), set()
    for module in backbone.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 64, 96))
    of_heads = {(1000, 256, 7, 7), (100, 256, 14, 14)}
    assert shapes | of_heads == set(benchmark_gpu.model_shapes(1, 60, 90))


@pytest.mark.parametrize(
    "words, message",
    [
        (["ops", "--config-file", "gone.yaml"], "--config-file gone.yaml: "),
        (
            ["dataloader", "--opts", "DATASETS.TRAIN", "('mine',)"],
            "DATASETS.TRAIN names mine, which is not registered",
        ),
    ],
)
def test_mistake_in_the_config_is_told_once(tmp_path, words, message):
    done = run_script(*words, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"benchmark.py: error: {message}")


def test_precision_that_the_cpu_emulates_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("gnws_d2.engine.checks._cpu_has_bfloat16", lambda: False)
    args = arguments("train", "--config-file", "quick_start")
    argv = ["benchmark_variants.py", "GN+WS, AMP", json.dumps(vars(args))]
    monkeypatch.setattr(sys, "argv", argv)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(sys, "stdout", sys.stdout)  # to be restored
        benchmark_variants.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert "benchmark.py: error: SOLVER.AMP.PRECISION bfloat16 is not for this CPU" in line


@pytest.mark.parametrize("variant", ["GN+WS, AMP", "GN", "GN+WS, reference", "FrozenBN, AMP"])
def test_memory_is_kept_where_entry_points_keep_it(monkeypatch, capsys, variant):
    kept = []
    monkeypatch.setattr(benchmark_variants, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(benchmark_variants, "check_precision", lambda *_: None)
    monkeypatch.setattr(benchmark_variants, "prepare_model", lambda *_: {"train": lambda: None})
    args = arguments("train", "--config-file", "quick_start", "--runs", "3")
    monkeypatch.setattr(sys, "argv", ["benchmark_variants.py", variant, json.dumps(vars(args))])
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", sys.stdout)  # to be restored
        benchmark_variants.main()
    assert len(json.loads(capsys.readouterr().out)["seconds"]["train"]) == 3
    assert kept == [True] * (variant in ("GN+WS, AMP", "GN"))


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


@pytest.mark.parametrize("variant", ALL_MODELS)
def test_training_step_computes_gradients_and_keeps_the_weights(variant, monkeypatch):
    cfg = load_config("quick_start", TINY)
    models = []
    build = benchmark_variants.build_variant
    monkeypatch.setattr(
        benchmark_variants, "build_variant", lambda *args: models.append(build(*args)) or models[0]
    )
    args = arguments("train", "--image-size", "64", "64")
    (step,) = benchmark_variants.prepare_model(cfg, variant, args).values()
    before = {name: p.clone() for name, p in models[0].named_parameters()}
    gradients = []
    models[0].backbone.fpn_output2.weight.register_hook(gradients.append)
    step()
    assert len(gradients) == 1 and 0 < gradients[0].abs().max() < torch.inf
    assert all(torch.equal(p, before[name]) for name, p in models[0].named_parameters())


@pytest.mark.parametrize("variant", benchmark.OTHERS["ops"])
def test_operations_run_at_all_shapes(variant):
    args = arguments("ops", "--image-size", "64", "64")
    parts = benchmark_variants.prepare_ops(load_config("quick_start", []), variant, args)
    assert "weight standardization" in parts and len(parts) == 7
    for run in parts.values():
        run()


@pytest.mark.parametrize("variant", benchmark.OTHERS["dataloader"])
def test_mappers_map_every_image(variant, photographs, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(cv2, "setNumThreads", lambda n: None)
    register_coco_datasets([["fruits_nuts", str(photographs.json_file), str(photographs.images)]])
    mapped = []
    mapper_class = getattr(benchmark_variants, variant)
    monkeypatch.setattr(mapper_class, "__call__", lambda self, record: mapped.append(record))
    cfg = load_config("quick_start", ["DATASETS.TRAIN", "('fruits_nuts',)"])
    parts = benchmark_variants.prepare_mapper(cfg, variant, argparse.Namespace())
    assert list(parts) == ["18 images, training", "18 images, test"]
    for run in parts.values():
        run()
    assert len(mapped) == 36


def test_inputs_have_objects_inside_the_image():
    cfg = model_zoo.get_config("quick_start")
    for x in benchmark_variants.make_inputs(cfg, [80, 120], 2):
        boxes = x["instances"].gt_boxes
        assert x["image"].shape == (3, 80, 120)
        assert boxes.inside_box((80, 120)).all() and boxes.nonempty().all()
        assert x["instances"].gt_classes.max() < cfg.MODEL.ROI_HEADS.NUM_CLASSES
        assert x["instances"].gt_masks.nonempty().all()
