"""The metrics of a run: a line of JSON for each iteration and each validation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewstep.core.errors import InputError
from fewstep.core.files import write_atomically
from fewstep.data.archives import reading


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, but for a last one that a kill or power cut damaged.

    Raises:
        InputError: it cannot be read, or another line is damaged.
    """
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_text(errors="replace").split("\n")[:-1]
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(_metrics_of(line))
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise InputError(f"line {number} of {path} is damaged; remove the line") from error
    return metrics


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop what was logged after `iteration`, which a resumed run will log again.

    Raises:
        InputError: a line is damaged.
    """
    kept = [m for m in read_metrics(path) if m["iteration"] <= iteration]
    write_atomically(path, "".join(json_line(m) for m in kept).encode())


def json_line(values: dict[str, Any]) -> str:
    """Return one line of a JSON-lines file."""
    return json.dumps(values) + "\n"


def _metrics_of(line: str) -> dict[str, Any]:
    values = json.loads(line)
    if not (isinstance(values["iteration"], int) and all(map(is_number, values.values()))):
        raise TypeError("not numbers of an iteration")
    return dict(values)


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number."""
    return isinstance(value, int | float)


class NoLog:
    """What the processes that keep no folder log."""

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Wait for nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Log(NoLog):
    """Metrics of a run, to metrics.jsonl and TensorBoard, from an iteration on.

    Args:
        path: The metrics file, of which what comes after the iteration is dropped.
        tensorboard: Folder of the same for TensorBoard.
        iteration: Outer updates done before.
    """

    def __init__(self, path: Path, tensorboard: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: slow, and only training writes

        truncate_metrics(path, iteration)
        self._file = path.open("a", buffering=1)  # a line at a time, to be followed
        self._tensorboard = SummaryWriter(tensorboard, purge_step=iteration + 1)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Write a line."""
        with self._disk_errors():
            self._file.write(json_line({"iteration": iteration, **values}))
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iteration)

    def sync(self) -> None:
        """Bring the lines to the disk, before a checkpoint says that they are there."""
        with self._disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._tensorboard.flush()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write in {Path(self._file.name).parent}: {error.strerror}; the last "
                "checkpoint is intact, so free some space and resume"
            ) from error

    def __exit__(self, *_: object) -> None:
        for each in (self._file, self._tensorboard):
            with suppress(OSError):  # of what could not be written before; the rest was synced
                each.close()
