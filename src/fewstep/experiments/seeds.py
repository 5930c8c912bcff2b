"""What several seeds gave on the same test tasks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from fewstep.core.scores import mean_and_ci95
from fewstep.training.display import say

Settings = TypeVar("Settings")
Told = TypeVar("Told")
_PARTS = ("mean", "ci95", "std_over_seeds")


def folder_name(row: str) -> str:
    """Return the name of a row as a part of paths."""
    return row.lower().replace(", ", "-").replace(" ", "-")


def seed_folder(out: Path, row: str, seed: int) -> Path:
    """Return the folder of a row's run."""
    return out / f"{folder_name(row)}-seed{seed}"


def earlier_rows(
    rows: Mapping[str, Mapping[Path, Settings]],
    told_by: Callable[[Path, Settings], Told | None],
    console: Console,
) -> dict[str, list[Told]]:
    """Return what earlier calls have left of rows that this one does not ask for.

    Args:
        rows: Folder and settings of each seed's run, by the name of the row.
        told_by: Returns what a run with these settings has told in the end; None if there is none.
        console: Where to say which rows are left out of the table.
    """
    found = {}
    for name, runs in rows.items():
        told = [told_by(path, settings) for path, settings in runs.items()]
        whole = [each for each in told if each is not None]
        if len(whole) == len(told):
            found[name] = whole
        elif any(path.exists() for path in runs):
            say(console, f"left out of the table: {name}, not finished or of other settings")
    return found


def over_seeds(scores: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Return the mean, its 95% interval, the mean of each seed, and their deviation if several.

    The interval is over the tasks, of their means over the seeds: all seeds are tested on the same
    tasks, which are no more than those of one.

    Args:
        scores: Of each seed, in the same order of tasks.
    """
    by_seed = torch.tensor(list(scores), dtype=torch.float64)
    mean, ci95 = mean_and_ci95(by_seed.mean(0))
    means = by_seed.mean(1)
    found = {"mean": float(mean), "ci95": float(ci95), "seeds": means.tolist()}
    return found | ({"std_over_seeds": float(means.std())} if len(means) > 1 else {})


def mean_seconds(runs: Iterable[Sequence[Mapping[str, Any]]]) -> float | None:
    """Return the mean time of training, or None where the metrics that told it are gone.

    Args:
        runs: What the tests of each run wrote.
    """
    seconds = [tests[0]["training_seconds"] for tests in runs]
    return None if None in seconds else statistics.mean(seconds)


def spread(seeds: int) -> str:
    """Return what a table says of the numbers in brackets, where there are several seeds."""
    return " (standard deviation over the seeds)" * (seeds > 1)


def cell(value: Mapping[str, Any], mean: str = ".2f", others: str = ".2f") -> str:
    """Return what `over_seeds` found for a table: mean, interval and, of several, deviation.

    Args:
        value: What it found.
        mean: How to write the mean.
        others: How to write interval and deviation.
    """
    text = f"{value['mean']:{mean}} ± {value['ci95']:{others}}"
    if "std_over_seeds" in value:
        text += f" ({value['std_over_seeds']:{others}})"
    return text


def percent(value: Mapping[str, Any]) -> str:
    """Return an accuracy in % for a table."""
    return cell({key: 100 * v for key, v in value.items() if key in _PARTS})


def rounded(seconds: float | None) -> str:
    """Return whole seconds for a table."""
    return "-" if seconds is None else f"{seconds:.0f}"
