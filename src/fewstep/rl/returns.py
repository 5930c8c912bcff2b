"""Returns of many tasks, with their intervals."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.scores import mean_and_ci95


@dataclass(frozen=True)
class Returns:
    """What tasks gave after 0, 1, ... inner steps.

    Args:
        of_tasks: Mean return of each task's episodes, (tasks, steps + 1).
    """

    of_tasks: Tensor

    @property
    def curve(self) -> list[float]:
        """Mean return after each number of steps."""
        return mean_and_ci95(self.of_tasks)[0].tolist()

    @property
    def curve_ci95(self) -> list[float]:
        """Half widths of the 95% intervals of `curve`, over the tasks."""
        return mean_and_ci95(self.of_tasks)[1].tolist()

    def __str__(self) -> str:
        pairs = zip(self.curve, self.curve_ci95, strict=True)
        course = ", ".join(f"{mean:.2f} ± {ci95:.2f}" for mean, ci95 in pairs)
        steps = self.of_tasks.shape[1] - 1
        return (
            f"return {course} after 0 to {steps} steps (95% intervals, {len(self.of_tasks)} tasks)"
        )
