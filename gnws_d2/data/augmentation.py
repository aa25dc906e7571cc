"""What training changes at random in its images: INPUT.AUGMENTATION, and copy-paste."""

import importlib.util
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances

from ..config import check_choice
from ..utils.errors import UserError
from .transforms import OpenCVResizeScale, OpenCVResizeShortestEdge, OpenCVResizeTransform

AUGMENTATIONS = ("none", "light", "strong")

_COLOR = 0.8, 1.2  # of brightness, contrast and saturation
_SCALE = 0.8  # the smallest of "light"; the largest is its inverse
_LARGE_SCALE = 0.1, 2.0  # of "strong"
_MIN_VISIBLE = 0.1  # part of a mask; an object of which less is left is not trained on


def check_augmentation(cfg: CfgNode) -> None:
    """Raise :class:`UserError` for a value of a key of the augmentation that cannot be used."""
    check_choice("INPUT.AUGMENTATION", cfg.INPUT.AUGMENTATION, AUGMENTATIONS)
    masks = cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else ""
    if cfg.INPUT.AUGMENTATION == "strong" and masks == "polygon":
        if importlib.util.find_spec("shapely") is None:  # for T.CropTransform
            raise UserError(
                'INPUT.AUGMENTATION "strong" crops polygons by Shapely, which is not installed: '
                "pip install shapely, or set INPUT.MASK_FORMAT bitmask."
            )
    if cfg.INPUT.COPY_PASTE and (masks != "bitmask" or cfg.MODEL.KEYPOINT_ON):
        raise UserError(
            f"INPUT.COPY_PASTE is {cfg.INPUT.COPY_PASTE}, which needs MODEL.MASK_ON True, "
            "INPUT.MASK_FORMAT bitmask and MODEL.KEYPOINT_ON False: set these, or "
            "INPUT.COPY_PASTE 0.0."
        )


def build_augmentation(cfg: CfgNode, augmentations: list, is_train: bool) -> list[T.Augmentation]:
    """
    Have Detectron2's augmentations resize by OpenCV. In a training, after
    :func:`check_augmentation`, add what ``INPUT.ANY_ORIENTATION`` and ``INPUT.AUGMENTATION`` say:
    "light" scales the resized image, and varies its colors; "strong" is the large-scale jitter of
    Detectron2's new baselines instead of the resizing: its images are squares of
    ``INPUT.MAX_SIZE_TRAIN``, in which an image of scale 1 just fits.
    """
    is_train = is_train and "AUGMENTATION" in cfg.INPUT  # not in Detectron2's own config
    if is_train:
        check_augmentation(cfg)
    kind, size = cfg.INPUT.AUGMENTATION if is_train else "none", cfg.INPUT.MAX_SIZE_TRAIN
    result = []
    for aug in augmentations:
        if type(aug) is not T.ResizeShortestEdge:
            result.append(aug)
        elif kind == "strong":
            crop = T.FixedSizeCrop((size, size))
            crop.seg_pad_value = 0  # the default, 255, would add the padding to masks in RLE
            result += [OpenCVResizeScale(*_LARGE_SCALE, size, size), crop]
        else:
            resize = _JitteredResize if kind == "light" else OpenCVResizeShortestEdge
            result.append(resize(aug.short_edge_length, aug.max_size, aug.sample_style))
            if kind == "light":
                bgr = cfg.INPUT.FORMAT == "BGR"
                result += [T.RandomBrightness(*_COLOR), T.RandomContrast(*_COLOR)]
                result.append((_RandomSaturationBGR if bgr else T.RandomSaturation)(*_COLOR))
    if is_train and cfg.INPUT.ANY_ORIENTATION:  # with a flip, all eight orientations
        result.append(T.RandomRotation([0, 90, 180, 270], sample_style="choice"))
    return result


class _JitteredResize(OpenCVResizeShortestEdge):
    """:class:`OpenCVResizeShortestEdge`, whose result is scaled by 0.8 to 1.25."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        t = super().get_transform(image)
        if not isinstance(t, OpenCVResizeTransform):
            return t
        scale = _SCALE ** np.random.uniform(-1, 1)
        sizes = (max(1, round(scale * size)) for size in (t.new_h, t.new_w))
        return OpenCVResizeTransform(t.h, t.w, *sizes)


class _RandomSaturationBGR(T.RandomSaturation):
    def get_transform(self, image: np.ndarray) -> T.Transform:
        return super().get_transform(image[:, :, ::-1])  # of which it takes the gray image alone


def paste_objects(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """
    Paste a random subset of the objects of another image onto an image, without blending: Ghiasi et
    al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR
    2021. Draws from `np.random`.

    Args:
        record, other: mapped images with ``image``, (3, H, W) uint8, and ``instances`` with
            :class:`BitMasks`, which only an image without objects may lack. `other` is cropped or
            padded at the right and at the bottom to the size of `record`.

    Returns:
        `record` with a new ``image`` and new ``instances``: the masks without what is covered, and
        the boxes of the masks. Objects of which less than a tenth is left are dropped.
    """
    source, target, image = other["instances"], record["instances"], record["image"].clone()
    if not len(source):
        return record
    masks, size = source.gt_masks.tensor.numpy(), tuple(image.shape[1:])  # NumPy is faster here
    overlap = masks[:, : size[0], : size[1]]
    height, width = overlap.shape[1:]
    (candidates,) = np.nonzero(_is_visible(overlap, masks))
    chosen = np.random.permutation(candidates)[: np.random.randint(max(1, len(candidates))) + 1]
    pasted = np.zeros((len(chosen), *size), bool)
    pasted[:, :height, :width] = overlap[chosen]
    covered = np.logical_or.reduce(pasted, axis=0)
    pixels = other["image"].numpy()[:, :height, :width]
    np.copyto(image.numpy()[:, :height, :width], pixels, where=covered[:height, :width])
    before = target.gt_masks.tensor.numpy() if len(target) else pasted[:0]
    after = before & ~covered
    keep = _is_visible(after, before)
    instances = Instances(size)
    instances.gt_masks = BitMasks(torch.from_numpy(np.concatenate([after[keep], pasted])))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.cat([target.gt_classes[keep], source.gt_classes[chosen]])
    return {**record, "image": image, "instances": instances}


def _is_visible(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return for masks, (n, H, W) each, whether enough of them is left, as (n,) bool."""
    areas = [(np.count_nonzero(a), np.count_nonzero(b)) for a, b in zip(after, before)]
    return np.array([a >= max(1, _MIN_VISIBLE * b) for a, b in areas], bool)
