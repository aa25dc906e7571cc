"""Draw objects with Detectron2's visualizer."""

from typing import Any

import numpy as np

from ..utils.label_visualizer import LabelVisualizer

_WIDTH = 480  # pixels of the picture
_FONT_SIZE = 11  # points of the labels of large objects; Detectron2 shrinks those of small ones


def draw_objects(
    image: np.ndarray, objects: list[dict[str, Any]], labels: list[str], colors: list, masks: bool
) -> np.ndarray:
    """
    Draw the boxes of annotations or results in COCO's format, and their masks if `masks`.

    Args:
        image: (H, W, 3), uint8, RGB.
        labels, colors: one for each object; colors are matplotlib's.

    Returns:
        (H', 480, 3), uint8, RGB.
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
