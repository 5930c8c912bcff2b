"""Making and writing a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from fewstep.core.files import check_name_of_file, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    from matplotlib.figure import Figure  # here: half a second that a run need not start with

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def draw_band(axes: Axes, series: Sequence[Mapping[float, float]], name: str, color: str) -> None:
    """Draw the mean of several seeds, with a band from the lowest to the highest.

    Args:
        axes: Where to draw.
        series: The value of each seed by the iteration; what some lack is left out.
        name: Of the line.
        color: Of line and band.
    """
    iterations = sorted(set.intersection(*(set(each) for each in series)))
    values = [[each[i] for each in series] for i in iterations]
    if not iterations:
        return
    axes.plot(iterations, [mean(v) for v in values], label=name, color=color)
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(iterations, low, high, alpha=0.2, linewidth=0, color=color)


def label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis 0.5, 2, 10: matplotlib has powers of ten, or 5 x 10^-1."""
    from matplotlib.ticker import LogFormatter, LogLocator

    class Plain(LogFormatter):  # which says where to put a label
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_minor_locator(LogLocator(subs=(1.5, *range(2, 10))))  # from 1 to 2 is a long way
    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def legend_below(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """Explain what is in some axes below the whole figure, a label once; in one line by default."""
    handles, labels = axes.get_legend_handles_labels()
    of_label = dict(zip(labels, handles, strict=True))
    columns = columns or len(of_label)
    figure.legend(of_label.values(), of_label.keys(), loc="outside lower center", ncols=columns)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        InputError: `path` does not end in .png, or its folder does not exist.
    """
    check_name_of_file(path, ".png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # savefig draws twice
    write_atomically(path, buffer.getvalue())
