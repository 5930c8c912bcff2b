"""The command that tells whether one run is better than another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fewstep.core.errors import InputError
from fewstep.core.files import check_name_of_file
from fewstep.training.compare import Evaluation
from fewstep.training.display import say
from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json


@dataclass(frozen=True)
class Compare:
    """Tell runs apart by their scores on the same tasks, task by task."""

    evaluations: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, of each its test of the best checkpoint, or files that evaluate wrote. The
    others are compared with the first."""
    out: Path | None = None
    """JSON file for the differences."""

    def run(self, console: Console) -> None:
        """Print each score, and its difference from the first."""
        if len(self.evaluations) < 2:
            raise InputError("compare needs two runs or evaluation files at least, such as "
                             "runs/glyphs-maml-1 runs/glyphs-maml++-1")  # fmt: skip
        if self.out is not None:
            check_name_of_file(self.out, ".json")
        first, *others = [Evaluation.read(path) for path in self.evaluations]
        differences = [other.minus(first) for other in others]
        metric = first.values["metric"]
        table = Table()
        table.add_column("", overflow="fold")
        for name in (metric, "minus the first", "tasks above, below"):
            table.add_column(name)
        for each, found in zip([first, *others], [None, *differences], strict=True):
            score = _in_words(metric, each.values["mean"], each.values["ci95"])
            row = [escape(str(each.name)), score]
            if found is not None:
                row += [_in_words(metric, found.mean, found.ci95, "+")]
                row += [f"{found.above}, {found.below}"]
            table.add_row(*row)
        console.print(table)
        tasks = first.values["num_tasks"]
        say(console, f"{tasks} tasks, the same for all; ± is half of a 95% interval, which for a "
            "difference is that of its mean over the tasks")  # fmt: skip
        if self.out is not None:
            write_json(self.out, {
                "tasks": first.tasks,
                "scores": {str(e.name): [e.values["mean"], e.values["ci95"]]
                           for e in (first, *others)},
                "minus_the_first": {str(other.name): asdict(found)
                                    for other, found in zip(others, differences, strict=True)},
                "environment": environment(command_line(), "cpu"),
            })  # fmt: skip
            say(console, f"wrote {self.out}")
        if not all(found.is_significant for found in differences):
            say(console, f"next: fewstep evaluate RUN --tasks {4 * tasks}   # for each, then "
                "compare the files: half as wide, intervals may leave out 0")  # fmt: skip


def _in_words(metric: str, mean: float, ci95: float, sign: str = "") -> str:
    if metric == "accuracy":
        return f"{100 * mean:{sign}.2f}% ± {100 * ci95:.2f}"
    return f"{mean:{sign}.4g} ± {ci95:.2g}"
