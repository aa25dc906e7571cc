"""Break AP down: by class, by recall, by type of error, and by image."""

import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import tidecv
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# TIDE's names of the types of errors, and what they mean. The last two overlap with the others.
ERRORS = {
    "Cls": "class",
    "Loc": "location",
    "Both": "class and location",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
    "FalsePos": "all false positives",
    "FalseNeg": "all false negatives",
}


@dataclass
class Analysis:
    """Box or mask AP on a dataset, in percent; NaN where there is no ground truth."""

    ap: dict[str, float]  # by METRICS
    class_ap: dict[str, float]  # by class name, in the order of the category ids
    precision: np.ndarray  # (10 IoU thresholds, 101 recalls), 0 to 1, averaged over the classes
    errors: dict[str, float]  # AP50 lost, by the values of ERRORS; empty if nothing was found


Mistakes = tuple[set[int], set[int]]  # see `count_mistakes`


def analyze(evaluation: COCOeval, results: list[dict[str, Any]]) -> Analysis:
    """
    Args:
        evaluation: the return value of :func:`evaluate_results`.
        results: the detections that were evaluated, in COCO's results format.
    """
    # (IoU thresholds, recalls, classes), for all areas and the highest number of detections
    precision = np.ma.masked_less(evaluation.eval["precision"][:, :, :, 0, -1], 0)
    classes = [c["name"] for c in evaluation.cocoGt.loadCats(evaluation.params.catIds)]
    return Analysis(
        ap=dict(zip(METRICS, np.where(evaluation.stats < 0, math.nan, 100 * evaluation.stats))),
        class_ap=dict(zip(classes, 100 * precision.mean(axis=(0, 1)).filled(math.nan))),
        precision=precision.mean(axis=2).filled(math.nan),
        errors=_tide_errors(evaluation, results),
    )


def count_mistakes(evaluation: COCOeval, threshold: float) -> dict[int, Mistakes]:
    """
    Find the wrong boxes at IoU 0.5. Return the ids of the missed annotations, without crowds, and
    those of the false detections, by image id.

    Args:
        evaluation: the return value of :func:`evaluate_results`.
        threshold: the lowest score of a detection that counts. COCO matches in the order of the
            score, so dropping the others does not change the matches.
    """
    params = evaluation.params
    mistakes: dict[int, Mistakes] = {image_id: (set(), set()) for image_id in params.imgIds}
    iou = int(np.flatnonzero(np.isclose(params.iouThrs, 0.5))[0])
    for image in evaluation.evalImgs:
        if image is None or image["aRng"] != params.areaRng[0]:
            continue
        missed, false = mistakes[image["image_id"]]
        scores = dict(zip(image["dtIds"], image["dtScores"]))
        matches = image["gtMatches"][iou].astype(int)
        for annotation, match, ignored in zip(image["gtIds"], matches, image["gtIgnore"]):
            if not ignored and scores.get(match, -math.inf) < threshold:
                missed.add(annotation)
        for detection, ignored in zip(image["dtIds"], image["dtIgnore"][iou]):
            if detection not in matches and not ignored and scores[detection] >= threshold:
                false.add(detection)
    return mistakes


def _tide_errors(evaluation: COCOeval, results: list[dict[str, Any]]) -> dict[str, float]:
    coco, mask = evaluation.cocoGt, evaluation.params.iouType == "segm"
    truth, found = tidecv.Data("truth", max_dets=100), tidecv.Data("found", max_dets=100)
    for image_id in coco.imgs:  # TIDE skips detections in images that the truth does not list
        truth.add_image(image_id, str(image_id))
    for a in coco.anns.values():
        add = truth.add_ignore_region if a.get("iscrowd") else truth.add_ground_truth
        add(a["image_id"], a["category_id"], a["bbox"], coco.annToRLE(a) if mask else None)
    for r in results:
        rle = r["segmentation"] if mask else None
        found.add_detection(r["image_id"], r["category_id"], r["score"], r["bbox"], rle)
    with matplotlib.rc_context():  # TIDE changes the style of all figures
        tide = tidecv.TIDE()
    try:
        tide.evaluate(truth, found, mode=tidecv.TIDE.MASK if mask else tidecv.TIDE.BOX)
        errors = tide.get_all_errors()
    except ZeroDivisionError:  # TIDE's mean over the classes when nothing was found
        return {}
    kinds = (kind["found"] for kind in errors.values())
    return {ERRORS[name]: float(ap) for kind in kinds for name, ap in kind.items()}
