"""Charts for a page that is light or dark, as its reader likes."""

import base64
import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# By the value of CSS's prefers-color-scheme. The colours of a scheme differ also for the colour
# blind, and are as dark or light as text is.
_SCHEMES = {
    "light": [
        "#3f4753",
        "#d5dae1",
        "#1d5fc4",
        "#c4570c",
        "#15803d",
        "#8b3fc7",
        "#b0256b",
        "#64748b",
    ],
    "dark": [
        "#b6bfca",
        "#343c47",
        "#6ea8fe",
        "#f59e4c",
        "#4ecb85",
        "#c792f0",
        "#f075ac",
        "#94a3b8",
    ],
}  # text, lines, curves
_SIZE = (5.2, 3.3)  # inches of 72 CSS pixels: a column of a page, or a phone

Chart = dict[str, str]  # data URIs of SVG, by scheme
Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]  # x and y
Series = dict[str, Curve]  # by name


def line_chart(
    series: Series, x_label: str, y_label: str, y_max: float | None = None, points: bool = False
) -> Chart:
    """
    Args:
        series: the lines. NaN leaves a gap.
        x_label, y_label: of the axes.
        y_max: where the y axis ends; it starts at 0.
        points: whether to mark the points of the lines.
    """

    def plot(ax: Axes) -> None:
        for name, (x, y) in series.items():
            ax.plot(x, y, label=name, marker="o" if points else None, markersize=4)
        ax.set(xlabel=x_label, ylabel=y_label, ylim=(0, y_max))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.7g}"))
        ax.margins(x=0.02)

    return _draw(plot, _SIZE)


def bar_chart(values: dict[str, dict[str, float]], x_label: str) -> Chart:
    """
    Args:
        values: of each series by its name, by the name of the bar.
        x_label: what they are.
    """
    names = list(next(iter(values.values())))
    height = 0.8 / len(values)

    def plot(ax: Axes) -> None:
        for i, (series, bars) in enumerate(values.items()):
            drawn = ax.barh(
                np.arange(len(names)) + (i - (len(values) - 1) / 2) * height,
                [bars[name] for name in names],
                0.9 * height,
                label=series,
            )
            ax.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
        ax.set(xlabel=x_label, yticks=range(len(names)), yticklabels=names)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.margins(x=0.12)

    return _draw(plot, (_SIZE[0], 0.9 + len(names) * (0.18 + 0.17 * len(values))))


def _draw(plot: Callable[[Axes], None], size: tuple[float, float]) -> Chart:
    chart = {}
    for name, (text, line, *colors) in _SCHEMES.items():
        with matplotlib.rc_context({
            "svg.fonttype": "none",  # the reader's own font
            "svg.hashsalt": "gnws_d2",  # the same chart is the same file
            "font.family": ["DejaVu Sans", "sans-serif"],
            "font.size": 10,
            "text.color": text,
            "axes.labelcolor": text,
            "axes.edgecolor": line,
            "axes.facecolor": "none",
            "axes.prop_cycle": cycler(color=colors),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": line,
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.7,
            "xtick.color": line,
            "ytick.color": line,
            "xtick.labelcolor": text,
            "ytick.labelcolor": text,
        }):  # fmt: skip
            fig = Figure(figsize=size, layout="constrained")
            ax = fig.subplots()
            plot(ax)
            handles, labels = ax.get_legend_handles_labels()
            if len(handles) > 1:
                fig.legend(
                    handles,
                    labels,
                    loc="outside upper left",
                    ncols=min(3, max(1, 54 // (max(map(len, labels)) + 6))),  # as fit in the width
                    frameon=False,
                    fontsize=9,
                )
            svg = io.BytesIO()
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            fig.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
        chart[name] = data_uri("image/svg+xml", svg.getvalue())
    return chart


def data_uri(mime_type: str, data: bytes) -> str:
    """
    Returns:
        The address of `data` itself, for an HTML page that is one file.
    """
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"
