"""What a process of ``tools/benchmark.py scale`` measures: one job on data of COCO's size."""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gnws_tools  # noqa: F401  (before Detectron2, whose warnings it filters)

# isort: split
import cv2
import numpy as np
import orjson
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation.coco_evaluation import COCOeval_opt, _evaluate_predictions_on_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gnws_d2.config import load_config
from gnws_d2.data import check_coco_json, register_coco_datasets
from gnws_d2.data.dataset_mapper import OpenCVDatasetMapper
from gnws_d2.data.train_loader import build_train_loader
from gnws_d2.engine.run_record import describe_machine
from gnws_d2.evaluation import evaluate_results, read_truth
from gnws_d2.utils.process import release_freed_memory

# Images and objects of train2017 and val2017, and 100 detections in each image of the latter.
TRAIN, VAL, NUM_DETECTIONS = (118_287, 860_001), (5_000, 36_781), 100
_NUM_CLASSES, _NUM_POINTS, _NUM_FILES = 80, 20, 100
_BATCHES = 8  # of two images, of the training loader


def make_data(root: Path, share: float) -> None:
    """Write ``train.json``, ``val.json``, ``results.json`` and ``images`` of a share of COCO."""
    if (root / "share.json").is_file() and json.loads((root / "share.json").read_text()) == share:
        return
    shutil.rmtree(root, ignore_errors=True)
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(_NUM_FILES):
        noise = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f"{i}.jpg"), cv2.resize(noise, (640, 480)))
    for name, sizes in (("train", TRAIN), ("val", VAL)):
        num_images, num_objects = (max(2, round(share * n)) for n in sizes)
        coco = _make_coco(rng, num_images, num_objects)
        (root / f"{name}.json").write_bytes(orjson.dumps(coco))
        for image in coco["images"]:
            path = root / "images" / image["file_name"]
            if not path.exists():
                os.link(root / f"{image['id'] % _NUM_FILES}.jpg", path)
    (root / "results.json").write_bytes(orjson.dumps(_make_results(rng, coco)))
    (root / "share.json").write_text(json.dumps(share))


def _make_coco(rng: np.random.Generator, num_images: int, num_objects: int) -> dict[str, Any]:
    images = [
        {"id": i, "file_name": f"{i:012}.jpg", "width": 640, "height": 480}
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, _NUM_CLASSES + 1)]
    image_ids = np.sort(rng.integers(1, num_images + 1, num_objects)).tolist()
    classes = rng.integers(1, _NUM_CLASSES + 1, num_objects).tolist()
    corners = _polygons(rng, num_objects)
    low, size = corners.min(axis=1), np.ptp(corners, axis=1)
    boxes = np.concatenate([low, size], axis=1).round(2).tolist()
    outlines = corners.reshape(num_objects, -1).tolist()
    annotations = [
        {
            "id": i + 1, "image_id": image_ids[i], "category_id": classes[i], "bbox": boxes[i],
            "area": boxes[i][2] * boxes[i][3] * 0.7, "iscrowd": 0, "segmentation": [outlines[i]],
        }
        for i in range(num_objects)
    ]  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": categories}


def _polygons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return (n, points, 2) coordinates of ellipses with rough edges, of sizes like COCO's."""
    radii = np.exp(rng.uniform(np.log(4), np.log(110), (n, 1, 2)))
    centers = rng.uniform(0, 1, (n, 1, 2)) * (np.array([640, 480]) - 2 * radii) + radii
    angles = np.linspace(0, 2 * np.pi, _NUM_POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return (centers + radii * circle * rng.uniform(0.8, 1, (n, _NUM_POINTS, 1))).round(2)


def _make_results(rng: np.random.Generator, coco: dict[str, Any]) -> list[dict[str, Any]]:
    """Return detections near the objects of an image, three in ten of them of another class."""
    of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    results = []
    for image_id, objects in of_image.items():
        polygons = _polygons(rng, NUM_DETECTIONS)
        classes = rng.integers(1, _NUM_CLASSES + 1, NUM_DETECTIONS)
        for i in range(min(NUM_DETECTIONS, 3 * len(objects))):
            near = np.array(objects[i % len(objects)]["segmentation"]).reshape(-1, 2)
            polygons[i] = (near + rng.normal(0, 3, 2)).clip(0, [640, 480])
            if rng.random() < 0.7:
                classes[i] = objects[i % len(objects)]["category_id"]
        masks = mask_util.frPyObjects(polygons.reshape(NUM_DETECTIONS, -1).tolist(), 480, 640)
        boxes = np.concatenate([polygons.min(axis=1), np.ptp(polygons, axis=1)], axis=1)
        results += [
            {
                "image_id": image_id, "category_id": int(classes[i]), "bbox": boxes[i].tolist(),
                "score": float(rng.random()),
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
            }
            for i, mask in enumerate(masks)
        ]  # fmt: skip
    return results


def prepare(job: str, who: str, root: Path) -> Callable[[], Any]:
    """Return what is timed."""
    train, val = (str(root / name) for name in ("train.json", "val.json"))
    images, ours = str(root / "images"), who == "gnws_d2"
    if job.endswith("AP"):
        task = "bbox" if job == "box AP" else "segm"
        results = orjson.loads((root / "results.json").read_bytes())
        if ours:
            return lambda: evaluate_results(read_truth(val), results, task).stats.tolist()
        coco_eval = COCOeval if who == "pycocotools" else COCOeval_opt
        return lambda: _evaluate_predictions_on_coco(
            COCO(val), results, task, cocoeval_fn=coco_eval
        ).stats.tolist()
    if job == "load" and not ours:
        return lambda: load_coco_json(train, images, "scale_train")
    names = [["scale_train", train, images], ["scale_val", val, images]]
    if job in ("load", "check", "report"):
        register_coco_datasets(names)

    def check(keep: bool) -> None:
        check_coco_json(train, images, masks=True, keep=keep)
        release_freed_memory()

    if job == "check":
        return lambda: check(keep=False)
    if job == "load":
        return lambda: (check(keep=True), DatasetCatalog.get("scale_train"))  # type: ignore
    keys = ["DATASETS.TRAIN", "('scale_train',)", "DATASETS.TEST", "('scale_val',)"]
    keys += ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(root / "run")]
    cfg = load_config("mask_rcnn_R50_gnws_2x", keys, names)
    if job == "report":
        from gnws_d2.report import make_report

        (root / "run" / "inference").mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "results.json", root / "run/inference/coco_instances_results.json")
        (root / "run" / "config.yaml").write_text(cfg.dump())
        return lambda: make_report(str(root / "run"), [])
    if job == "first iteration":
        command = [sys.executable, str(Path(__file__).parent / "train_net.py")]
        command += ["--dataset", *names[0], "--config-file", "quick_start", *keys]
        command += ["SOLVER.MAX_ITER", "1", "MODEL.WEIGHTS", ""]
        command += ["TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()", "SOLVER.STEPS", "()"]
        command += ["MODEL.ROI_HEADS.NUM_CLASSES", str(_NUM_CLASSES)]
        return lambda: subprocess.run(command, check=True, stdout=sys.stderr)
    # Of a small part: reading the whole is another row.
    cfg.merge_from_list(["DATASETS.TRAIN", "('scale_val',)", "SOLVER.IMS_PER_BATCH", "2"])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", job[7:8]])
    if ours:
        register_coco_datasets(names)
        loader: Any = build_train_loader(cfg, OpenCVDatasetMapper(cfg, True))
    else:
        register_coco_instances("scale_val", {}, val, images)
        loader = build_detection_train_loader(cfg)
    batches = iter(loader)
    next(batches)
    return lambda: [next(batches) for _ in range(_BATCHES)]


def _memory(field: str) -> int:
    """Return a line of ``/proc/self/status``, or the peak, in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure a job, and write its seconds, memory, result and the machine as JSON."""
    who, args = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
    results, sys.stdout = sys.stdout, sys.stderr  # for what others print
    root = Path(args.output).absolute() / "scale"
    if who == "make":
        make_data(root, args.share)
        print(json.dumps({"seconds": {}, "memory_bytes": 0, "machine": {}}), file=results)
        return
    run = prepare(args.job, who, root)
    before = _memory("VmRSS")
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = run()
    seconds = time.perf_counter() - start
    if args.job.startswith("image,"):
        seconds /= 2 * _BATCHES
    memory = _memory("VmRSS" if args.job == "check" else "VmHWM") - before
    record = {"seconds": {args.job: [seconds]}, "memory_bytes": memory}
    record |= {"machine": describe_machine(), "result": result if "AP" in args.job else None}
    print(json.dumps(record), file=results)


if __name__ == "__main__":
    main()
