"""Break AP down: by class, by recall, by score, by type of error, and by image."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# TIDE's names of the types of errors, and what they mean. The last two overlap with the others.
ERRORS = {
    "Cls": "class",
    "Loc": "location",
    "Both": "class and location",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
    "FP": "all false positives",
    "FN": "all false negatives",
}


@dataclass
class Analysis:
    """Box or mask AP on a dataset, in percent; NaN where there is no ground truth."""

    ap: dict[str, float]  # by METRICS
    class_ap: dict[str, float]  # by class name, in the order of the category ids
    precision: np.ndarray  # (10 IoU thresholds, 101 recalls), 0 to 1, averaged over the classes
    errors: dict[str, float]  # AP50 lost, by the values of ERRORS; empty without hotcoco


def analyze(evaluation: Any) -> Analysis:
    """
    Args:
        evaluation: the return value of :func:`evaluate_results`.
    """
    # (IoU thresholds, recalls, classes), for all areas and the highest number of detections
    precision = np.ma.masked_less(evaluation.eval["precision"][:, :, :, 0, -1], 0)
    classes = [c["name"] for c in evaluation.cocoGt.loadCats(evaluation.params.catIds)]
    errors = {}
    if hasattr(evaluation, "tide_errors"):
        tide = evaluation.tide_errors()["delta_ap"]
        errors = {name: 100 * tide[key] for key, name in ERRORS.items()}
    return Analysis(
        ap=dict(zip(METRICS, np.where(evaluation.stats < 0, math.nan, 100 * evaluation.stats))),
        class_ap=dict(zip(classes, 100 * precision.mean(axis=(0, 1)).filled(math.nan))),
        precision=precision.mean(axis=2).filled(math.nan),
        errors=errors,
    )


class Matches(NamedTuple):
    """The matches of an image and a class at one IoU, of what COCO does not ignore."""

    image_id: int
    category_id: int
    detections: np.ndarray  # (n,), ids
    scores: np.ndarray  # (n,)
    annotations: np.ndarray  # (m,), ids
    found_by: np.ndarray  # (m,), index into `detections`, or -1


def read_matches(evaluation: Any) -> list[Matches]:
    """
    Args:
        evaluation: the return value of :func:`evaluate_results` with an ``iou_threshold``.
    """
    return [_read_match(match) for match in evaluation.evalImgs if match is not None]


def _read_match(match: dict[str, Any]) -> Matches:
    kept = ~np.array(match["dtIgnore"][0], bool)
    detections, index = np.array(match["dtIds"], int)[kept], {}
    index = {id: i for i, id in enumerate(detections.tolist())}
    objects = ~np.array(match["gtIgnore"], bool)
    found_by = np.array(match["gtMatches"][0], int)[objects].tolist()
    return Matches(
        match["image_id"],
        match["category_id"],
        detections,
        np.array(match["dtScores"])[kept],
        np.array(match["gtIds"], int)[objects],
        np.array([index.get(id, -1) for id in found_by], int),
    )


Mistakes = tuple[set[int], set[int]]  # see `find_mistakes`


def find_mistakes(
    matches: list[Matches], image_ids: list[int], threshold: float
) -> dict[int, Mistakes]:
    """
    Return the ids of the missed annotations, without crowds, and those of the false detections, by
    image id.

    Args:
        threshold: the lowest score of a detection that counts. COCO matches in the order of the
            score, so dropping the others does not change the matches.
    """
    mistakes: dict[int, Mistakes] = {image_id: (set(), set()) for image_id in image_ids}
    for match in matches:
        missed, false = mistakes[match.image_id]
        counts = match.scores >= threshold
        found = match.found_by >= 0
        found[found] = counts[match.found_by[found]]
        missed.update(match.annotations[~found].tolist())
        counts[match.found_by[found]] = False
        false.update(match.detections[counts].tolist())
    return mistakes


class Score(NamedTuple):
    """Precision and recall, 0 to 1, of the detections with at least a score."""

    threshold: float
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall, NaN without both."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def class_scores(matches: list[Matches], threshold: float) -> dict[int, tuple[Score, Score]]:
    """
    Return by category id the precision and recall at `threshold`, and at the threshold of the best
    F1. Classes without objects are left out.
    """
    scores = {}
    for category_id in sorted({match.category_id for match in matches}):
        own = [match for match in matches if match.category_id == category_id]
        num_objects = sum(len(match.annotations) for match in own)
        if not num_objects:
            continue
        score = np.concatenate([match.scores for match in own])
        right = np.zeros(len(score), bool)
        ends = np.cumsum([len(match.scores) for match in own])
        for end, match in zip(ends, own):
            found = match.found_by[match.found_by >= 0]
            right[end - len(match.scores) + found] = True
        order = np.argsort(-score, kind="stable")
        score, num_right = score[order], np.cumsum(right[order])
        # One point for each score, at the last of the detections that share it.
        last = np.flatnonzero(np.append(np.diff(score) != 0, True)) if len(score) else order
        precision, recall = num_right[last] / (last + 1), num_right[last] / num_objects
        points = [Score(*map(float, p)) for p in zip(score[last], precision, recall)]
        nothing = Score(threshold, math.nan, 0.0)
        chosen = [point for point in points if point.threshold >= threshold] or [nothing]
        scores[category_id] = (
            chosen[-1]._replace(threshold=threshold),
            max(points, key=lambda point: point.f1, default=nothing),
        )
    return scores


def confusion_matrix(evaluation: Any, threshold: float) -> tuple[list[str], np.ndarray] | None:
    """
    Count which class is found where another one is, at IoU 0.5.

    Args:
        evaluation: see :func:`analyze`.
        threshold: the lowest score of a detection that counts.

    Returns:
        The names of n classes, and (n + 1, n + 1) numbers of objects (rows) by what was found there
        (columns); the last are nothing. None without hotcoco.
    """
    if not hasattr(evaluation, "confusion_matrix"):
        return None
    confusion = evaluation.confusion_matrix(iou_thr=0.5, min_score=threshold)
    return confusion["cat_names"], confusion["matrix"].astype(int)


def most_confused(
    names: list[str], matrix: np.ndarray, limit: int = 15
) -> tuple[list[str], np.ndarray]:
    """Return the part of a :func:`confusion_matrix` for the classes that are confused most."""
    errors = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    kept = sorted(np.argsort(-errors[:-1], kind="stable")[:limit].tolist())
    index = [*kept, len(names)]
    return [names[i] for i in kept], matrix[np.ix_(index, index)]
