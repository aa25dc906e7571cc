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
    # Of each class with objects: the score with the highest F1, the harmonic mean of precision and
    # recall, at IoU 0.5; and there (score, precision, recall, F1), 0 to 1.
    best_scores: dict[str, tuple[float, ...]]
    errors: dict[str, float]  # AP50 lost, by the values of ERRORS


def analyze(evaluation: Any) -> Analysis:
    """Break down the return value of :func:`evaluate_results`."""
    # (IoU thresholds, recall levels, classes), for all areas and the highest number of detections
    precision, scores = (evaluation.eval[k][:, :, :, 0, -1] for k in ("precision", "scores"))
    precision = np.ma.masked_less(precision, 0)
    classes = [c["name"] for c in evaluation.cocoGt.loadCats(evaluation.params.catIds)]
    p, r = precision[0].filled(0), np.array(evaluation.params.recThrs)[:, None]
    f1 = 2 * p * r / np.maximum(p + r, 1e-9)
    points = np.stack(np.broadcast_arrays(scores[0], p, r, f1))  # (4, recall levels, classes)
    points = points[:, f1.argmax(axis=0), range(len(classes))].T
    class_ap = dict(zip(classes, 100 * precision.mean(axis=(0, 1)).filled(math.nan)))
    tide = evaluation.tide_errors()["delta_ap"]
    return Analysis(
        ap=dict(zip(METRICS, np.where(evaluation.stats < 0, math.nan, 100 * evaluation.stats))),
        class_ap=class_ap,
        precision=precision.mean(axis=2).filled(math.nan),
        best_scores={
            name: tuple(point)
            for name, point in zip(classes, points.tolist())
            if not math.isnan(class_ap[name])
        },
        errors={name: 100 * tide[key] for key, name in ERRORS.items()},
    )


def find_mistakes(evaluation: Any) -> dict[Any, tuple[set[Any], set[int]]]:
    """
    Return for each image id the ids of the annotations that were missed, crowds aside, and of the
    false detections in an evaluation with an ``iou_threshold``.
    """
    mistakes: dict[Any, tuple[set[Any], set[int]]] = {
        image_id: (set(), set()) for image_id in evaluation.cocoGt.getImgIds()
    }
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
    Return the names of the n <= `limit` classes that are confused most, and (n + 1, n + 1) numbers
    of objects, by class (rows) and by the class of the detection (columns), at IoU 0.5 and with a
    score of at least `threshold`. The last row and column are background.
    """
    confusion = evaluation.confusion_matrix(iou_thr=0.5, min_score=threshold)
    names, matrix = confusion["cat_names"], confusion["matrix"].astype(int)
    errors = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    kept = sorted(np.argsort(-errors[:-1], kind="stable")[:limit].tolist())
    index = [*kept, len(names)]
    return [names[i] for i in kept], matrix[np.ix_(index, index)]
