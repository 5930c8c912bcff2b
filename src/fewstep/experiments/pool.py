"""Independent jobs, one after another, on the cores of a machine, or on a Ray cluster."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewstep.core.allocator import keep_freed_memory
from fewstep.core.errors import InputError, check_at_least
from fewstep.training.display import say
from fewstep.training.environment import commit

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
    check_at_least(1, "process", workers=workers)
    check_alone(len(jobs))
    commit()  # of the code at work, in this process too, which will write the scores
    if ray:
        results = _on_ray(function, jobs)
    elif workers == 1:
        results = ((key, function(*job)) for key, job in jobs.items())
    else:
        results = _in_processes(function, jobs, workers, console)
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


def check_alone(runs: int) -> None:
    """Raise InputError if torchrun started several processes, which would all do all runs."""
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise InputError(
            f"torchrun started {started} processes, but each of these {runs} runs is for one; "
            "leave torchrun out and give --workers"
        )


def _in_processes(
    function: Callable[..., Result], jobs: Mapping[Key, Job], workers: int, console: Console
) -> Iterator[tuple[Key, Result]]:
    """Give each process one job at a time, so that after an interrupt none has another to begin.

    Each has a pipe of its own: of ProcessPoolExecutor's queues, one that is terminated keeps the
    locks, for which the others would wait forever.
    """
    context = multiprocessing.get_context("spawn")
    left = iter(jobs.items())
    processes: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, Key] = {}
    is_done = False
    try:
        for key, job in islice(left, workers):
            pipe, its_end = context.Pipe()
            started = context.Process(target=_work, args=(function, its_end))
            started.start()
            processes[pipe] = started
            its_end.close()  # here, so that its death is an end of file
            with _death_told(started):
                pipe.send(job)
            busy[pipe] = key
        while busy:
            for pipe in busy.keys() & set(wait(busy)):
                with _death_told(processes[pipe]):
                    result, error = pipe.recv()
                if error is not None:
                    raise error
                yield busy.pop(pipe), result  # whoever wants no more closes this generator
                for key, job in islice(left, 1):
                    with _death_told(processes[pipe]):
                        pipe.send(job)
                    busy[pipe] = key
        is_done = True
    except KeyboardInterrupt:
        say(console, "stopping the workers (another Ctrl-C kills them); the same command goes on")
        raise
    finally:
        try:
            for pipe, process in processes.items():
                if not is_done:  # an interrupt above all: runs write a checkpoint on SIGTERM
                    process.terminate()
                pipe.close()
            for process in processes.values():
                process.join()
        except KeyboardInterrupt:  # the second one
            for process in processes.values():
                process.kill()
            raise


@contextmanager
def _death_told(process: BaseProcess) -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        process.join()
        raise RuntimeError(f"a worker died with exit code {process.exitcode}") from error


def _work(function: Callable[..., Any], pipe: Connection) -> None:
    """Do jobs until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sends SIGTERM
    _settle()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            job = pipe.recv()
            try:
                answer = function(*job), None
            except BaseException as error:
                error.add_note(traceback.format_exc())  # which is not pickled
                pipe.send((None, error))
            else:
                pipe.send(answer)


def _settle() -> None:
    """Make the most of a process that has one core."""
    torch.set_num_threads(1)
    keep_freed_memory()


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
        raise InputError('--ray needs Ray, which is not installed: pip install -e ".[cluster]"')
    ray = importlib.import_module("ray")
    ray.init(ignore_reinit_error=True, log_to_driver=False)

    def call(*job: Any) -> Result:  # Ray takes functions only
        _settle()
        return function(*job)

    remote = ray.remote(num_cpus=1)(call)
    keys = {remote.remote(*job): key for key, job in jobs.items()}
    waiting = list(keys)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        yield keys[done], ray.get(done)
