"""A run is a folder: settings, environment, metrics, checkpoints and scores."""

from __future__ import annotations

import json
import math
import shlex
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.core.files import write_atomically
from fewstep.data.archives import reading
from fewstep.training.environment import command_line, environment
from fewstep.training.metrics_file import is_number, json_line, read_metrics

Checkpoint = Literal["best", "last", "ensemble"]


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is kept for its validation score.

    Args:
        name: Its file name.
        iteration: Outer updates done at it.
        rank: Its mean validation metric, turned so that more is better; None without one.
    """

    name: str
    iteration: int
    rank: float | None


@dataclass(frozen=True)
class State:
    """Where a run stands: the small file that says which checkpoints are valid.

    Args:
        iteration: Outer updates done at the last checkpoint; the next episode follows from it.
        last: File name of the last checkpoint.
        best: The checkpoints with the best validation scores, the best first; the last one before
            there is a score.
    """

    iteration: int
    last: str
    best: tuple[Kept, ...]

    @classmethod
    def from_json(cls, text: str) -> State:
        """Read what `write_json` wrote; ValueError, TypeError and others if it did not."""
        values = json.loads(text)
        best = tuple(Kept(**kept) for kept in values.pop("best"))
        if not best:
            raise ValueError("no checkpoint is the best")
        state = cls(best=best, **values)
        for kept in (Kept(state.last, state.iteration, None), *best):
            if not (
                isinstance(kept.name, str)
                and isinstance(kept.iteration, int)
                and kept.iteration >= 0
                and (kept.rank is None or is_number(kept.rank))
            ):
                raise ValueError(f"no checkpoint is {kept}")
        return state


class RunFolder:
    """The files of one run.

    config.toml, starts.jsonl, classes.json, state.json, metrics.jsonl, checkpoints/, tensorboard/,
    and a JSON file for each evaluation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.starts_file = path / "starts.jsonl"
        self.tensorboard = path / "tensorboard"
        self._checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, path: Path, settings: dict[str, Any]) -> RunFolder:
        """Set up a new run in an existing folder.

        Raises:
            InputError: there is a run in it already, or the disk is full.
        """
        run = cls(path)
        if (path / "config.toml").exists():
            raise InputError(
                f"{path} already holds a run; continue it with "
                f"`fewstep resume {shlex.quote(str(path))}` or choose another folder with --out"
            )
        run._checkpoints.mkdir(exist_ok=True)
        run.save_settings(settings)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of an existing run.

        Raises:
            InputError: there is no run in it.
        """
        if not (path / "config.toml").is_file():
            raise InputError(f"{path} holds no run (no config.toml); give a folder made by train")
        return cls(path)

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings."""
        return read_toml(self.path / "config.toml")

    def save_settings(self, settings: dict[str, Any]) -> None:
        """Write config.toml."""
        write_atomically(self.path / "config.toml", tomli_w.dumps(settings).encode())

    def state(self) -> State | None:
        """Return where the run stands, or None before its first checkpoint.

        Raises:
            InputError: state.json cannot be read, or is damaged.
        """
        path = self.path / "state.json"
        try:
            return State.from_json(path.read_text())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(
                f"cannot read {path}: {error.strerror}; check its permissions"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({error}); the run must be started anew"
            ) from error

    def kept(self, checkpoint: Checkpoint) -> tuple[Kept, ...]:
        """Return what was asked for: the best checkpoint, the last, or all that are kept.

        Raises:
            InputError: there is none, or state.json cannot be read.
        """
        state = self.state()
        if state is None:
            if (inner := self.path / "run" / "state.json").exists():  # as in results/
                raise InputError(f"{self.path} has no checkpoint of its own; give {inner.parent}")
            raise InputError(f"{self.path} has no checkpoint yet; train it first")
        return {
            "best": state.best[:1],
            "last": (Kept(state.last, state.iteration, None),),
            "ensemble": state.best,
        }[checkpoint]

    def save_checkpoint(
        self,
        tensors: dict[str, Tensor],
        previous: State | None,
        iteration: int,
        rank: float | None,
        *,
        keep_best: int = 1,
    ) -> State:
        """Write a checkpoint, then the state that makes it count, then drop what is superseded.

        A kill or a full disk at any point leaves the earlier checkpoint valid.

        Args:
            tensors: What to save.
            previous: The state before.
            iteration: Outer updates done.
            rank: Its validation score, more being better; None without a validation. One that is
                not finite is none.
            keep_best: How many checkpoints to keep for their scores.
        """
        name = f"{iteration:08d}.safetensors"
        contiguous = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        write_atomically(self._checkpoints / name, save(contiguous))
        newest = Kept(name, iteration, finite(rank))
        kept = [*(() if previous is None else previous.best), newest]
        scored = sorted((k for k in kept if finite(k.rank) is not None), key=_rank, reverse=True)
        state = State(iteration, name, tuple(scored[:keep_best]) or (newest,))
        write_json(self.path / "state.json", asdict(state))
        for file in self._checkpoints.iterdir():
            if file.name not in (state.last, *(k.name for k in state.best)):
                file.unlink()
        return state

    def load_checkpoint(self, name: str) -> dict[str, Tensor]:
        """Read a checkpoint by its file name.

        Raises:
            InputError: it is missing or damaged.
        """
        path = self._checkpoints / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot read checkpoint {path}: {error}; is the run whole?"
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, or of validation.jsonl where only that came along.

        Raises:
            InputError: a line that is not the last is damaged.
        """
        validation = self.path / "validation.jsonl"  # as in results/
        has_metrics = self.metrics_file.exists() or not validation.exists()
        return read_metrics(self.metrics_file if has_metrics else validation)

    def note_start(self, iteration: int, settings: dict[str, Any]) -> None:
        """Add a line to starts.jsonl: by which command, commit and machine training goes on.

        Args:
            iteration: Outer updates done before.
            settings: What it goes on with.
        """
        before = _text(self.starts_file)
        start = {"iteration": iteration, "iterations": settings["iterations"]}
        start |= environment(command_line(), settings["device"]) | {"settings": settings}
        write_atomically(self.starts_file, (before + json_line(start)).encode())

    def first_settings(self) -> dict[str, Any] | None:
        """Return the settings of the first start that noted them; None if none did.

        Raises:
            InputError: a line is damaged.
        """
        for number, line in enumerate(_text(self.starts_file).splitlines(), 1):
            try:
                settings = json.loads(line).get("settings")
                if settings is not None:
                    return dict(settings)
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    f"line {number} of {self.starts_file} is damaged; remove the line"
                ) from error
        return None


def _text(path: Path) -> str:
    """Return what is in a file, nothing if there is none."""
    if not path.exists():
        return ""
    with reading(path):
        return path.read_text(errors="replace")


def _rank(kept: Kept) -> float:
    assert kept.rank is not None
    return kept.rank


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file atomically; numbers that are not finite, which JSON lacks, are null."""
    text = json.dumps(finite(values), indent=2, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def finite(value: Any) -> Any:
    """Return a value with None for what is not finite in it."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(each) for key, each in value.items()}
        case list() | tuple():
            return [finite(each) for each in value]
    return value


def nan_for_null(value: Any) -> Any:
    """Return a number, or nested lists of numbers, with NaN for what was not finite."""
    if isinstance(value, list):
        return [nan_for_null(each) for each in value]
    return math.nan if value is None else value


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: it is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}; mend or remove it") from error
