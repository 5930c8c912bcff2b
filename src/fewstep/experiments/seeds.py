"""What several seeds gave on the same test tasks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fewstep.core.scores import mean_and_ci95


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


def rounded(seconds: float | None) -> str:
    """Return whole seconds for a table."""
    return "-" if seconds is None else f"{seconds:.0f}"
