"""Detectron2's test-time augmentation (``TEST.AUG``) with OpenCV's resize."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNN, GeneralizedRCNNWithTTA

from ..data.transforms import OpenCVResizeShortestEdge
from ..utils.errors import UserError


class OpenCVDatasetMapperTTA(DatasetMapperTTA):
    """:class:`DatasetMapperTTA` that resizes the original image with OpenCV."""

    def __call__(self, dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Return a dict with ``image`` and ``transforms`` for each of ``TEST.AUG.MIN_SIZES`` and, with
        ``TEST.AUG.FLIP``, its mirror image, from an ``image``, (3, H, W), uint8, in its own size.
        """
        image = dataset_dict["image"].permute(1, 2, 0).numpy()
        ret = []
        for size in self.min_sizes:
            resize = OpenCVResizeShortestEdge([size, size], self.max_size)
            for flips in [[], [T.RandomFlip(prob=1.0)]][: 1 + self.flip]:
                resized, transforms = T.apply_augmentations([resize, *flips], image)
                tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
                ret.append({**dataset_dict, "image": tensor, "transforms": transforms})
        return ret


def with_tta(cfg: CfgNode, model: GeneralizedRCNN) -> GeneralizedRCNNWithTTA:
    """Wrap a model for TEST.AUG; raise :class:`UserError` for models without that in Detectron2."""
    if cfg.MODEL.KEYPOINT_ON or not isinstance(model, GeneralizedRCNN):
        raise UserError(
            "TEST.AUG.ENABLED is for a GeneralizedRCNN without keypoints: set it False."
        )
    return GeneralizedRCNNWithTTA(cfg, model, OpenCVDatasetMapperTTA(cfg))
