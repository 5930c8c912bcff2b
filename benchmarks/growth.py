"""Tables and a picture of time and memory against the number of inner steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from rich.table import Table

from fewstep.report.figure import new_figure, save_figure


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Return a table with a line for each way and columns for each number of steps."""
    table = Table("way", title=title)
    lines: dict[str, list[str]] = {row["way"]: [row["way"]] for row in rows}
    for k in dict.fromkeys(row["steps"] for row in rows):
        for column in (f"{k} steps: s", "min-max", "x", "MiB (of files)", "share"):
            table.add_column(column, justify="right")
        here = {row["way"]: row for row in rows if row["steps"] == k}
        for way, line in lines.items():
            row = here.get(way)
            if row is None or "failed" in row:
                line += ["-" if row is None else "failed", "", "", "", ""]
            else:
                s = row["seconds"]
                line += [
                    f"{row['median_s']:.4f}", f"{min(s):.4f}-{max(s):.4f}", f"{row['ratio']:.2f}",
                    f"{row['mib']:.0f} ({row['mib_of_files']:.0f})",
                    f"{row['share_of_a_large_product']:.0%}",
                ]  # fmt: skip
    for line in lines.values():
        table.add_row(*line)
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against the number of steps, for each case, in the second order."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = new_figure(3.2 * len(cases) + 2.6, 6)
    axes = figure.subplots(2, len(cases), squeeze=False, sharex=True)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for column, case in enumerate(cases):
        for (key, label), ax in zip(
            (("median_s", "seconds"), ("mib", "MiB")), axes[:, column], strict=True
        ):
            for i, way in enumerate(ways):
                points = [
                    (row["steps"], row[key])
                    for row in rows
                    if (row["case"], row["way"], row["order"]) == (case, way, 2) and key in row
                ]
                if points:
                    ours = way.startswith("fewstep")
                    ax.plot(
                        *zip(*points, strict=True), "o-" if ours else "s--", ms=4, label=way,
                        color=colours[2 * i % 20 + i // 10],
                    )  # fmt: skip
            ax.set(xscale="log", yscale="log", ylabel=label if column == 0 else None)
            ax.set_xticks(steps := sorted({row["steps"] for row in rows}), map(str, steps))
            ax.minorticks_off()
        axes[0, column].set_title(case)
        axes[1, column].set_xlabel("inner steps")
    handles = {
        text: handle
        for ax in axes.flat
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    save_figure(figure, path)
