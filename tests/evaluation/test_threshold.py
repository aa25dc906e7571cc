"""The threshold with the best F1, compared with cases computed by hand and with all thresholds."""

import json

import numpy as np
import pytest
from builders import box, result, truth

from gnws_d2.checkpoint.files import DEFAULT_THRESHOLD, read_threshold
from gnws_d2.evaluation import best_thresholds, evaluate_results, read_truth
from gnws_d2.evaluation.coco_evaluation import write_thresholds
from gnws_d2.utils.errors import UserError

FOUR_CATS = [(1, 1, box(20 * i)) for i in range(1, 5)]
# Of four cats three are found, at 0.9, 0.8 and 0.3; false ones have 0.85 and, twice, 0.4.
RESULTS = [
    result(1, 1, box(20), 0.9), result(2, 1, box(0), 0.85), result(1, 1, box(40), 0.8),
    result(2, 1, box(50), 0.4), result(2, 1, box(80), 0.4), result(1, 1, box(60), 0.3),
    result(2, 5, box(80), 0.7),
]  # fmt: skip


def thresholds(json_file, results):
    return best_thresholds(
        evaluate_results(read_truth(json_file), results, "bbox", iou_threshold=0.5)
    )


def test_threshold_lies_below_the_last_detection_that_improves_f1(tmp_path):
    json_file = truth(tmp_path / "truth.json", FOUR_CATS)
    best, classes = thresholds(json_file, RESULTS)
    assert list(classes) == ["cat"]  # no dogs
    assert classes["cat"] == pytest.approx((0.15, 3 / 6, 3 / 4, 0.6))
    # The false dog counts only among all classes.
    assert best == pytest.approx((0.75, 2 / 3, 2 / 4, 4 / 7))
    _, classes = thresholds(json_file, RESULTS[:5])
    assert classes["cat"] == pytest.approx((0.6, 2 / 3, 2 / 4, 4 / 7))


def test_detections_in_crowds_do_not_count(tmp_path):
    json_file = truth(tmp_path / "truth.json", [(1, 1, box(0)), (1, 1, box(40), 1)])
    best, _ = thresholds(json_file, [result(1, 1, box(40), 0.9), result(1, 1, box(0), 0.5)])
    assert best == pytest.approx((0.25, 1, 1, 1))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_higher_f1(tmp_path, seed):
    """With two classes, equal scores and objects 100 pixels apart, so that matches are plain."""
    rng = np.random.default_rng(seed)
    places = [
        (image, category, 100 * i) for image in (1, 2) for category in (1, 5) for i in range(9)
    ]
    objects = [p for p in places if rng.random() < 0.6]
    results = [
        result(image, category, box(x), round(rng.random(), 1))
        for image, category, x in places
        if rng.random() < 0.7
    ]
    json_file = truth(tmp_path / "truth.json", [(i, c, box(x)) for i, c, x in objects])
    best, classes = thresholds(json_file, results)

    def f1(threshold, category=None):
        kept = [r for r in results if r["score"] >= threshold]
        kept = [r for r in kept if category in (None, r["category_id"])]
        wanted = [p for p in objects if category in (None, p[1])]
        found = [(r["image_id"], r["category_id"], int(r["bbox"][0])) for r in kept]
        return 2 * len(set(found) & set(wanted)) / (len(found) + len(wanted))

    for point, category in ((best, None), (classes["cat"], 1), (classes["dog"], 5)):
        assert point.f1 == pytest.approx(f1(point.threshold, category))
        assert point.f1 == pytest.approx(max(f1(t, category) for t in np.arange(0.05, 1.1, 0.1)))


def test_thresholds_are_kept_beside_the_checkpoint(tmp_path):
    json_file, path = truth(tmp_path / "truth.json", FOUR_CATS), tmp_path / "threshold.json"
    checkpoint = str(tmp_path / "model_final.pth")
    assert read_threshold(checkpoint) == DEFAULT_THRESHOLD == 0.5
    write_thresholds(json_file, RESULTS, str(path))
    assert json.loads(path.read_text()) == pytest.approx(
        {"threshold": 0.75, "classes": pytest.approx({"cat": 0.15})}
    )
    assert read_threshold(checkpoint) == pytest.approx(0.75)
    for text in ("{", "[]", '{"threshold": NaN}', '{"threshold": 2}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"threshold.json is damaged: .* evaluate again"):
            read_threshold(checkpoint)
    write_thresholds(json_file, RESULTS[1:2], str(path))  # none is correct
    assert read_threshold(checkpoint) == DEFAULT_THRESHOLD and not path.exists()
