"""Write an HTML page about a run."""

import base64
import contextlib
import hashlib
import io
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ..checkpoint.files import DEFAULT_THRESHOLD
from ..data import check_datasets, read_image, register_coco_datasets
from ..evaluation import (
    TASKS,
    best_thresholds,
    evaluate_results,
    max_dets,
    read_results,
    read_truth,
    results_json,
)
from ..prediction.drawing import draw_objects
from ..utils.errors import UserError
from ..utils.files import atomic_write
from .analysis import METRICS, Analysis, analyze, confusion_matrix, find_mistakes
from .charts import line_chart
from .run_dir import Run, read_run

_NUM_PICTURES = 5  # of the typical images, and of the worst
_CORRECT, _MISTAKE = "#3b9dff", "#ff8a1f"  # distinct for the color-blind


def make_report(run_dir: str, datasets: list[list[str]]) -> None:
    """
    Write ``report.html`` into the directory of a run, and print AP.

    Args:
        run_dir, datasets: see :func:`read_run`.

    Raises:
        UserError: if the run or a dataset does not exist, cannot be read or does not fit.
    """
    run = read_run(run_dir, datasets)
    register_coco_datasets(run.cfg.DATASETS.COCO)
    names = run.cfg.DATASETS.TEST if run.is_evaluated else ()
    names = [name for name in names if os.path.isfile(results_json(run_dir, run.cfg, name))]
    if names:
        check_datasets(run.cfg, ("TEST",))
    with contextlib.redirect_stdout(io.StringIO()):  # hotcoco prints
        evaluations = [_evaluate(run, name) for name in names]
    source = (Path(__file__).parent / "report.html").read_text("utf-8")
    page = jinja2.Template(source, autoescape=True, trim_blocks=True).render(
        title=os.path.basename(os.path.abspath(run_dir)),
        facts=_facts(run),
        run=run,
        charts=_training_charts(run),
        evaluations=evaluations,
        metrics=METRICS,
        correct=_CORRECT,
        mistake=_MISTAKE,
        percent=_format,
    )
    output = os.path.join(run_dir, "report.html")
    with atomic_write(output, "wb") as f:
        f.write(page.encode())
    for evaluation in evaluations:
        rows = [[name, *map(_format, a.ap.values())] for name, a in evaluation["analyses"].items()]
        head = [f"{run_dir} on {evaluation['name']} (%)", *METRICS]
        print(tabulate(rows, head, "github", disable_numparse=True) + "\n")
    if not evaluations:
        print(f"{run_dir} has no predictions on {_join(run.cfg.DATASETS.TEST)} yet.\n")
    print(output)


def _evaluate(run: Run, dataset_name: str) -> dict[str, Any]:
    """Evaluate the last predictions on a dataset. Return the variables of its part of the page."""
    path = results_json(run.path, run.cfg, dataset_name)
    results = read_results(path)
    files = [record["file_name"] for record in DatasetCatalog.get(dataset_name)]
    truth = read_truth(MetadataCatalog.get(dataset_name).json_file)
    evaluations, analyses, precision = {}, {}, {}
    limit = max_dets(run.cfg, dataset_name)
    for task in TASKS if run.cfg.MODEL.MASK_ON else ("bbox",):
        name = TASKS[task]
        logging.getLogger(__name__).info(f"Computing {name} AP on {dataset_name} ...")
        try:
            evaluations[task] = evaluate_results(truth, results, task, max_dets=limit)
        except ValueError as e:
            raise UserError(
                f"{path} does not fit the dataset {dataset_name}: was another one evaluated? ({e})"
            ) from e
        analyses[name] = analyze(evaluations[task])
        precision[f"Precision and recall, {name}"] = _precision_chart(analyses[name])
    evaluation = evaluate_results(truth, results, "bbox", iou_threshold=0.5)
    best, thresholds = best_thresholds(evaluation)
    threshold = best.threshold if best else DEFAULT_THRESHOLD
    # COCO matches in the order of the score, so that leaving the lowest out changes no other match.
    counted = [result for result in results if result["score"] >= threshold]
    evaluation = evaluate_results(truth, counted, "bbox", iou_threshold=0.5)
    mistakes = find_mistakes(evaluation)
    num_missed, num_false = (sum(len(m[i]) for m in mistakes.values()) for i in (0, 1))
    num_objects = sum(not a.get("iscrowd") for a in truth.loadAnns(truth.getAnnIds()))
    worst = sorted(mistakes, key=lambda image_id: -sum(map(len, mistakes[image_id])))
    shown = [image_id for image_id in worst[:_NUM_PICTURES] if any(mistakes[image_id])]
    first = max(0, (len(worst) - _NUM_PICTURES) // 2)
    typical = [id for id in worst[first : first + _NUM_PICTURES] if id not in shown]

    def draw(image_id: Any) -> dict[str, str]:
        return _draw(evaluation, dataset_name, image_id, *mistakes[image_id], "mask" in analyses)

    return {
        "name": dataset_name,
        "num_images": len(mistakes),
        "max_dets": limit,
        "num_objects": num_objects,
        "num_found": num_objects - num_missed,
        "num_false": num_false,
        "num_trained_on": _count_trained_on(run, files) if run.num_iterations else None,
        "analyses": analyses,
        "precision": precision,
        "threshold": threshold,
        "thresholds": {"all classes": best, **thresholds},
        "confusion": confusion_matrix(evaluations["bbox"], threshold),
        "typical": list(map(draw, typical)),
        "worst": list(map(draw, shown)),
    }


def _precision_chart(analysis: Analysis) -> str:
    recall = np.linspace(0, 1, analysis.precision.shape[1])
    curves = {
        f"IoU {iou:.2f}": (recall, analysis.precision[i])
        for i, iou in ((0, 0.5), (5, 0.75), (8, 0.9))
    }
    return line_chart(curves, "recall", "precision", 1.02)


def _count_trained_on(run: Run, files: list[str]) -> int | None:
    """Count the image files that are also in ``DATASETS.TRAIN``, by content; None if unknown."""
    trained: list[str] = []
    for name in run.cfg.DATASETS.TRAIN:
        with contextlib.suppress(Exception):  # not registered, or its annotations are gone
            trained += [record["file_name"] for record in DatasetCatalog.get(name)]
    files, trained = (list(filter(os.path.isfile, paths)) for paths in (files, trained))
    if not trained:
        return None
    sizes = set(map(os.path.getsize, files))  # others need not be read
    digests = {_digest(file) for file in trained if os.path.getsize(file) in sizes}
    return sum(_digest(file) in digests for file in files)


def _digest(file: str) -> bytes:
    return hashlib.sha256(Path(file).read_bytes()).digest()


def _facts(run: Run) -> dict[str, str]:
    cfg = run.cfg
    facts = {
        "Weights": cfg.MODEL.WEIGHTS or "none: trained from scratch",
        "Trained on": _join(cfg.DATASETS.TRAIN),
        "Tested on": _join(cfg.DATASETS.TEST),
    }
    if run.num_iterations:
        facts["Iterations"] = f"{run.num_iterations:,} of {cfg.SOLVER.MAX_ITER:,}"
    times = [line["time"] for line in run.metrics if "time" in line]
    if times:
        facts["Speed"] = f"{np.median(times):.3g} s per iteration"
    return facts | run.facts | {"Directory": os.path.abspath(run.path)}


def _training_charts(run: Run) -> dict[str, str]:
    curves = {}
    for key in sorted({key for line in run.metrics for key in line}):
        lines = [line for line in run.metrics if key in line]
        if len(lines) > 1:
            curves[key] = [line["iteration"] for line in lines], [line[key] for line in lines]
    charts = {}
    for title, pattern, y_label in (
        ("Loss", "^(total_)?loss", "loss"),
        ("Validation loss", "^validation/.*loss", "loss"),
        ("Learning rate", "^lr$", "learning rate"),
        ("AP over time", "/AP$", "AP (%)"),
    ):
        if of_chart := {key: curves[key] for key in curves if re.search(pattern, key)}:
            charts[title] = line_chart(of_chart, "iteration", y_label)
    return charts


def _draw(
    evaluation: Any, dataset: str, image_id: Any, missed: set[Any], false: set[int], masks: bool
) -> dict[str, str]:
    """Draw the ground truth and the detections of an image."""
    truth, detections = (
        coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        for coco in (evaluation.cocoGt, evaluation.cocoDt)
    )
    truth = [a for a in truth if not a.get("iscrowd")]
    (image_info,) = evaluation.cocoGt.loadImgs([image_id])
    file_name = image_info["file_name"]
    root = MetadataCatalog.get(dataset).image_root
    image = read_image(os.path.join(root, file_name), "RGB")

    def draw(objects: list[dict[str, Any]], wrong: set[Any]) -> str:
        names = [c["name"] for o in objects for c in evaluation.cocoGt.loadCats(o["category_id"])]
        labels = [f"{n} {o['score']:.0%}" if "score" in o else n for n, o in zip(names, objects)]
        colors = [_MISTAKE if o["id"] in wrong else _CORRECT for o in objects]
        picture = draw_objects(image, objects, labels, colors, masks)
        _, jpeg = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode()}"

    return {
        "truth": draw(truth, missed),
        "detections": draw(detections, false),
        "caption": f"{file_name} (image {image_id}): {len(missed)} of {len(truth)} missed, "
        f"{len(false)} false",
    }


def _format(ap: float) -> str:
    return f"{ap:.1f}" if math.isfinite(ap) else "\N{EN DASH}"


def _join(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "no dataset"
