"""Tables and pictures of time and memory: against inner steps, tasks and the side of an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from rich.table import Table

from fewstep.report.figure import new_figure, save_figure


def table_of(rows: list[dict[str, Any]], title: str, by: str = "steps") -> Table:
    """Return a table with a line for each way and columns for each value of the rows' key `by`."""
    table = Table("way", title=title)
    lines: dict[str, list[str]] = {row["way"]: [row["way"]] for row in rows}
    for k in dict.fromkeys(row[by] for row in rows):
        for column in (f"{k} {by}: s", "min-max", "x", "share"):
            table.add_column(column, justify="right")
        here = {row["way"]: row for row in rows if row[by] == k}
        for way, line in lines.items():
            row = here.get(way)
            if row is None or "failed" in row:
                line += ["-" if row is None else "failed", "", "", ""]
            else:
                s = row["seconds"]
                line += [
                    f"{row['median_s']:.4f}", f"{min(s):.4f}-{max(s):.4f}", f"{row['ratio']:.2f}",
                    f"{row['share_of_a_large_product']:.0%}",
                ]  # fmt: skip
    for line in lines.values():
        table.add_row(*line)
    return table


@dataclass(frozen=True)
class Panel:
    """A column of the picture: rows of one order, and what they are drawn against."""

    title: str
    rows: list[dict[str, Any]]
    by: str
    """Key of the rows."""
    label: str


def plot(panels: list[Panel], key: str, unit: str, path: Path) -> None:
    """Draw the panels side by side, a line for each way.

    Args:
        panels: What is drawn against what.
        key: What is drawn, a key of the rows.
        unit: Its unit.
        path: The picture.
    """
    figure = new_figure(3.2 * len(panels) + 2.6, 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    ways = list(dict.fromkeys(row["way"] for panel in panels for row in panel.rows))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for panel, ax in zip(panels, axes, strict=True):
        for i, way in enumerate(ways):
            points = sorted(
                (row[panel.by], row[key]) for row in panel.rows if row["way"] == way and key in row
            )
            if points:
                ours = way.startswith("fewstep")
                ax.plot(
                    *zip(*points, strict=True), "o-" if ours else "s--", ms=4, label=way,
                    color=colours[2 * i % 20 + i // 10],
                )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel=panel.label, title=panel.title)
        ax.set_xticks(ticks := sorted({row[panel.by] for row in panel.rows}), map(str, ticks))
        ax.minorticks_off()
    axes[0].set_ylabel(unit)
    handles = {
        text: handle
        for ax in axes
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    save_figure(figure, path)
