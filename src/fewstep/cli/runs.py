"""The commands that make runs and look at them: train, resume, evaluate, plot."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from fewstep.core.algorithm import ExtraSteps
from fewstep.core.errors import InputError
from fewstep.core.network import Tensors
from fewstep.core.norm import Use
from fewstep.core.ranks import ALONE, Ranks
from fewstep.core.scores import Scores
from fewstep.data.episodes import Rotations
from fewstep.data.views import Views
from fewstep.models.conv import PROJECTION
from fewstep.report.curves import plot_runs
from fewstep.report.sinusoid_fits import plot_sinusoid_fits
from fewstep.training.build import Experiment, resolve_device
from fewstep.training.config import (
    EpisodeOptions,
    RegressionOptions,
    RunConfig,
    Split,
    SupervisedOptions,
    to_dict,
)
from fewstep.training.display import say
from fewstep.training.evaluate import Checkpoint, evaluate_run
from fewstep.training.files import locked, make_folder
from fewstep.training.initial import fitting, initial_of
from fewstep.training.parse import load_config, run_config
from fewstep.training.run_folder import RunFolder
from fewstep.training.same_settings import check_unchanged
from fewstep.training.trainer import Trainer


@dataclass(frozen=True)
class Train:
    """Meta-train a model, then test its best checkpoint."""

    settings: RunConfig
    out: Path | None = None
    """Folder of the run; runs/<dataset>-<recipe>-<number> if not given."""
    config: Path | None = None
    """TOML file with settings, such as a run's config.toml; options given here override it."""

    @classmethod
    def default(cls, arguments: Sequence[str]) -> Train:
        """Return the command as the data set or the settings file sets it."""
        return cls(run_config(arguments))

    def run(self, console: Console) -> None:
        """Make the run folder, train, test."""
        config = replace(self.settings, device=resolve_device(self.settings.device))
        ranks = Ranks.of_torchrun(config.device)
        initial = initial_of(config)
        experiment = Experiment.build(config, ranks, initial)
        if not ranks.is_first:
            _train_and_test(experiment, None, Console(quiet=True))
            return
        if initial is not None:
            say(console, _started_from(config, experiment.learner.module, initial))
        path = self.out or _free_folder(config)
        make_folder(path)
        with locked(path):
            run = RunFolder.create(path, to_dict(config))
            _train(experiment, run, console)


@dataclass(frozen=True)
class Resume:
    """Continue a run that was interrupted, or give it more iterations."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    iterations: int | None = None
    """New total of outer updates."""
    device: str | None = None
    """Another device than the run's; the result then agrees with its own up to rounding."""

    def run(self, console: Console) -> None:
        """Train from the last checkpoint, if there is anything left to train, and test."""
        run = RunFolder.open(self.run_folder)
        config = load_config(run.path / "config.toml")
        check_unchanged(run, config)
        if self.iterations is not None:
            config = replace(config, iterations=self.iterations)
        if self.device is not None:
            config = replace(config, device=resolve_device(self.device))
        ranks = Ranks.of_torchrun(config.device)
        with locked(run.path) if ranks.is_first else nullcontext():
            state = ranks.of_first(run.state())
            if state is not None and state.iteration > config.iterations:
                raise InputError(
                    f"iterations={config.iterations} is below the {state.iteration} that "
                    f"{run.path} has done; pass more to go on"
                )
            initial = initial_of(config) if state is None else None
            experiment = Experiment.build(config, ranks, initial)
            if not ranks.is_first:
                _train_and_test(experiment, None, Console(quiet=True))
                return
            run.save_settings(to_dict(config))
            _train(experiment, run, console)


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
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def run(self, console: Console) -> None:
        """Print the scores, then write them into the run folder."""
        if self.tasks < 2:
            raise InputError(f"tasks={self.tasks} must be at least 2, to give an interval")
        run = RunFolder.open(self.run_folder)
        config = load_config(run.path / "config.toml").with_extra_steps(self.extra_steps)
        episodes = self._episodes(config.episodes)
        changes = self._changes(config.test_tasks)
        config = replace(config, episodes=episodes, device=resolve_device(self.device))
        ranks = Ranks.of_torchrun(config.device)
        tested = evaluate_run(
            Experiment.build(config, ranks),
            run if ranks.is_first else None,
            console if ranks.is_first else Console(quiet=True),
            split=self.split,
            checkpoint=self.checkpoint,
            num_tasks=self.tasks,
            num_steps=config.algorithm.eval_steps if self.steps is None else self.steps,
            statistics=self.statistics,
            views=self.views,
            changes=changes,
        )
        ranks.part()
        if ranks.is_first:
            of = f"checkpoint: {self.checkpoint}, {_named(tested.summary['iterations'])}"
            of += "".join(f"; {change.replace('-', ' ', 1)}" for change in changes)
            console.print(_table(tested.scores))
            say(console, f"{self.split}: {tested.scores}\n{of}")
            tested.save()
            say(console, f"wrote {tested.file}")

    def _episodes(self, episodes: EpisodeOptions) -> EpisodeOptions:
        """Return the run's episodes with what was asked for."""
        why, refused = _MEANINGLESS.get(type(episodes), ("", ()))
        known = [f.name for f in fields(episodes)]
        named = {}
        for name in ("shots", "queries", "rotations", "steps", "statistics", "views"):
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

    def _changes(self, test_tasks: int) -> list[str]:
        """Return a word for each difference from the run's own tests but the steps."""
        words = {
            "shots": self.shots,
            "queries": self.queries,
            "rotations": self.rotations,
            "statistics": self.statistics,
            "tasks": self.tasks if self.tasks != test_tasks else None,
            "views": self.views,
        }
        return [f"{name}-{value}" for name, value in words.items() if value is not None]


# What is special about tasks of a kind, and the options that mean nothing there.
_MEANINGLESS: dict[type, tuple[str, tuple[str, ...]]] = {
    RegressionOptions: ("have no images", ("rotations", "views")),
    SupervisedOptions: (
        "are a classifier's, with its own classes and no support set",
        ("shots", "queries", "rotations", "steps", "statistics support", "views"),
    ),
}


@dataclass(frozen=True)
class Plot:
    """Draw the learning curves of one or several runs as a PNG file."""

    run_folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the runs."""
    out: Path | None = None
    """Picture to write; curves.png in the first run's folder if not given."""

    def run(self, console: Console) -> None:
        """Draw."""
        if not self.run_folders:
            raise InputError("plot needs at least one run folder, such as runs/glyphs-maml-1")
        runs = [RunFolder.open(path) for path in self.run_folders]
        path = self.out or self.run_folders[0] / "curves.png"
        plot_runs(runs, path)
        say(console, f"wrote {path}")


def _started_from(config: RunConfig, module: nn.Module, initial: Tensors) -> str:
    taken = fitting(module, initial)
    made = [name for name, _ in module.named_parameters() if name not in taken]
    head = "; projection: of the head there" if PROJECTION in taken.keys() - initial.keys() else ""
    return f"starts from {config.initial}{head}; made anew: {', '.join(made) or 'nothing'}"


def _train(experiment: Experiment, run: RunFolder, console: Console) -> None:
    config = experiment.config
    say(console, f"run folder: {run.path}  ({config.recipe} on {config.dataset}, {config.device})")
    learner = experiment.learner
    if config.memory_budget is not None:
        chosen = f"chunk_size={learner.chunk_size}, checkpoint_every={learner.checkpoint_every}"
        say(console, f"memory budget of {config.memory_budget:g} MiB: {chosen}")
    name = quote(str(run.path))
    try:
        is_done = _train_and_test(experiment, run, console)
    except KeyboardInterrupt:
        say(console, f"next: fewstep resume {name}")
        raise
    if not is_done:
        say(console, f"next: fewstep resume {name}")
        return
    plot_runs([run], run.path / "curves.png")
    if config.dataset == "sinusoid":
        plot_sinusoid_fits(learner, run.path / "fits.png")
        say(console, f"fits: {run.path / 'fits.png'}")
    say(console, f"learning curves: {run.path / 'curves.png'}")
    say(console, f"next: fewstep evaluate {name} --split val   (score again, other settings)")
    say(console, f"      fewstep resume {name} --iterations {2 * config.iterations}")
    if config.recipe == "supervised":
        say(console, f"      fewstep train --initial {name} --recipe maml++   (few-shot tasks)")
        return
    say(console, f"      fewstep compare {name} RUN   (with another, task by task)")
    if config.dataset != "sinusoid":
        say(console, f"      fewstep predict {name} --support FOLDER --query FOLDER   (yours)")


def _train_and_test(experiment: Experiment, run: RunFolder | None, console: Console) -> bool:
    """Do what every process has a share in; False if training was interrupted."""
    config, ranks = experiment.config, experiment.learner.ranks
    state, is_done = Trainer(experiment, run, console).train()
    if is_done:
        test = partial(
            evaluate_run,
            experiment,
            run,
            console,
            split="test",
            num_tasks=config.test_tasks,
            num_steps=config.algorithm.eval_steps,
        )
        tested = test(checkpoint="best")
        console.print(_table(tested.scores))
        say(console, f"test: {tested.scores}")
        tested.save()
        if config.keep_best > 1:
            tested = test(checkpoint="ensemble")
            say(console, f"test, ensemble of {len(state.best)}: {tested.scores}")
            tested.save()
    else:
        say(console, f"stopped after iteration {state.iteration}; the checkpoint is written")
    ranks.part()
    experiment.learner.ranks = ALONE
    return is_done


def _named(iterations: Sequence[int]) -> str:
    return f"iteration{'s' * (len(iterations) > 1)} {', '.join(map(str, iterations))}"


def _free_folder(config: RunConfig) -> Path:
    number = 1
    while (path := Path("runs") / f"{config.dataset}-{config.recipe}-{number}").exists():
        number += 1
    return path


def _table(scores: Scores) -> Table:
    table = Table(title=f"{scores.num_tasks} tasks, mean ± 95% interval")
    table.add_column("inner steps", justify="right")
    table.add_column(scores.metric_name, justify="right")
    in_percent = scores.metric_name == "accuracy"
    for step, mean, ci in zip(scores.after, scores.curve, scores.curve_ci95, strict=True):
        value = f"{100 * mean:.2f}% ± {100 * ci:.2f}" if in_percent else f"{mean:.4f} ± {ci:.4f}"
        table.add_row(str(step), value)
    return table
