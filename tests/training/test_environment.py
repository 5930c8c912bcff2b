"""The command and the commit that a run notes."""

import subprocess
import sys

import pytest
from rich.console import Console

from fewstep.experiments.pool import each
from fewstep.training import environment
from fewstep.training.build import Experiment
from fewstep.training.presets import preset


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
    assert environment.command_line() == command


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/lib/fewstep/__main__.py", "torchrun --nproc-per-node 2 -m fewstep train --tasks 8"),
        ("/home/me/one.py", "torchrun --nproc-per-node 2 one.py train --tasks 8"),
        ("/bin/fewstep", "torchrun --nproc-per-node 2 -m fewstep train --tasks 8"),
    ],
)
def test_the_command_of_several_processes_names_torchrun(program, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "train", "--tasks", "8"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment.command_line() == command


def test_a_project_that_fewstep_is_installed_in_is_not_its_source(tmp_path, monkeypatch):
    installed = tmp_path / ".venv" / "fewstep" / "environment.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    (tmp_path / ".gitignore").write_text(".venv\n")
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert environment.commit.__wrapped__() == "not from a repository"
    subprocess.run(["git", "add", "-f", installed], cwd=tmp_path, check=True)
    assert environment.commit.__wrapped__().endswith(" with changes")


def _train():
    Experiment.build(preset("sinusoid", recipe="maml"))


def _reproduce():
    jobs = {"job": (1,)}
    return dict(each(abs, jobs, workers=1, ray=False, console=Console(quiet=True)))


@pytest.mark.parametrize("start", [_train, _reproduce])
def test_scores_name_the_commit_that_the_run_started_from(start, monkeypatch):
    """Not the one that is checked out when they are written."""
    checked_out = "first"
    monkeypatch.setattr(environment, "_git", lambda *_, folder: checked_out)
    environment.commit.cache_clear()
    try:
        start()
        checked_out = "second"
        assert environment.environment("fewstep train", "cpu")["commit"] == "first with changes"
    finally:
        environment.commit.cache_clear()
