import numpy as np
import pytest

from gnws_d2.report.visualizer import draw_objects

BLUE, RED = (0, 0, 1), (1, 0, 0)


def drawn(objects, colors, masks=False):
    image = np.full((60, 120, 3), 128, np.uint8)
    return draw_objects(image, objects, [""] * len(objects), colors, masks).astype(int)


def test_boxes_are_drawn_where_they_are():
    picture = drawn([{"bbox": [30, 15, 60, 30]}], [BLUE])
    assert picture.shape == (240, 480, 3)
    ys, xs = np.nonzero(picture[:, :, 2] > picture[:, :, 0] + 20)
    assert [xs.min(), ys.min(), xs.max(), ys.max()] == pytest.approx([120, 60, 360, 180], abs=8)
    assert (picture[100:140, 200:280] == 128).all()


def test_masks_are_drawn_if_asked_for():
    square = {"bbox": [30, 15, 60, 30], "segmentation": [[30, 15, 90, 15, 90, 45, 30, 45]]}
    picture = drawn([square], [RED], masks=True)
    inside = picture[100:140, 200:280]
    assert (inside[:, :, 0] > inside[:, :, 2] + 20).all()
    picture = drawn([square], [RED])
    assert (picture[100:140, 200:280] == 128).all()


def test_an_image_without_objects_stays_as_it_is():
    assert (drawn([], []) == 128).all()
