"""Processes forked from one that has imported PyTorch, as importing it takes seconds."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from io import BytesIO
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg

_processes = multiprocessing.get_context("forkserver")
# torch.optim imports torch._dynamo, and a run ends with pictures.
_processes.set_forkserver_preload(["fewstep.cli.main", "torch._dynamo", __name__])


def draw_nothing(canvas: FigureCanvasAgg, file: BytesIO, **_: object) -> None:
    """Stand in for `print_png`, where nobody looks at a run's pictures."""


class Done(NamedTuple):
    """How a program ended and what it printed."""

    code: int | None
    stdout: str
    stderr: str


def start(
    program: Callable[..., int | None],
    *arguments: Any,
    output: str = os.devnull,
    errors: str | None = None,
    **environment: str,
) -> BaseProcess:
    """Start program(*arguments), which returns an exit code, in this environment and more.

    Args:
        program: A function that its module names.
        arguments: Its own.
        output: File for what it prints.
        errors: File for its errors; None leaves them where they are seen.
        environment: More variables.
    """
    wanted = dict(os.environ) | environment
    process = _processes.Process(
        target=_run, args=(program, arguments, wanted, output, errors), daemon=True
    )
    process.start()
    return process


def _run(
    program: Callable[..., int | None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    output: str,
    errors: str | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which may have been ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    FigureCanvasAgg.print_png = draw_nothing
    for descriptor, name in ((1, output), (2, errors)):
        if name is not None:
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    sys.exit(program(*arguments))


def in_two(folder: Path, program: Callable[..., int | None], *arguments: Any) -> list[Done]:
    """Run a program in two processes that share its tasks, as `torchrun` would start them.

    Args:
        folder: For what they print.
        program: What to run.
        arguments: Its own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = [[str(folder / f"{kind}{rank}") for kind in ("stdout", "stderr")] for rank in (0, 1)]
    processes = [
        start(
            program, *arguments, output=output, errors=errors,
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        for rank, (output, errors) in enumerate(printed)
    ]  # fmt: skip
    for process in processes:
        process.join()
    return [
        Done(process.exitcode, *(Path(file).read_text() for file in files))
        for process, files in zip(processes, printed, strict=True)
    ]


def errors_of(tmp_path: Path, program: Callable[..., int | None], *arguments: Any) -> str:
    """Run a program in a process of its own and return what it prints of errors."""
    errors = tmp_path / "errors"
    start(program, *arguments, errors=str(errors)).join()
    return errors.read_text()
