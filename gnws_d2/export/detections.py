"""What a model finds on an image, and whether another model finds the same."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import box_iou

# How close two detections are that count as the same: IoU of the boxes, scores, and the
# probabilities of the masks.
MIN_IOU, MAX_SCORE_DIFFERENCE, MAX_MASK_DIFFERENCE = 0.99, 1e-3, 1e-2

# From an image to the detections on it, see `detect`.
Detector = Callable[[Tensor], dict[str, Tensor]]


def detect(model: GeneralizedRCNN, image: Tensor) -> dict[str, Tensor]:
    """
    Args:
        model: in evaluation mode.
        image: (3, H, W), of the size that the network gets it in.

    Returns:
        Detectron2's fields: "pred_boxes" (N, 4), in pixels of `image`, "scores" (N,),
        "pred_classes" (N,) and, of a model with masks, "pred_masks" (N, 1, 28, 28), probabilities
        in the box.
    """
    with torch.no_grad():
        (instances,) = model.inference([{"image": image}], do_postprocess=False)
    fields = instances.get_fields()
    return {k: v.tensor if isinstance(v, Boxes) else v for k, v in fields.items()}


@dataclass
class Comparison:
    """
    Attributes:
        expected, actual: the number of detections of either model.
        matched: the number of those that both have.
        unmatched: the number of those that one has and the other should have.
        min_iou, max_score_difference: of those that both have.
    """

    expected: int
    actual: int
    matched: int
    unmatched: int
    min_iou: float
    max_score_difference: float


def compare_detections(
    expected: dict[str, Tensor], actual: dict[str, Tensor], cut: float
) -> Comparison:
    """
    Args:
        expected, actual: of :func:`detect`, of the same image.
        cut: the score below which a model leaves detections out. What is so close above it that the
            other model may have it below is not missed.
    """
    # Detectron2 drops these when it brings boxes to the size of the original image.
    expected, actual = ({k: v[_nonempty(d)] for k, v in d.items()} for d in (expected, actual))
    a, b = expected["scores"], actual["scores"]
    iou = box_iou(expected["pred_boxes"], actual["pred_boxes"])
    difference = (a[:, None] - b[None]).abs()
    same = (iou > MIN_IOU) & (difference < MAX_SCORE_DIFFERENCE)
    same &= expected["pred_classes"][:, None] == actual["pred_classes"][None]
    if "pred_masks" in expected:
        i, j = same.nonzero(as_tuple=True)
        masks = (expected["pred_masks"][i] - actual["pred_masks"][j]).abs().flatten(1)
        same[i, j] = (masks < MAX_MASK_DIFFERENCE).all(dim=1)
    clear = cut + MAX_SCORE_DIFFERENCE
    unmatched = (a > clear) & ~same.any(dim=1)
    unexpected = (b > clear) & ~same.any(dim=0)
    return Comparison(
        len(a),
        len(b),
        int(same.any(dim=1).sum()),
        int(unmatched.sum() + unexpected.sum()),
        min(iou[same].tolist(), default=1.0),
        max(difference[same].tolist(), default=0.0),
    )


def _nonempty(detections: dict[str, Tensor]) -> Tensor:
    return Boxes(detections["pred_boxes"]).nonempty()
