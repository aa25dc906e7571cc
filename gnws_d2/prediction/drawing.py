"""Detectron2's visualizer with labels that can be read where objects are crowded."""

import colorsys
import math
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import Instances
from detectron2.utils.visualizer import VisImage, Visualizer, _create_text_labels
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

_MAX_MOVES = 6  # label heights; further away a label would seem to belong to another object
_GAP = 2  # pixels between labels
_CROWD = 20  # objects; with more, outlines and labels get smaller, down to half
_WIDTH = 480  # pixels of a picture of `draw_objects`
_FONT_SIZE = 11  # points of the labels of its large objects; Detectron2 shrinks those of small ones
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def class_color(index: int) -> tuple[float, float, float]:
    """Return a bright RGB color, 0 to 1, for a class, far from the colors of earlier classes."""
    return colorsys.hsv_to_rgb((0.58 + index * _GOLDEN_RATIO) % 1, 0.75, 1.0)


class LabelVisualizer(Visualizer):
    """:class:`Visualizer` with a color for each class and :func:`arrange_labels`."""

    def draw_instance_predictions(self, predictions: Instances) -> VisImage:
        """See :class:`Visualizer`; `predictions` are on the CPU."""
        masks = None
        if predictions.has("pred_masks"):
            masks = predictions.pred_masks.numpy().view(np.uint8)
            masks = [mask_util.encode(np.asfortranarray(mask)) for mask in masks]
        classes, names = predictions.pred_classes.tolist(), self.metadata.get("thing_classes")
        return self.overlay_instances(
            boxes=predictions.pred_boxes,
            # As RLE, for Detectron2 takes an array with two columns for a polygon.
            masks=masks,
            labels=_create_text_labels(classes, predictions.scores, names),
            assigned_colors=[class_color(c) for c in classes],
            alpha=0.35,
        )

    def overlay_instances(self, **kwargs: Any) -> VisImage:
        """See :class:`Visualizer`. Labels without room are left out."""
        sizes = [len(kwargs[k]) for k in ("boxes", "masks") if kwargs.get(k) is not None]
        self._default_font_size *= min(1, max(0.5, math.sqrt(_CROWD / max(1, *sizes))))
        if (masks := kwargs.pop("masks", None)) is not None:
            self._draw_masks(masks, kwargs["assigned_colors"], kwargs["alpha"])
        return arrange_labels(super().overlay_instances(**kwargs))

    def _draw_masks(self, masks: Any, colors: list, alpha: float) -> None:
        """Draw masks at once, the largest first: an untrained model's have thousands of parts."""
        masks = zip(self._convert_masks(masks), map(to_rgb, colors))
        masks = sorted(masks, key=lambda mask: mask[0].area(), reverse=True)
        parts = [(part.reshape(-1, 2), color) for mask, color in masks for part in mask.polygons]
        polygons = PolyCollection(
            [part for part, _ in parts],
            facecolors=[(*color, alpha) for _, color in parts],
            edgecolors=[color for _, color in parts],
            linewidths=max(self._default_font_size // 15 * self.output.scale, 1),
        )
        self.output.ax.add_collection(polygons, autolim=False)


def arrange_labels(output: VisImage) -> VisImage:
    """
    Lighten the labels of a picture of a :class:`Visualizer`, and move them inside it and apart, in
    place. Leave out those without room nearby: Detectron2 writes the labels of overlapping boxes
    over each other.
    """
    width, height = output.canvas.get_width_height()
    taken: list = []
    for label in list(output.ax.texts):
        label.set_parse_math(False)  # a class may be called US$
        # Half white: on Detectron2's black, pure blue or red is hard to read.
        label.set_color((1 + np.asarray(to_rgb(label.get_color()))) / 2)
        box = label.get_window_extent(output.canvas.get_renderer()).padded(_GAP)
        x = min(max(0, -box.x0), width - box.x1)
        y = min(max(0, -box.y0), height - box.y1)
        steps = (sign * n * box.height for n in range(_MAX_MOVES) for sign in (-1, 1))
        places = [box.translated(x, y + step) for step in steps]
        inside = (place for place in places if 0 <= place.y0 and place.y1 <= height)
        free = next((p for p in inside if not any(map(p.overlaps, taken))), None)
        if free is None:
            label.remove()
            continue
        taken.append(free)
        pixels = output.ax.transData.transform(label.get_position()) + free.min - box.min
        label.set_position(output.ax.transData.inverted().transform(pixels))
    return output


def draw_objects(
    image: np.ndarray, objects: list[dict[str, Any]], labels: list[str], colors: list, masks: bool
) -> np.ndarray:
    """
    Draw the boxes of annotations or results in COCO format, and their masks if `masks`, on an
    image, (H, W, 3), uint8, RGB. Return (H', 480, 3), uint8, RGB. There is one of `labels` and of
    `colors`, which are matplotlib's, for each object.
    """
    boxes = np.array([o["bbox"] for o in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    visualizer = LabelVisualizer(image, scale=_WIDTH / image.shape[1])
    visualizer._default_font_size = _FONT_SIZE / visualizer.output.scale
    return visualizer.overlay_instances(
        boxes=boxes,
        masks=[o["segmentation"] for o in objects] if masks else None,
        labels=labels,
        assigned_colors=colors,
        alpha=0.35,
    ).get_image()
