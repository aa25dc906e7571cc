"""Polygons of masks are filled by pycocotools as the masks, and have few points."""

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest

from gnws_d2.data.formats.label import encode_mask
from gnws_d2.prediction.outlines import outline_mask


def draw(text):
    return np.array([[c == "#" for c in row] for row in text.split()], np.uint8)


MASKS = {
    "single pixel": draw("... .#. ..."),
    "whole picture": draw("## ##"),
    "one row": draw("...... .####. ......"),
    "3 pixels wide, at the border": draw("###.... ###.... ###...."),
    "diagonal pixels": draw("#.... .#... ..#.. ...#. ....#"),
    "hole": draw("..... .###. .#.#. .###. ....."),
    "hole that touches a corner": draw("####. #.##. ##.#. ####. ....#"),
    "island in a hole": draw("####### #.....# #.###.# #.#.#.# #.###.# #.....# #######"),
    "parts": draw("##..... ##...## .....## #......"),
    "hole in the second part": draw("##....... ##..##### ....#.#.# ....#####"),
    "checkers": np.indices((9, 12)).sum(0).astype(np.uint8) % 2,
}


def iou(polygons, mask):
    drawn = mask_util.frPyObjects([p.ravel().tolist() for p in polygons], *mask.shape)
    return mask_util.iou([mask_util.merge(drawn)], [encode_mask(mask)], [0])[0, 0]


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_small_masks_are_exact(mask, one):
    polygons = outline_mask(encode_mask(mask), one)
    assert iou(polygons, mask) == 1
    assert len(polygons) == (1 if one else cv2.connectedComponents(mask)[0] - 1)
    points = np.concatenate(polygons)
    assert [*points.min(0), *np.ptp(points, 0)] == pytest.approx(cv2.boundingRect(mask))


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_random_masks_are_the_same(seed, one):
    rng = np.random.default_rng(seed)
    noise, line = rng.random((seed + 1, 2 * seed + 1)), np.zeros((30, 40), np.uint8)
    cv2.line(line, *rng.integers(0, 30, (2, 2)).tolist(), 1, int(rng.integers(1, 4)))
    blobs = cv2.GaussianBlur(rng.random((90, 120)), (0, 0), rng.uniform(0.5, 9))
    for mask in (noise > rng.random(), line, blobs > np.median(blobs)):
        if mask.any():
            mask = mask.astype(np.uint8)
            polygons = outline_mask(encode_mask(mask), one)
            assert iou(polygons, mask) > 0.98
            # Also as YOLO rounds them.
            size = np.array(mask.shape[::-1])
            assert iou([(p / size).round(6) * size for p in polygons], mask) > 0.98
            points = np.concatenate(polygons)
            box = np.array([[*points.min(0), *np.ptp(points, 0)]])
            box0 = np.array([cv2.boundingRect(mask)], float)
            assert mask_util.iou(box, box0, [0]) > 0.98


@pytest.mark.parametrize("radius", [5, 10, 20, 100, 300])
def test_outlines_have_few_points_to_correct(radius):
    mask = np.zeros((700, 800), np.uint8)
    cv2.ellipse(mask, (400, 320), (radius, radius // 2), 30, 0, 360, 1, -1)
    (polygon,) = outline_mask(encode_mask(mask))
    assert iou([polygon], mask) > 0.98
    assert len(polygon) <= 32


def test_a_rectangle_has_four_points():
    mask = np.zeros((30, 40), np.uint8)
    mask[5:25, 10:13] = 1
    (polygon,) = outline_mask(encode_mask(mask))
    assert sorted(polygon.tolist()) == [[10, 5], [10, 25], [13, 5], [13, 25]]


def test_a_small_hole_and_a_speckle_are_left_out_where_they_do_not_matter():
    mask = np.zeros((300, 300), np.uint8)
    mask[50:250, 50:250] = 1
    mask[100, 100] = 0
    mask[10, 10] = 1
    polygons = outline_mask(encode_mask(mask))
    assert len(polygons) <= 2 and iou(polygons, mask) > 0.98


def test_an_empty_mask_has_no_outline():
    assert outline_mask(encode_mask(np.zeros((5, 6), np.uint8))) == []
