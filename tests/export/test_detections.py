import pytest
import torch

from gnws_d2.export import compare_detections


def detections(**changes):
    """Two detections, one with a score just above the cut of 0.05."""
    fields = {
        "pred_boxes": torch.tensor([[0.0, 0, 100, 100], [50, 50, 150, 150]]),
        "scores": torch.tensor([0.9, 0.0509]),
        "pred_classes": torch.tensor([1, 2]),
        "pred_masks": torch.full((2, 1, 28, 28), 0.5),
    }
    return fields | {k: torch.tensor(v) for k, v in changes.items()}


MASKS = [[[[0.5] * 28] * 28]] * 2
OTHER_MASKS = [[[[0.511] + [0.5] * 27] + [[0.5] * 28] * 27], MASKS[1]]


@pytest.mark.parametrize(
    "changes, matched, unmatched",
    [
        ({}, 2, 0),
        ({"pred_boxes": [[0.0, 0, 100, 99.2], [50, 50, 150, 150]]}, 2, 0),  # IoU 0.992
        ({"pred_boxes": [[0.0, 0, 100, 98.9], [50, 50, 150, 150]]}, 1, 2),  # IoU 0.989
        ({"scores": [0.9009, 0.0509]}, 2, 0),
        ({"scores": [0.9011, 0.0509]}, 1, 2),
        ({"pred_classes": [2, 2]}, 1, 2),
        ({"pred_masks": OTHER_MASKS}, 1, 2),
        # The other model may have this one just below the cut.
        ({"pred_classes": [1, 3]}, 1, 0),
    ],
)
def test_detections_are_compared_one_by_one(changes, matched, unmatched):
    for a, b in ((detections(), detections(**changes)), (detections(**changes), detections())):
        assert compare_detections(a, b, cut=0.05) == (matched, unmatched)


def test_missing_and_additional_detections_are_counted():
    every = detections()
    none, first, second = ({k: v[i] for k, v in every.items()} for i in ([], [0], [1]))
    assert compare_detections(every, second, 0.05) == (1, 1)
    assert compare_detections(second, every, 0.05) == (1, 1)
    assert compare_detections(every, first, 0.05) == (1, 0)
    assert compare_detections(every, first, 0.0) == (1, 1)
    assert compare_detections(every, none, 0.05) == (0, 1)
    assert compare_detections(none, none, 0.05) == (0, 0)


def test_empty_boxes_are_ignored():
    """Detectron2 drops them when it scales boxes to the size of the original image."""
    flat = detections(pred_boxes=[[0.0, 0, 100, 0], [50, 50, 150, 150]])
    assert compare_detections(flat, detections(), 0.05) == (1, 1)
    assert compare_detections(flat, flat, 0.05) == (1, 0)
