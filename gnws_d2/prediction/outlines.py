"""Outlines of masks: polygons that people can edit, and that give the mask again."""

from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

_TOLERANCES = (2.0, 1.5, 1.0, 0.7, 0.5, 0.4, 0.0)  # pixels that leaving out points may cost
_MIN_IOU = 0.985  # of a mask and its outline, and of their boxes


def outline_mask(rle: dict[str, Any], one: bool = False) -> list[np.ndarray]:
    """
    Return polygons, (N, 2), in pixels from the corner of the picture, that pycocotools fills as the
    mask `rle`, with an IoU above 0.98. Cuts, which lead there and back, join a polygon to its
    holes, and with `one` all parts, as Ultralytics does; otherwise each part is a polygon.
    """
    x, y, width, height = map(int, mask_util.toBbox(rle))
    mask = mask_util.decode(rle)[y : y + height, x : x + width].repeat(2, 0).repeat(2, 1)
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # OpenCV goes through the centers of pixels: of two in each direction, to their common corners.
    corners = [((c[:, 0] + 1) // 2 + [x, y]).astype(np.float32) for c in contours]
    corners = [c[(c != np.roll(c, 1, 0)).any(1)] for c in corners]
    # Near the middles of sides there are no steps. pycocotools rounds to 0.2, and 0.5 either way.
    sides = [0.6 * c + 0.4 * np.roll(c, 1, 0) for c in corners]
    found = [f for lines in (corners, sides) if (f := _simplify(lines, tree, rle, one))]
    return min(found, key=lambda polygons: sum(map(len, polygons)), default=[])


def _simplify(
    lines: list[np.ndarray], tree: np.ndarray, rle: dict[str, Any], one: bool
) -> list[np.ndarray]:
    """Return the polygons of contours, with as few points as give the mask, or none."""
    for tolerance in _TOLERANCES:
        parts: dict[int, list[np.ndarray]] = {}
        for number, line in enumerate(lines):
            parent = tree[0, number, 3]
            simple = cv2.approxPolyDP(line, tolerance, True)[:, 0].astype(float).round(1)
            if len(simple) > 2:
                parts.setdefault(0 if one else number if parent < 0 else parent, []).append(simple)
        polygons = [_join(part) for part in parts.values()]
        if polygons and _is_same(polygons, rle):
            return polygons
    return []


def _join(contours: list[np.ndarray]) -> np.ndarray:
    """Join contours by cuts between their nearest points."""
    joined = contours[0]
    for other in contours[1:]:
        distances = ((joined[:, None] - other) ** 2).sum(2)
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        joined = np.concatenate([joined[: i + 1], other[j:], other[: j + 1], joined[i:]])
    return joined


def _is_same(polygons: list[np.ndarray], rle: dict[str, Any]) -> bool:
    drawn = mask_util.frPyObjects([p.ravel().tolist() for p in polygons], *rle["size"])
    points = np.concatenate(polygons)
    box = np.concatenate([points.min(0), np.ptp(points, 0)])[None]
    boxes = mask_util.iou(box, mask_util.toBbox(rle)[None], [0])
    return min(boxes, mask_util.iou([mask_util.merge(drawn)], [rle], [0])) > _MIN_IOU
