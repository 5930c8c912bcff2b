"""Independent jobs, one after another, on the cores of a machine, or on a Ray cluster."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewstep.core.allocator import keep_freed_memory
from fewstep.core.errors import InputError
from fewstep.training.run_folder import commit

Key = TypeVar("Key")
Result = TypeVar("Result")
Job = tuple[Any, ...]


def each(
    function: Callable[..., Result],
    jobs: Mapping[Key, Job],
    *,
    workers: int,
    ray: bool,
    console: Console,
) -> Iterator[tuple[Key, Result]]:
    """Call a function for every job and yield the results as they come, with a progress bar.

    Args:
        function: Importable by other processes.
        jobs: Its arguments, by a key.
        workers: Processes at once, with a single thread each, which uses the cores better than
            one job with many threads; 1 stays in this process.
        ray: Send the jobs to a Ray cluster instead, a core each.
        console: Where the bar is shown.

    Raises:
        InputError: `workers` is below 1, Ray is not installed, or torchrun started several
            processes, which would all do all jobs.
    """
    if workers < 1:
        raise InputError(f"workers={workers} must be at least 1 process")
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise InputError(
            f"torchrun started {started} processes, but each of these {len(jobs)} runs is for one; "
            "leave torchrun out and give --workers"
        )
    commit()  # of the code at work, in this process too, which will write the scores
    if ray:
        results = _on_ray(function, jobs)
    elif workers == 1:
        results = ((key, function(*job)) for key, job in jobs.items())
    else:
        results = _in_processes(function, jobs, workers)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("jobs", total=len(jobs))
        for key, result in results:
            progress.advance(bar)
            yield key, result


def _in_processes(
    function: Callable[..., Result], jobs: Mapping[Key, Job], workers: int
) -> Iterator[tuple[Key, Result]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        keys = {pool.submit(function, *job): key for key, job in jobs.items()}
        for done in as_completed(keys):
            yield keys[done], done.result()
    except BaseException:  # an interrupt above all: runs write a checkpoint on SIGTERM
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Let no worker outlive a parent that was killed; what it had saved can be resumed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _on_ray(
    function: Callable[..., Result], jobs: Mapping[Key, Job]
) -> Iterator[tuple[Key, Result]]:
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs Ray, which is not installed; pip install ray")
    ray = importlib.import_module("ray")
    ray.init(ignore_reinit_error=True, log_to_driver=False)

    def call(*job: Any) -> Result:  # Ray takes functions only
        return function(*job)

    remote = ray.remote(num_cpus=1)(call)
    keys = {remote.remote(*job): key for key, job in jobs.items()}
    waiting = list(keys)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        yield keys[done], ray.get(done)
