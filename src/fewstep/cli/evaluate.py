"""The command that scores a run's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro
from rich.console import Console

from fewstep.cli.score_table import score_table
from fewstep.core.algorithm import ExtraSteps
from fewstep.core.errors import InputError, check_at_least
from fewstep.core.norm import Use, has_batch_norm
from fewstep.core.ranks import Ranks
from fewstep.data.episodes import Rotations
from fewstep.data.views import Views
from fewstep.training.build import Experiment, resolve_device
from fewstep.training.display import say
from fewstep.training.episode_options import (
    EpisodeOptions,
    RegressionOptions,
    Split,
    SupervisedOptions,
)
from fewstep.training.evaluate import Scoring, evaluate_run
from fewstep.training.run_folder import Checkpoint
from fewstep.training.same_settings import open_run


@dataclass(frozen=True)
class Evaluate:
    """Score a run's checkpoint on new tasks, step by step."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    split: Split = "test"
    """Classes to draw the tasks from."""
    checkpoint: Checkpoint = "best"
    """The best in validation, the last, or the mean of the outputs of all the best kept, which is
    scored after the last step alone."""
    tasks: int = 600
    """How many tasks."""
    steps: int | None = None
    """Inner steps; the run's eval_steps if not given."""
    extra_steps: ExtraSteps | None = None
    """More steps than trained: refuse, or repeat the last, where parts differ by step; the run's if
    not given."""
    ways: int | None = None
    """Classes of a task, as many as you like where tasks start from prototypes; the run's if not
    given."""
    shots: int | None = None
    """Support examples of each class; the run's if not given."""
    queries: int | None = None
    """Query examples of each class; the run's if not given."""
    rotations: Rotations | None = None
    """Quarter turns of the images; the run's if not given."""
    statistics: Use | None = None
    """What batch normalisation normalises by; the run's if not given."""
    views: Views | None = None
    """Take the mean of the outputs for each task as it is and with all its images mirrored, or
    turned by 1 to 3 quarters, each adapted to on its own; scored after the last step alone."""
    root: Path | None = None
    """Folder of the data, where they have moved; the run's if not given."""
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def run(self, console: Console) -> None:
        """Print the scores, then write them into the run folder."""
        check_at_least(2, "to give an interval", tasks=self.tasks)
        run, config = open_run(self.run_folder)
        episodes = self._episodes(config.for_tests().episodes)
        config = config.with_extra_steps(self.extra_steps).for_tests(self.ways)
        config = config.with_root(self.root)
        scoring = self._scoring(config.test_tasks)
        config = replace(config, episodes=episodes, device=resolve_device(self.device))
        ranks = Ranks.of_torchrun(config.device)
        experiment = Experiment.build(config, ranks, splits=[self.split])
        if self.statistics is not None and not has_batch_norm(experiment.learner.module):
            raise InputError(
                f"--statistics {self.statistics}: the model of {self.run_folder} has no batch "
                "normalisation; leave it out"
            )
        tested = evaluate_run(
            experiment,
            run if ranks.is_first else None,
            console if ranks.is_first else Console(quiet=True),
            scoring,
            split=self.split,
            num_steps=config.algorithm.eval_steps if self.steps is None else self.steps,
        )
        ranks.close()
        if ranks.is_first:
            of = f"checkpoint: {self.checkpoint}, {_named(tested.summary['iterations'])}"
            of += "".join(f"; {change.replace('-', ' ', 1)}" for change in scoring.changes)
            console.print(score_table(tested.scores))
            say(console, f"{self.split}: {tested.scores}\n{of}")
            tested.save()
            say(console, f"wrote {tested.file}")
            file = quote(str(tested.file))
            say(console, f"next: fewstep compare {file} OTHER   # with another, task by task")

    def _episodes(self, episodes: EpisodeOptions) -> EpisodeOptions:
        """Return the run's episodes with what was asked for."""
        why, refused = _MEANINGLESS.get(type(episodes), ("", ()))
        known = [f.name for f in fields(episodes)]
        named = {}
        for name in ("ways", "shots", "queries", "rotations", "steps", "statistics", "views"):
            if (value := getattr(self, name)) is None:
                continue
            if name in refused or f"{name} {value}" in refused:
                raise InputError(
                    f"--{name} {value}: the tasks of {self.run_folder} {why}; leave it out"
                )
            in_tests = f"eval_{name}" if self.split != "train" else name
            field = in_tests if in_tests in known else name
            if field in known:
                named[field] = value
        return replace(episodes, **named)

    def _scoring(self, test_tasks: int) -> Scoring:
        names = ("ways", "shots", "queries", "rotations")
        return Scoring(
            self.checkpoint,
            self.statistics,
            self.views,
            num_tasks=None if self.tasks == test_tasks else self.tasks,
            episodes={name: getattr(self, name) for name in names},
        )


# What is special about tasks of a kind, and the options that mean nothing there.
_MEANINGLESS: dict[type, tuple[str, tuple[str, ...]]] = {
    RegressionOptions: ("have no images", ("ways", "rotations", "views")),
    SupervisedOptions: (
        "are a classifier's, with its own classes and no support set",
        ("ways", "shots", "queries", "rotations", "steps", "statistics support", "views"),
    ),
}


def _named(iterations: Sequence[int]) -> str:
    return f"iteration{'s' * (len(iterations) > 1)} {', '.join(map(str, iterations))}"
