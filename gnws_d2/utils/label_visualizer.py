"""Detectron2's pictures, with labels that can be read."""

import numpy as np
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib.colors import to_rgb
from matplotlib.transforms import Bbox

_MAX_MOVES = 6  # in heights of the label; one further away would seem to be another object's
_GAP = 2  # pixels between labels


class LabelVisualizer(Visualizer):
    """:class:`Visualizer` whose labels are arranged by :func:`arrange_labels`."""

    def overlay_instances(self, **kwargs) -> VisImage:
        """See :class:`Visualizer`."""
        return arrange_labels(super().overlay_instances(**kwargs))


def arrange_labels(output: VisImage) -> VisImage:
    """
    Make the labels of a picture light, move them inside it, and apart where there is room beside:
    Detectron2 writes those of two boxes that agree over one another.

    Args:
        output: of a :class:`Visualizer` or a :class:`VideoVisualizer`. It is changed.
    """
    width, height = output.canvas.get_width_height()
    to_pixels = output.ax.transData
    taken: list[Bbox] = []
    for label in output.ax.texts:
        # Half of it white: on Detectron2's black, a pure blue or red can hardly be read.
        label.set_color((1 + np.asarray(to_rgb(label.get_color()))) / 2)
        box = label.get_window_extent(output.canvas.get_renderer()).padded(_GAP)
        x = min(max(0, -box.x0), width - box.x1)
        y = min(max(0, -box.y0), height - box.y1)
        moves = [(x, y + sign * n * box.height) for n in range(_MAX_MOVES) for sign in (-1, 1)]
        free = (
            move
            for move in moves
            if 0 <= box.y0 + move[1] and box.y1 + move[1] <= height
            if not any(box.translated(*move).overlaps(other) for other in taken)
        )
        move = next(free, moves[0])
        position = to_pixels.transform(label.get_position()) + move
        label.set_position(to_pixels.inverted().transform(position))
        taken.append(box.translated(*move))
    return output
