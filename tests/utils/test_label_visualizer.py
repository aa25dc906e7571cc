import numpy as np
import pytest
from detectron2.utils.visualizer import Visualizer

from gnws_d2.utils.label_visualizer import LabelVisualizer

BOXES = [[100, 100, 220, 160], [102, 99, 221, 161], [104, 98, 219, 162], [250, 5, 318, 238]]
BOXES += [[-9, 200, 30, 239], [300, 200, 320, 240]]
LABELS = ["fig 90%", "date 80%", "hazelnut 70%", "fig 60%", "date 55%", "hazelnut 51%"]


def drawn_labels(visualizer_class, scale):
    image = np.full((240, 320, 3), 128, np.uint8)
    output = visualizer_class(image, scale=scale).overlay_instances(
        boxes=np.array(BOXES, float), labels=LABELS, assigned_colors=["b", "r", "k", "g", "b", "k"]
    )
    height, width = output.get_image().shape[:2]
    texts = output.ax.texts
    extents = [text.get_window_extent(output.canvas.get_renderer()) for text in texts]
    pairs = [(a, b) for i, a in enumerate(extents) for b in extents[:i] if a.overlaps(b)]
    outside = [
        e for e in extents if not (0 <= e.x0 and e.x1 <= width and 0 <= e.y0 and e.y1 <= height)
    ]
    return texts, pairs, outside


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_labels_are_light_apart_and_inside(scale):
    texts, pairs, outside = drawn_labels(Visualizer, scale)
    assert pairs and outside  # there is something to do
    texts, pairs, outside = drawn_labels(LabelVisualizer, scale)
    assert sorted(text.get_text() for text in texts) == sorted(LABELS)
    assert not pairs and not outside
    # Of Rec. 709, on black.
    assert min(np.dot(text.get_color(), [0.2126, 0.7152, 0.0722]) for text in texts) > 0.5


def test_labels_that_find_no_room_near_stay_where_they_are():
    image = np.zeros((40, 320, 3), np.uint8)
    boxes = np.array([[10, 10, 200, 30]] * 9, float)
    output = LabelVisualizer(image).overlay_instances(boxes=boxes, labels=["date 90%"] * 9)
    assert len(output.ax.texts) == 9 and {t.get_position()[0] for t in output.ax.texts} == {10}
