"""Pictures of objects, and of times."""

from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from matplotlib.figure import Figure

from .label_visualizer import LabelVisualizer

_FONT_SIZE = 11  # points of labels of large objects; smaller objects have down to 60% of it


def draw_objects(
    image: np.ndarray,
    objects: list[dict[str, Any]],
    labels: list[str],
    colors: list[Any],
    width: int = 480,
) -> np.ndarray:
    """
    Draw boxes, and masks if there are any, with Detectron2's visualizer.

    Args:
        image: (H, W, 3), uint8, RGB.
        objects: annotations in COCO's format or Detectron2's, or results in COCO's.
        labels, colors: of each object. Colors are matplotlib's.
        width: of the picture in pixels, in which labels fit.

    Returns:
        (H', `width`, 3), uint8, RGB.
    """
    boxes = [
        BoxMode.convert(o["bbox"], o.get("bbox_mode", BoxMode.XYWH_ABS), BoxMode.XYXY_ABS)
        for o in objects
    ]
    has_masks = all("segmentation" in o for o in objects)
    scale = width / image.shape[1]
    visualizer = LabelVisualizer(image, scale=scale)
    visualizer._default_font_size = _FONT_SIZE / scale  # Detectron2's depends on that of the image
    return visualizer.overlay_instances(
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        masks=[o["segmentation"] for o in objects] if has_masks else None,
        labels=labels,
        assigned_colors=colors,
        alpha=0.35,
    ).get_image()


def plot_bars(seconds: dict[str, list[float]], title: str, output: str) -> None:
    """
    Plot the median of some times as horizontal bars, with a line from the least to the largest.

    Args:
        seconds: the times of each bar, by its name.
        output: path of the picture to write.
    """
    names = list(seconds)
    medians = np.array([np.median(seconds[name]) for name in names])
    spread = [[min(seconds[name]), max(seconds[name])] for name in names]
    errors = np.abs(np.array(spread).T - medians)

    fig = Figure(figsize=(9, 1.2 + 0.4 * len(names)), layout="constrained")
    ax = fig.subplots()
    bars = ax.barh(names, medians, xerr=errors, color="tab:blue", ecolor="0.3", capsize=3)
    # Inside the bars, where the lines of the spread do not cross them.
    ax.bar_label(bars, [f" {m:.3g} s" for m in medians], label_type="center", color="white")
    ax.invert_yaxis()
    ax.set(xlabel="seconds, median and min - max", title=title)
    ax.grid(axis="x", alpha=0.3)
    fig.savefig(output, dpi=120)
