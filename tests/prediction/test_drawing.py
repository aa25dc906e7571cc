import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from gnws_d2.prediction.drawing import LabelVisualizer, class_color, draw_objects

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
    assert pairs and outside
    texts, pairs, outside = drawn_labels(LabelVisualizer, scale)
    assert sorted(text.get_text() for text in texts) == sorted(LABELS)
    assert not pairs and not outside
    # Luminance (Rec. 709) on black.
    assert min(np.dot(text.get_color(), [0.2126, 0.7152, 0.0722]) for text in texts) > 0.5


def test_labels_without_room_are_left_out():
    image = np.zeros((40, 320, 3), np.uint8)
    boxes = np.array([[10, 10, 200, 30]] * 9, float)
    output = LabelVisualizer(image).overlay_instances(boxes=boxes, labels=["date 90%"] * 9)
    assert 1 <= len(output.ax.texts) < 9


def test_outlines_and_labels_of_a_crowd_are_smaller():
    image = np.zeros((480, 640, 3), np.uint8)

    def line_width_and_font_size(n):
        x, y = np.arange(n) % 16 * 40, np.arange(n) // 16 * 40
        boxes = np.stack([x, y, x + 38, y + 38], axis=1).astype(float)
        output = LabelVisualizer(image, scale=2).overlay_instances(boxes=boxes, labels=["a"] * n)
        return output.ax.patches[0].get_linewidth(), output.ax.texts[0].get_fontsize()

    few, many = line_width_and_font_size(10), line_width_and_font_size(160)
    assert many[0] < few[0] and many[1] == pytest.approx(few[1] / 2)


def test_each_class_has_one_legible_color():
    colors = [class_color(i) for i in range(20)]
    assert len(set(colors)) == 20
    assert all(max(color) == 1 for color in colors)
    gaps = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colors[:6]) for b in colors[:i]]
    assert min(gaps) > 0.3
    masks = torch.zeros(3, 100, 100, dtype=torch.bool)
    masks[:, 20:40, 20:40] = True
    boxes = Boxes(torch.tensor([[20.0, 20, 40, 40]] * 3))
    instances = Instances((100, 100), pred_boxes=boxes, pred_masks=masks)
    instances.pred_classes = torch.tensor([0, 1, 0])
    instances.scores = torch.tensor([0.9, 0.8, 0.7])
    metadata = Metadata(thing_classes=["fig", "date"])
    image = np.zeros((100, 100, 3), np.uint8)

    ax = LabelVisualizer(image, metadata, 4).draw_instance_predictions(instances).ax
    assert {"fig 90%", "date 80%"} <= {text.get_text() for text in ax.texts}
    classes = [class_color(0), class_color(1), class_color(0)]
    assert [box.get_edgecolor()[:3] for box in ax.patches] == classes
    (outlines,) = ax.collections
    assert [tuple(color[:3]) for color in outlines.get_edgecolor()] == classes


BLUE, RED = (0, 0, 1), (1, 0, 0)


def drawn(objects, colors, masks=False):
    image = np.full((60, 120, 3), 128, np.uint8)
    return draw_objects(image, objects, [""] * len(objects), colors, masks).astype(int)


def test_boxes_are_drawn_in_place():
    picture = drawn([{"bbox": [30, 15, 60, 30]}], [BLUE])
    assert picture.shape == (240, 480, 3)
    ys, xs = np.nonzero(picture[:, :, 2] > picture[:, :, 0] + 20)
    assert [xs.min(), ys.min(), xs.max(), ys.max()] == pytest.approx([120, 60, 360, 180], abs=8)
    assert (picture[100:140, 200:280] == 128).all()


def test_masks_are_drawn_on_request():
    square = {"bbox": [30, 15, 60, 30], "segmentation": [[30, 15, 90, 15, 90, 45, 30, 45]]}
    picture = drawn([square], [RED], masks=True)
    inside = picture[100:140, 200:280]
    assert (inside[:, :, 0] > inside[:, :, 2] + 20).all()
    picture = drawn([square], [RED])
    assert (picture[100:140, 200:280] == 128).all()


def test_image_without_objects_is_unchanged():
    assert (drawn([], []) == 128).all()
