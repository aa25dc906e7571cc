"""Line charts as inline SVG, for light and dark pages."""

import io
import re
from collections.abc import Mapping

import numpy as np
from cycler import cycler
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike

# Each has a contrast of at least 3:1 (WCAG 2.1, 1.4.11) with both backgrounds of report.html.
# Black text gets no fill in matplotlib's SVG, so CSS can give it the color of the page's text.
COLORS = ("#2f80ed", "#d97706", "#13a06a", "#a855f7", "#db2777", "#7a8699")
_LINE = "#8a93a0"  # axes and grid
_SIZE = (5.2, 3.3)  # inches of 72 CSS pixels: a column of the page, or a phone
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gnws_d2",  # the same chart has the same ids
    "text.parse_math": False,
    # Dashes, because colors alone are not enough for the color-blind.
    "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=["-"] * 3 + ["--"] * 3),
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.alpha": 0.35,
    "xtick.color": _LINE,
    "xtick.labelcolor": "black",
    "ytick.color": _LINE,
    "ytick.labelcolor": "black",
}

Curves = Mapping[str, tuple[ArrayLike, ArrayLike]]


def line_chart(curves: Curves, x_label: str, y_label: str, y_max: float | None = None) -> str:
    """Draw x and y of each line by name, NaN for gaps, from y = 0 on, as an ``<svg>`` element."""
    with style.context(_STYLE):
        figure = Figure(_SIZE, layout="constrained")
        ax = figure.subplots()
        for name, (x, y) in curves.items():
            ax.plot(x, y, label=name, marker="o" if np.size(x) < 30 else "", markersize=4)
        ax.set(xlabel=x_label, ylabel=y_label, ylim=(0, y_max), xmargin=0.02)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.7g}"))
        if len(curves) > 1:
            columns = min(3, max(1, 54 // (max(map(len, curves)) + 6)))  # as many as fit the width
            figure.legend(loc="outside upper left", ncols=columns, fontsize=9, frameon=False)
        svg = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    text = svg.getvalue()
    # These ids count elements, and would repeat in a page with several charts.
    return re.sub(r' id="[\w.]+_\d+"', "", text[text.index("<svg") :])
