"""Detectron2's RPN with MMDetection's rule for objects that no anchor overlaps well."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor


class MinQualityMatcher(Matcher):
    """
    :class:`Matcher` whose low-quality matches need a minimum, as those of MMDetection's
    ``MaxIoUAssigner`` (``match_low_quality``, ``min_pos_iou``).
    """

    def __init__(self, thresholds: list[float], labels: list[int], min_quality: float):
        """`min_quality`: from which quality the best predictions of an object match it."""
        super().__init__(thresholds, labels)
        self.min_quality = min_quality

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            match_quality_matrix: (M, N), the IoU of M objects with N predictions.

        Returns:
            The index of the object of each prediction, and its label, (N,) each. A prediction that
            is the best one of an object belongs to it, also if it overlaps another one more; of
            several such objects, to the last.
        """
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel() == 0:
            return matches, labels
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        is_best = (match_quality_matrix == best) & (best >= self.min_quality)
        order = torch.arange(1, len(best) + 1, device=best.device)[:, None]
        last = (is_best * order).max(dim=0).values
        labels[last > 0] = 1
        return torch.where(last > 0, last - 1, matches), labels


@PROPOSAL_GENERATOR_REGISTRY.register()
class MinQualityRPN(RPN):
    """:class:`RPN` with ``MODEL.RPN.MIN_LOW_QUALITY_IOU``; Detectron2's at 0 or without the key."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super().from_config(cfg, input_shape)
        rpn = cfg.MODEL.RPN
        if "MIN_LOW_QUALITY_IOU" in rpn and rpn.MIN_LOW_QUALITY_IOU > 0:
            ret["anchor_matcher"] = MinQualityMatcher(
                rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, rpn.MIN_LOW_QUALITY_IOU
            )
        return ret
