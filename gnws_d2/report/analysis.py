"""Break COCO's AP down: by class, score, image and type of error."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# TIDE's types of errors, and what they mean.
ERRORS = {
    "Cls": "class",
    "Loc": "location",
    "Both": "class and location",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


@dataclass
class Analysis:
    """AP of boxes or masks on a dataset, in percent; NaN where there is no ground truth."""

    ap: dict[str, float]  # by METRICS
    class_ap: dict[str, float]  # by class name, in the order of the category ids
    precision: np.ndarray  # (10 IoU thresholds, 101 recall levels), 0 to 1, mean over the classes
    errors: dict[str, float]  # AP50 lost, by the values of ERRORS


def analyze(evaluation: Any) -> Analysis:
    """Analyze the return value of :func:`evaluate_results`."""
    # (IoU thresholds, recall levels, classes), for all areas and the highest number of detections
    precision = np.ma.masked_less(evaluation.eval["precision"][:, :, :, 0, -1], 0)
    classes = [c["name"] for c in evaluation.cocoGt.loadCats(evaluation.params.catIds)]
    class_ap = dict(zip(classes, 100 * precision.mean(axis=(0, 1)).filled(math.nan)))
    tide = evaluation.tide_errors()["delta_ap"]
    return Analysis(
        ap=dict(zip(METRICS, np.where(evaluation.stats < 0, math.nan, 100 * evaluation.stats))),
        class_ap=class_ap,
        precision=precision.mean(axis=2).filled(math.nan),
        errors={name: 100 * tide[key] for key, name in ERRORS.items()},
    )


def find_mistakes(evaluation: Any) -> dict[Any, tuple[set[Any], set[int]]]:
    """
    Return for each image id the ids of the annotations that were missed, crowds aside, and of the
    false detections. `evaluation` is the return value of :func:`evaluate_results` with an
    ``iou_threshold``, of the detections that count.
    """
    mistakes: dict[Any, tuple[set[Any], set[int]]]
    mistakes = {image_id: (set(), set()) for image_id in evaluation.cocoGt.getImgIds()}
    for match in filter(None, evaluation.evalImgs):
        missed, false = mistakes[match["image_id"]]
        false.update(id for id, skip in zip(match["dtIds"], match["dtIgnore"][0]) if not skip)
        objects = zip(match["gtIds"], match["gtMatches"][0], match["gtIgnore"])
        for id, found_by, skip in objects:
            false.discard(found_by)
            if not found_by and not skip:
                missed.add(id)
    return mistakes


def confusion_matrix(
    evaluation: Any, threshold: float, limit: int = 15
) -> tuple[list[str], np.ndarray]:
    """
    Count by class what was detected where the objects are, at IoU 0.5 and scores of at least
    `threshold`, for the `limit` classes that are confused most.

    Returns:
        The names of n classes, and (n + 1, n + 1) numbers of objects, by class (rows) and by the
        class of the detection (columns); the last row and column are background.
    """
    confusion = evaluation.confusion_matrix(iou_thr=0.5, min_score=threshold)
    names, matrix = confusion["cat_names"], confusion["matrix"].astype(int)
    errors = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    kept = sorted(np.argsort(-errors[:-1], kind="stable")[:limit].tolist())
    index = [*kept, len(names)]
    return [names[i] for i in kept], matrix[np.ix_(index, index)]
