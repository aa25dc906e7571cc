"""Detectron2's visualizer with readable labels."""

import numpy as np
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib.colors import to_rgb

_MAX_MOVES = 6  # label heights; further away a label would seem to be another object's
_GAP = 2  # pixels between labels


class LabelVisualizer(Visualizer):
    """A :class:`Visualizer` that arranges its labels by :func:`arrange_labels`."""

    def overlay_instances(self, **kwargs) -> VisImage:
        return arrange_labels(super().overlay_instances(**kwargs))


def arrange_labels(output: VisImage) -> VisImage:
    """
    Lighten the labels of a picture, and move them inside it and apart, if there is room nearby.
    Detectron2 writes the labels of boxes that agree over one another.

    Args:
        output: the picture of a :class:`Visualizer` or :class:`VideoVisualizer`. It is modified.
    """
    width, height = output.canvas.get_width_height()
    taken: list = []
    for label in output.ax.texts:
        # Half white: on Detectron2's black, pure blue or red is hard to read.
        label.set_color((1 + np.asarray(to_rgb(label.get_color()))) / 2)
        box = label.get_window_extent(output.canvas.get_renderer()).padded(_GAP)
        x = min(max(0, -box.x0), width - box.x1)
        y = min(max(0, -box.y0), height - box.y1)
        steps = (sign * n * box.height for n in range(_MAX_MOVES) for sign in (-1, 1))
        places = [box.translated(x, y + step) for step in steps]
        inside = (place for place in places if 0 <= place.y0 and place.y1 <= height)
        free = (place for place in inside if not any(map(place.overlaps, taken)))
        taken.append(next(free, places[0]))
        pixels = output.ax.transData.transform(label.get_position()) + taken[-1].min - box.min
        label.set_position(output.ax.transData.inverted().transform(pixels))
    return output
