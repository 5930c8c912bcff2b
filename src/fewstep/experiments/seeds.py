"""What several seeds gave on the same test tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def over_seeds(scores: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Return the mean, its 95% interval, the mean of each seed, and their deviation if several.

    mean ± 1.96 s / sqrt(tasks), s the deviation over the tasks of their means over the seeds: all
    seeds are tested on the same tasks, which are no more than those of one.

    Args:
        scores: Of each seed, in the same order of tasks.
    """
    by_seed = np.array(list(scores), dtype=float)
    of_tasks, means = by_seed.mean(0), by_seed.mean(1)
    found = {
        "mean": float(of_tasks.mean()),
        "ci95": float(1.96 * of_tasks.std(ddof=1) / len(of_tasks) ** 0.5),
        "seeds": means.tolist(),
    }
    return found | ({"std_over_seeds": float(means.std(ddof=1))} if len(means) > 1 else {})
