"""Outlines of masks: polygons that people can edit, and that give the mask again."""

from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

_TOLERANCES = (2.0, 1.0, 0.0)  # pixels that an outline may be off, so that it has fewer points
_MIN_IOU = 0.985  # of the mask and its outline


def outline_mask(rle: dict[str, Any], one: bool = False) -> list[np.ndarray]:
    """
    Return polygons, (N, 2), in pixels from the corner of the picture, that pycocotools fills as the
    mask, with an IoU above 0.98. Cuts, which lead there and back, join a polygon to its holes.

    Args:
        rle: the mask, as pycocotools encodes it.
        one: join all parts by cuts, too, as Ultralytics does. Otherwise there is one polygon for
            each part.
    """
    x, y, width, height = map(int, mask_util.toBbox(rle))
    mask = mask_util.decode(rle)[y : y + height, x : x + width].repeat(2, 0).repeat(2, 1)
    found, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # OpenCV goes through the centers of pixels: of two in each direction, to their common corners.
    contours = [(contour[:, 0] + 1) // 2 + np.array([x, y], np.int32) for contour in found]
    for tolerance in _TOLERANCES:
        parts: dict[int, list[np.ndarray]] = {}
        for number, contour in enumerate(contours):
            parent = tree[0, number, 3]
            simple = cv2.approxPolyDP(contour, tolerance, True)[:, 0]
            if len(simple) > 2:
                parts.setdefault(0 if one else number if parent < 0 else parent, []).append(simple)
        polygons = [_join(part) for part in parts.values()]
        if polygons and _iou(polygons, rle) > _MIN_IOU:
            break
    return polygons


def _join(contours: list[np.ndarray]) -> np.ndarray:
    """Join contours by cuts between their nearest points."""
    joined = contours[0]
    for other in contours[1:]:
        distances = ((joined[:, None] - other) ** 2).sum(2)
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        joined = np.concatenate([joined[: i + 1], other[j:], other[: j + 1], joined[i:]])
    return joined


def _iou(polygons: list[np.ndarray], rle: dict[str, Any]) -> float:
    drawn = mask_util.frPyObjects([p.ravel().tolist() for p in polygons], *rle["size"])
    return mask_util.iou([mask_util.merge(drawn)], [rle], [0])[0, 0]
