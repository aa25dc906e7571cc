"""The detections of a model on an image, and a comparison with another model."""

from collections.abc import Callable

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import box_iou

# Two detections are the same within these limits: IoU of the boxes, difference of the scores and
# of the mask probabilities.
MIN_IOU, MAX_SCORE_DIFFERENCE, MAX_MASK_DIFFERENCE = 0.99, 1e-3, 1e-2

Detections = dict[str, Tensor]  # see `detect`
Detector = Callable[[Tensor], Detections]


def detect(model: GeneralizedRCNN, image: Tensor) -> Detections:
    """
    Run a model in evaluation mode on an image (3, H, W) of the network's input size. Return
    "pred_boxes" (N, 4) in pixels of `image`, "scores" (N,), "pred_classes" (N,) and, for a Mask
    R-CNN, "pred_masks" (N, 1, 28, 28), probabilities inside the box.
    """
    with torch.no_grad():
        (instances,) = model.inference([{"image": image}], do_postprocess=False)
    fields = instances.get_fields()
    return {k: v.tensor if isinstance(v, Boxes) else v for k, v in fields.items()}


def compare_detections(expected: Detections, actual: Detections, cut: float) -> tuple[int, int]:
    """
    Return the number of expected detections with a match, and the number of detections on both
    sides without one. Those that the other model may have just below `cut`, the score below which
    the models drop detections, do not count.
    """
    # Detectron2's postprocessing also drops empty boxes.
    expected, actual = (
        {k: v[Boxes(d["pred_boxes"]).nonempty()] for k, v in d.items()} for d in (expected, actual)
    )
    a, b = expected["scores"], actual["scores"]
    same = box_iou(expected["pred_boxes"], actual["pred_boxes"]) > MIN_IOU
    same &= (a[:, None] - b[None]).abs() < MAX_SCORE_DIFFERENCE
    same &= expected["pred_classes"][:, None] == actual["pred_classes"][None]
    if "pred_masks" in expected:
        i, j = same.nonzero(as_tuple=True)
        masks = (expected["pred_masks"][i] - actual["pred_masks"][j]).abs().flatten(1)
        same[i, j] = (masks < MAX_MASK_DIFFERENCE).all(dim=1)
    clear = cut + MAX_SCORE_DIFFERENCE
    missing = (a > clear) & ~same.any(dim=1)
    unexpected = (b > clear) & ~same.any(dim=0)
    return int(same.any(dim=1).sum()), int(missing.sum() + unexpected.sum())
