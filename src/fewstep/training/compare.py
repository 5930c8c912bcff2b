"""Evaluation files of the same tasks, compared task by task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from fewstep.core.errors import InputError
from fewstep.core.scores import Difference, paired_difference
from fewstep.training.evaluate import evaluation_file, is_scored, read_scores
from fewstep.training.parse import load_config
from fewstep.training.run_folder import RunFolder

_NEEDED = ("metric", "mean", "ci95", "per_task", "num_tasks", "split", "seed", "dataset", "data",
           "episodes")  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_run` wrote.

    Args:
        name: As the user typed it.
        values: What is in the file.
    """

    name: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read an evaluation file; of a run's folder, that of the test at the end of training.

        Raises:
            InputError: there is none, or it lacks what tells scores and tasks.
        """
        file = _test_of(path) if path.is_dir() else path
        try:
            values = read_scores(file)
        except OSError as error:
            raise InputError(
                f"cannot read {file}: {error.strerror}; `fewstep evaluate RUN` writes such files"
            ) from error
        except ValueError as error:
            raise InputError(f"{file} is not JSON: {error}; give an evaluation file") from error
        if lacking := [n for n in _NEEDED if not isinstance(values, dict) or n not in values]:
            raise InputError(
                f"{file} lacks {lacking[0]}: it is no evaluation, or an earlier version's; "
                "`fewstep evaluate RUN` writes one"
            )
        return cls(path, values)

    @property
    def tasks(self) -> dict[str, Any]:
        """What its tasks follow from."""
        values = self.values
        found = {name: values[name] for name in ("dataset", "split", "num_tasks")}
        found |= values["data"]
        if values["dataset"] != "folder":  # whose classes are those of any copy
            found.pop("root", None)
        else:
            found["classes"] = values.get("classes")
        episodes = values["episodes"]
        if values["split"] == "train":
            found |= episodes | {"seed": values["seed"]}
            return found
        for name in ("ways", "shots", "queries", "rotations", "examples", "held_out"):
            found[name] = episodes.get(f"eval_{name}", episodes.get(name))
        return found

    def minus(self, baseline: Evaluation) -> Difference:
        """Compare with another evaluation on the same tasks.

        Raises:
            InputError: the tasks are not the same, or what is measured.
        """
        ours = self.tasks | {"metric": self.values["metric"]}
        theirs = baseline.tasks | {"metric": baseline.values["metric"]}
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                raise InputError(
                    f"{self.name} has {name}={ours.get(name)!r}, {baseline.name} "
                    f"{theirs.get(name)!r}; only scores of the same tasks compare, and "
                    "`fewstep evaluate` can score either on others"
                )
        return paired_difference(
            torch.tensor(self.values["per_task"], dtype=torch.float64),
            torch.tensor(baseline.values["per_task"], dtype=torch.float64),
        )


def _test_of(path: Path) -> Path:
    run = RunFolder.open(path)
    config = load_config(path / "config.toml")
    file = evaluation_file(run, "test", "best", config.algorithm.eval_steps)
    is_there = file.exists() if run.state() is None else is_scored(run, "best", file)
    if not is_there:
        raise InputError(
            f"{path} has no test of its best checkpoint, {file.name}; write it with "
            f"`fewstep evaluate {quote(str(path))} --tasks {config.test_tasks}`"
        )
    return file
