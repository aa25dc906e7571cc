"""The score from which on detections are worth showing: the one with the best F1."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np


class OperatingPoint(NamedTuple):
    """The detections with a score of at least `threshold`; all values are 0 to 1."""

    threshold: float
    precision: float
    recall: float
    f1: float  # the harmonic mean of precision and recall


def best_thresholds(
    evaluation: Any,
) -> tuple[OperatingPoint | None, dict[str, OperatingPoint | None]]:
    """
    Find the threshold with the highest F1.

    Args:
        evaluation: the return value of :func:`evaluate_results` with an ``iou_threshold``.

    Returns:
        The best point of all detections together, and of each class with objects, by its name in
        the order of the category ids. None if no detection is correct. The threshold lies in the
        middle between the lowest score that is accepted and the next lower one.
    """
    detections: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    num_objects: Counter[int] = Counter()
    for match in filter(None, evaluation.evalImgs):
        category = match["category_id"]
        num_objects[category] += sum(match["gtInDenominator"])
        found = zip(match["dtScores"], match["dtMatched"][0], match["dtIgnore"][0])
        detections[category] += [(score, correct) for score, correct, skip in found if not skip]
    everything = [detection for found in detections.values() for detection in found]
    classes = evaluation.cocoGt.loadCats(sorted(c for c, n in num_objects.items() if n))
    return _best_point(everything, num_objects.total()), {
        c["name"]: _best_point(detections[c["id"]], num_objects[c["id"]]) for c in classes
    }


def _best_point(detections: list[tuple[float, bool]], num_objects: int) -> OperatingPoint | None:
    if not any(correct for _, correct in detections):
        return None
    scores, correct = np.array(sorted(detections, reverse=True)).T
    lower = np.append(scores[1:], 0)
    # Equal scores are accepted together.
    last = np.flatnonzero(scores > lower)
    num_correct, num_accepted = correct.cumsum()[last], last + 1
    f1 = 2 * num_correct / (num_accepted + num_objects)
    best = f1.argmax()
    return OperatingPoint(
        float((scores + lower)[last][best] / 2),
        float(num_correct[best] / num_accepted[best]),
        float(num_correct[best] / num_objects),
        float(f1[best]),
    )
