"""Detectron2's pictures, with labels that can be read."""

from typing import Any

import numpy as np
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib.colors import to_rgb
from matplotlib.transforms import Bbox

_MAX_MOVES = 6  # in heights of the label; one further away would seem to be another object's
_GAP = 2  # pixels between labels


class LabelVisualizer(Visualizer):
    """
    :class:`Visualizer` whose labels are light, inside the picture, and not on top of each other
    where there is room beside: Detectron2 writes those of two boxes that agree over one another.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """
        Args:
            args, kwargs: see :class:`Visualizer`.
        """
        super().__init__(*args, **kwargs)
        self._labels: list[Bbox] = []  # of those drawn, in pixels

    def draw_text(
        self, text: str, position: tuple[float, float], *, color: Any = "g", **kwargs: Any
    ) -> VisImage:
        """See :class:`Visualizer`."""
        # Half of it white: on Detectron2's black, a pure blue or red can hardly be read.
        color = (1 + np.asarray(to_rgb(color))) / 2
        output = super().draw_text(text, position, color=color, **kwargs)
        label = output.ax.texts[-1]
        box = label.get_window_extent(output.canvas.get_renderer()).padded(_GAP)
        width, height = output.canvas.get_width_height()
        x = min(max(0, -box.x0), width - box.x1)
        y = min(max(0, -box.y0), height - box.y1)
        moves = [(x, y + sign * n * box.height) for n in range(_MAX_MOVES) for sign in (-1, 1)]
        free = (
            move
            for move in moves
            if 0 <= box.y0 + move[1] and box.y1 + move[1] <= height
            if not any(box.translated(*move).overlaps(other) for other in self._labels)
        )
        move = next(free, moves[0])
        to_pixels = output.ax.transData
        label.set_position(to_pixels.inverted().transform(to_pixels.transform(position) + move))
        self._labels.append(box.translated(*move))
        return output
