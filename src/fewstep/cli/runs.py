"""The commands that make runs and draw them: train, resume, plot."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro
from rich.console import Console
from torch import nn

from fewstep.cli.score_table import score_table
from fewstep.core.errors import InputError
from fewstep.core.ranks import Ranks
from fewstep.core.tensors import Tensors
from fewstep.models.conv import PROJECTION
from fewstep.report.curves import has_validation, plot_runs
from fewstep.report.sinusoid_fits import plot_sinusoid_fits
from fewstep.training.build import Experiment, resolve_device
from fewstep.training.config import RunConfig, to_dict
from fewstep.training.display import say
from fewstep.training.effects import check_effects
from fewstep.training.evaluate import Scoring, evaluate_run
from fewstep.training.folders import locked, make_folder
from fewstep.training.initial import fitting, initial_of
from fewstep.training.parse import run_config
from fewstep.training.run_folder import RunFolder
from fewstep.training.same_settings import check_can_be_kept, open_run
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
        check_can_be_kept(self.settings)
        check_effects(self.settings)
        config = replace(self.settings.placed(), device=resolve_device(self.settings.device))
        ranks = Ranks.of_torchrun(config.device)
        initial = initial_of(config)
        experiment = Experiment.build(config, ranks, initial)
        if not ranks.is_first:
            _train_and_test(experiment, None, Console(quiet=True))
            return
        if initial is not None:
            say(console, _started_from(self.settings, experiment.learner.module, initial))
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
    root: Path | None = None
    """Folder of the data, where they have moved; the run's if not given."""

    def run(self, console: Console) -> None:
        """Train from the last checkpoint, if there is anything left to train, and test."""
        run, config = open_run(self.run_folder)
        config = config.with_root(self.root)
        if self.iterations is not None:
            config = replace(config, iterations=self.iterations)
        config = replace(config, device=resolve_device(self.device or config.device))
        ranks = Ranks.of_torchrun(config.device)
        with locked(run.path) if ranks.is_first else nullcontext():
            state = ranks.broadcast(run.state())
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
    if has_validation(run):  # else it came without its metrics, and there is nothing to draw
        plot_runs([run], run.path / "curves.png")
        say(console, f"learning curves: {run.path / 'curves.png'}")
    if config.dataset == "sinusoid":
        plot_sinusoid_fits(learner, run.path / "fits.png")
        say(console, f"fits: {run.path / 'fits.png'}")
    say(console, f"next: fewstep evaluate {name} --split val   # score again, other settings")
    say(console, f"      fewstep resume {name} --iterations {2 * config.iterations}")
    if config.recipe == "supervised":
        say(console, f"      fewstep train --initial {name} --recipe maml++   # few-shot tasks")
        return
    say(console, f"      fewstep compare {name} RUN   # with another, task by task")
    if config.dataset != "sinusoid":
        say(console, f"      fewstep predict {name} --support FOLDER --query FOLDER   # yours")


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
            num_steps=config.algorithm.eval_steps,
        )
        tested = test(Scoring())
        console.print(score_table(tested.scores))
        say(console, f"test: {tested.scores}")
        tested.save()
        if config.keep_best > 1:
            tested = test(Scoring("ensemble"))
            say(console, f"test, ensemble of {len(state.best)}: {tested.scores}")
            tested.save()
    else:
        say(console, f"stopped after iteration {state.iteration}; the checkpoint is written")
    ranks.close()
    return is_done


def _free_folder(config: RunConfig) -> Path:
    number = 1
    while (path := Path("runs") / f"{config.dataset}-{config.recipe}-{number}").exists():
        number += 1
    return path
