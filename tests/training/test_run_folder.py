"""Which checkpoints a run keeps, and the command it notes."""

import math
import sys

import pytest
import torch
from rich.console import Console

from fewstep.experiments.pool import each
from fewstep.training import run_folder
from fewstep.training.build import Experiment
from fewstep.training.presets import preset
from fewstep.training.run_folder import RunFolder, command_line, environment

RANKS = [None, 0.3, 0.7, None, 0.5, 0.7, 0.6, 0.2]


def _saved(run: RunFolder, ranks: list[float | None], keep_best: int):
    state = None
    for iteration, rank in enumerate(ranks):
        tensors = {"iteration": torch.tensor(iteration)}
        state = run.save_checkpoint(tensors, state, iteration, rank, keep_best=keep_best)
    return state


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("keep_best", "best"), [(1, [2]), (2, [2, 5]), (3, [2, 5, 6]), (9, [2, 5, 6, 4, 1, 7])]
)
def test_the_best_are_kept_and_of_equals_the_earlier(run, keep_best, best):
    state = _saved(run, RANKS, keep_best)
    assert run.state() == state
    assert [kept.iteration for kept in state.best] == best
    files = {file.name for file in (run.path / "checkpoints").iterdir()}
    assert files == {kept.name for kept in state.best} | {state.last}
    for kept in state.best:
        assert run.load_checkpoint(kept.name)["iteration"] == kept.iteration


def test_the_newest_counts_until_a_score_does(run):
    for ranks in ([None], [None, None], [None, None, None]):
        assert [kept.iteration for kept in _saved(run, ranks, 2).best] == [len(ranks) - 1]
    assert [kept.iteration for kept in _saved(run, [None, None, 0.1, None], 2).best] == [2]
    assert [kept.iteration for kept in _saved(run, [None, math.nan, 0.1], 1).best] == [2]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/bin/fewstep", "train", "--ways", "5"], "fewstep train --ways 5"),
        (
            ["benchmarks/training.py", "--out", "a.json"],
            "python benchmarks/training.py --out a.json",
        ),
        (["/home/me/one.py"], "python one.py"),
        (["/lib/fewstep/__main__.py", "resume", "my run"], "python -m fewstep resume 'my run'"),
    ],
)
def test_the_command_can_be_typed_again(arguments, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments)
    assert command_line() == command


def _train():
    Experiment.build(preset("sinusoid", recipe="maml"))


def _reproduce():
    jobs = {"job": (1,)}
    return dict(each(abs, jobs, workers=1, ray=False, console=Console(quiet=True)))


@pytest.mark.parametrize("start", [_train, _reproduce])
def test_scores_name_the_commit_that_the_run_started_from(start, monkeypatch):
    """Not the one that is checked out when they are written."""
    checked_out = "first"
    monkeypatch.setattr(run_folder, "_git", lambda *_, folder: checked_out)
    run_folder.commit.cache_clear()
    try:
        start()
        checked_out = "second"
        assert environment("fewstep train", "cpu")["commit"] == "first with changes"
    finally:
        run_folder.commit.cache_clear()
