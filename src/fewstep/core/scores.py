"""Scores of many tasks, with their interval."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How well tasks were solved after some numbers of inner steps.

    The 95% interval is mean ± 1.96 s / sqrt(tasks), s the standard deviation over the tasks.

    Args:
        metric_name: "accuracy", "loss" or the name of the metric given to the learner.
        metric: Metric of every task, (tasks, len(after)).
        loss: Query loss of every task, (tasks, len(after)).
        statistics: What normalisation layers normalised by.
        after: The numbers of steps, the last of which is the final score's.
    """

    metric_name: str
    metric: Tensor
    loss: Tensor
    statistics: str
    after: tuple[int, ...]

    @property
    def num_tasks(self) -> int:
        """How many tasks were scored."""
        return self.metric.shape[0]

    @property
    def num_steps(self) -> int:
        """Inner steps before the final score."""
        return self.after[-1]

    @property
    def mean(self) -> float:
        """Mean of the final score."""
        return self.curve[-1]

    @property
    def ci95(self) -> float:
        """Half width of the 95% interval of `mean`."""
        return self.curve_ci95[-1]

    @property
    def curve(self) -> list[float]:
        """Mean metric after each number of steps in `after`."""
        return [float(mean) for mean in self.metric.double().mean(0)]

    @property
    def curve_ci95(self) -> list[float]:
        """Half widths of the 95% intervals of `curve`."""
        return [1.96 * float(s) / self.num_tasks**0.5 for s in self.metric.double().std(0)]

    @property
    def rank(self) -> float:
        """The mean, turned so that more is better: a loss is better low, other metrics high."""
        return -self.mean if self.metric_name == "loss" else self.mean

    def as_dict(self) -> dict[str, object]:
        """Return the summary as plain values, for a JSON file."""
        return {
            "metric": self.metric_name,
            "mean": self.mean,
            "ci95": self.ci95,
            "num_tasks": self.num_tasks,
            "num_steps": self.num_steps,
            "after": list(self.after),
            "curve": self.curve,
            "curve_ci95": self.curve_ci95,
            "loss_curve": self.loss.double().mean(0).tolist(),
            "statistics": self.statistics,
        }

    def __str__(self) -> str:
        if self.metric_name == "accuracy":
            value = f"accuracy {100 * self.mean:.2f}% ± {100 * self.ci95:.2f}"
        else:
            value = f"{self.metric_name} {self.mean:.4g} ± {self.ci95:.2g}"
        return (
            f"{value} (95% interval; {self.num_tasks} tasks; {self.num_steps} inner steps; "
            f"normalisation statistics: {self.statistics})"
        )
