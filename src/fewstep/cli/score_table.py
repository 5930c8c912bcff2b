"""The table of scores after each inner step."""

from __future__ import annotations

from rich.table import Table

from fewstep.core.scores import Scores


def score_table(scores: Scores) -> Table:
    """Return a row for each number of inner steps."""
    table = Table(title=f"{scores.num_tasks} tasks, mean ± 95% interval")
    table.add_column("inner steps", justify="right")
    table.add_column(scores.metric_name, justify="right")
    in_percent = scores.metric_name == "accuracy"
    for step, mean, ci in zip(scores.after, scores.curve, scores.curve_ci95, strict=True):
        value = f"{100 * mean:.2f}% ± {100 * ci:.2f}" if in_percent else f"{mean:.4f} ± {ci:.4f}"
        table.add_row(str(step), value)
    return table
