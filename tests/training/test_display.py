"""Bars that count what is drawn."""

import io

import pytest
import torch
from rich.console import Console

from fewstep.core.tasks import TaskBatch
from fewstep.training.display import Display, bars, counting


def test_tasks_are_counted_as_they_are_drawn():
    tasks = TaskBatch(*(torch.arange(5.0)[:, None, None] for _ in range(4)))
    with bars(Console(quiet=True)) as progress, counting(progress, "test", tasks, 5) as counted:
        (bar,) = progress.tasks
        assert (bar.description, bar.completed, bar.total) == ("test", 0, 5)
        assert torch.equal(counted.batch(0, 2).x_query, tasks.x_query[:2])
        assert bar.completed == 2
        assert torch.equal(counted.batch(2, 3).x_query, tasks.x_query[2:])
        assert bar.completed == 5
    assert not progress.tasks


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_shows_what_is_done_and_left(width):
    console = Console(width=width, force_terminal=True, file=io.StringIO())
    progress = bars(console)
    text = "loss 1.234  accuracy 45.7%"
    progress.add_task(text, total=100000, completed=12345, rate="1333 tasks/s")
    with console.capture() as shown:
        console.print(progress.get_renderable())
    for part in (text, "12345/100000", "-:--:--"):
        assert part in shown.get()
    assert ("1333 tasks/s" in shown.get()) == (width == 80)


def test_a_bar_shows_accuracy_in_percent_and_tasks_by_the_second():
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    display = Display(console, total=100, done=10, tasks=8)
    display.advance("accuracy", 1.2344, 0.457, 0.006)
    with display.shown():
        pass
    for part in ("loss 1.234  accuracy 45.7%", "11/100", "1333 tasks/s"):
        assert part in console.file.getvalue()
