"""Compared with cases that are computed by hand, and with the arrays of pycocotools."""

import numpy as np
import pytest
from builders import box, result, truth

from gnws_d2.evaluation import evaluate_results, read_truth
from gnws_d2.report.analysis import (
    ERRORS,
    METRICS,
    analyze,
    confusion_matrix,
    find_mistakes,
)


@pytest.fixture
def ground_truth(tmp_path):
    return lambda *args: read_truth(truth(tmp_path / "truth.json", *args))


@pytest.fixture
def analyze_boxes(ground_truth):
    return lambda objects, results: analyze(
        evaluate_results(ground_truth(objects), results, "bbox")
    )


def test_missed_objects_and_false_detections(ground_truth):
    coco = ground_truth(
        [
            (1, 1, box(0)),  # found
            (1, 5, box(40)),  # found as another class
            (1, 5, box(60)),  # an IoU of 0.4 is not enough
            (1, 1, box(100, 50), 1),  # a crowd
            (2, 1, box(0)),  # found twice
        ],
        3,
    )
    results = [
        result(1, 1, box(0), 0.9),
        result(1, 1, box(40), 0.8),  # false
        result(1, 5, box(60, 4), 0.7),  # false
        result(1, 1, box(110), 0.9),  # in the crowd
        result(1, 1, box(130), 0.85),  # in the crowd, too
        result(2, 1, box(0, 9), 0.6),  # false: the next one has a higher score
        result(2, 1, box(0), 0.95),
    ]
    evaluation = evaluate_results(coco, results, "bbox", iou_threshold=0.5)
    mistakes = find_mistakes(evaluation)
    assert mistakes == {1: ({2, 3}, {2, 3}), 2: (set(), {6}), 3: (set(), set())}
    detections = evaluation.cocoDt.loadAnns([2, 3, 6])
    assert [detection["score"] for detection in detections] == [0.8, 0.7, 0.6]


def test_confusion_matrix(ground_truth):
    objects = [(1, 1, box(0)), (1, 5, box(40)), (2, 5, box(0))]
    results = [
        result(1, 1, box(0), 0.9), result(1, 1, box(40), 0.8), result(2, 1, box(50), 0.7),
        result(2, 5, box(0), 0.4),
    ]  # fmt: skip
    evaluation = evaluate_results(ground_truth(objects), results, "bbox")
    names, matrix = confusion_matrix(evaluation, 0.5)
    assert names == ["cat", "dog"]
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 0]]
    names, matrix = confusion_matrix(evaluation, 0.5, limit=1)
    assert names == ["cat"] and matrix.tolist() == [[1, 0], [1, 0]]


def test_ap(analyze_boxes):
    """Precision is 1 up to a recall of 0.5, then 2/3, at every IoU. There is no dog."""
    analysis = analyze_boxes(
        [(1, 1, box(0)), (1, 1, box(20))],
        [
            result(1, 1, box(0), 0.9),
            result(2, 1, box(0), 0.8),
            result(1, 1, box(20), 0.7),
            result(1, 5, box(20), 0.7),
        ],
    )
    expected = 100 * (51 + 50 * 2 / 3) / 101
    assert [analysis.ap[name] for name in METRICS] == pytest.approx(
        [expected] * 4 + [np.nan] * 2, nan_ok=True
    )
    assert analysis.class_ap["cat"] == pytest.approx(expected)
    assert np.isnan(analysis.class_ap["dog"])
    np.testing.assert_allclose(analysis.precision, [[1] * 51 + [2 / 3] * 50] * 10)


@pytest.mark.parametrize(
    "detection, error, cost",
    [
        (result(1, 1, box(0, 4), 0.9), "location", 50),
        (result(1, 5, box(0), 0.9), "class", 75),
        (result(1, 5, box(0, 4), 0.9), "class and location", 25),
        (result(1, 5, box(50), 0.9), "background", 25),
    ],
)
def test_ap_lost_to_each_type_of_error(detection, error, cost, analyze_boxes):
    """
    The second detection finds the dog, but a false dog before it makes that AP 50. The cat is not
    found: AP 0.
    """
    objects = [(1, 1, box(0)), (2, 5, box(0))]
    analysis = analyze_boxes(objects, [detection, result(2, 5, box(0), 0.5)])
    assert analysis.ap["AP50"] == pytest.approx(50 if error == "location" else 25, abs=0.5)
    assert analysis.errors == pytest.approx(dict.fromkeys(ERRORS.values(), 0) | {error: cost})
