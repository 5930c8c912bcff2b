"""Bars that count what is drawn."""

import torch
from rich.console import Console

from fewstep.core.tasks import TaskBatch
from fewstep.training.display import bars, counting


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
