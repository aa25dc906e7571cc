"""What the predictions of a run get right and wrong, beyond one number of AP."""

import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import tidecv
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# TIDE's short names and what they mean, in its order.
ERRORS = {
    "Cls": "class",
    "Loc": "location",
    "Both": "class and location",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}
SPECIAL_ERRORS = {"FalsePos": "all false positives", "FalseNeg": "all false negatives"}


@dataclass
class TaskAnalysis:
    """One of "bbox" and "segm" on a dataset. AP in percent, NaN where there is no ground truth."""

    ap: dict[str, float]  # of METRICS
    class_ap: dict[str, float]  # by class name, in the order of the category ids
    precision: np.ndarray  # (10 IoU thresholds, 101 recalls), mean over the classes, 0 to 1
    # AP50 that each of ERRORS and SPECIAL_ERRORS costs, by TIDE; empty if nothing was found.
    errors: dict[str, float]


@dataclass
class Mistakes:
    """Boxes of an image at IoU 0.5, by the ids that pycocotools gives them. Crowds do not count."""

    num_objects: int
    missed: set[int]  # annotations
    false: set[int]  # detections


def analyze_task(evaluation: COCOeval, results: list[dict[str, Any]]) -> TaskAnalysis:
    """
    Args:
        evaluation: of :func:`evaluate_results`.
        results: what was evaluated.
    """
    # (IoU thresholds, recalls, classes), of all areas and with the most detections
    precision = np.ma.masked_less(evaluation.eval["precision"][:, :, :, 0, -1], 0)
    categories = evaluation.cocoGt.loadCats(evaluation.params.catIds)
    return TaskAnalysis(
        ap={name: _percent(ap) for name, ap in zip(METRICS, evaluation.stats)},
        class_ap={c["name"]: _percent(precision[:, :, k].mean()) for k, c in enumerate(categories)},
        precision=precision.mean(axis=2).filled(math.nan),
        errors=_tide_errors(evaluation, results),
    )


def _percent(ap: float) -> float:
    return math.nan if ap is np.ma.masked or ap < 0 else 100 * float(ap)


def count_mistakes(evaluation: COCOeval, threshold: float) -> dict[int, Mistakes]:
    """
    Args:
        evaluation: with boxes or masks matched (``evaluate()``).
        threshold: detections of a lower score count as not there. COCO matches in the order of the
            score, so they do not change the matches of the others.

    Returns:
        The mistakes by image id, of all images that were evaluated.
    """
    params = evaluation.params
    mistakes = {image_id: Mistakes(0, set(), set()) for image_id in params.imgIds}
    iou = int(np.flatnonzero(np.isclose(params.iouThrs, 0.5))[0])
    for image in evaluation.evalImgs:
        if image is None or image["aRng"] != params.areaRng[0]:
            continue
        of_image = mistakes[image["image_id"]]
        scores = dict(zip(image["dtIds"], image["dtScores"]))
        matches = image["gtMatches"][iou].astype(int)
        for annotation, match, ignored in zip(image["gtIds"], matches, image["gtIgnore"]):
            of_image.num_objects += not ignored
            if not ignored and scores.get(match, -math.inf) < threshold:
                of_image.missed.add(annotation)
        for detection, ignored in zip(image["dtIds"], image["dtIgnore"][iou]):
            if detection not in matches and not ignored and scores[detection] >= threshold:
                of_image.false.add(detection)
    return mistakes


def _tide_errors(evaluation: COCOeval, results: list[dict[str, Any]]) -> dict[str, float]:
    coco, mask = evaluation.cocoGt, evaluation.params.iouType == "segm"
    truth, found = tidecv.Data("truth", max_dets=100), tidecv.Data("found", max_dets=100)
    for category in coco.cats.values():
        truth.add_class(category["id"], category["name"])
    for image in coco.imgs:
        truth.add_image(image, str(image))
    for annotation in coco.anns.values():
        add = truth.add_ignore_region if annotation.get("iscrowd") else truth.add_ground_truth
        rle = coco.annToRLE(annotation) if mask else None
        add(annotation["image_id"], annotation["category_id"], annotation["bbox"], rle)
    for result in results:
        found.add_detection(
            result["image_id"],
            result["category_id"],
            result["score"],
            result["bbox"],
            result["segmentation"] if mask else None,
        )
    with matplotlib.rc_context():  # TIDE sets a style of its own for all figures
        tide = tidecv.TIDE()
    try:
        tide.evaluate(truth, found, mode=tidecv.TIDE.MASK if mask else tidecv.TIDE.BOX)
        errors = tide.get_all_errors()
    except ZeroDivisionError:  # its mean over the classes: without missed objects there are none
        return {}
    return {name: float(ap) for kind in errors.values() for name, ap in kind["found"].items()}
