"""Returns of many tasks, with their intervals."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
        return [float(mean) for mean in self.of_tasks.double().mean(0)]

    @property
    def curve_ci95(self) -> list[float]:
        """Half widths of the 95% intervals of `curve`, over the tasks."""
        tasks = len(self.of_tasks)
        return [1.96 * float(s) / tasks**0.5 for s in self.of_tasks.double().std(0)]

    def __str__(self) -> str:
        pairs = zip(self.curve, self.curve_ci95, strict=True)
        course = ", ".join(f"{mean:.2f} ± {ci95:.2f}" for mean, ci95 in pairs)
        steps = self.of_tasks.shape[1] - 1
        return (
            f"return {course} after 0 to {steps} steps (95% intervals, {len(self.of_tasks)} tasks)"
        )
