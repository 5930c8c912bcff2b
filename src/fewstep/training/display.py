"""What a person sees while a run trains or is tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from fewstep.core.tasks import Episodes, TaskBatch


def say(console: Console, text: str) -> None:
    """Print as it is: no markup, nothing coloured, and no line broken where a path may be.

    Where nothing can be printed any more, as on a terminal that was closed, falls silent.

    Raises:
        BrokenPipeError: who was to read it has left.
    """
    try:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    except BrokenPipeError:
        raise
    except OSError:
        console.quiet = True


def bars(console: Console) -> Progress:
    """Return what shows progress bars on a terminal, and nothing elsewhere."""
    rate = [TextColumn("{task.fields[rate]}")] if console.width >= 80 else []  # else all are cut
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave
        MofNCompleteColumn(),
        *rate,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        expand=True,
    )


@contextmanager
def counting(progress: Progress, what: str, episodes: Episodes, total: int) -> Iterator[Episodes]:
    """Yield the same episodes; a bar of their own counts those drawn."""
    bar = progress.add_task(what, total=total, rate="")
    try:
        yield _Counted(episodes, partial(progress.advance, bar))
    finally:
        progress.remove_task(bar)


@dataclass(frozen=True)
class _Counted:
    episodes: Episodes
    count: Callable[[int], None]

    def batch(self, start: int, count: int) -> TaskBatch:
        self.count(count)
        return self.episodes.batch(start, count)


class Display:
    """A progress bar on a terminal; elsewhere only the lines that are printed.

    Args:
        console: Where to print.
        total: Iterations of the run.
        done: Iterations done before.
        tasks: Tasks of an iteration.
    """

    def __init__(self, console: Console, total: int, done: int, tasks: int) -> None:
        self.console = console
        self._tasks = tasks
        self._smooth: dict[str, float] = {}
        self._progress = bars(console)
        self._bar = self._progress.add_task("training", total=total, completed=done, rate="")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar for a while."""
        with self._progress:
            yield

    def validation(self, episodes: Episodes, total: int) -> AbstractContextManager[Episodes]:
        """Count the tasks of a validation in a bar below."""
        return counting(self._progress, "validation", episodes, total)

    def advance(self, metric_name: str, loss: float, metric: float, seconds: float) -> None:
        """Count an iteration and show smoothed values of what it gave."""
        for key, value in (("loss", loss), ("metric", metric), ("seconds", seconds)):
            self._smooth[key] = 0.95 * self._smooth.get(key, value) + 0.05 * value
        text = f"loss {self._smooth['loss']:.3f}"
        if metric_name == "accuracy":
            text += f"  accuracy {100 * self._smooth['metric']:.1f}%"
        rate = f"{self._tasks / self._smooth['seconds']:.0f} tasks/s"
        self._progress.update(self._bar, advance=1, description=text, rate=rate)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        say(self.console, text)
