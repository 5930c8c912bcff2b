"""The tables and the figures of bodies that run, on short episodes of few tasks."""

import json
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console

from fewstep.cli.main import main
from fewstep.core.errors import InputError
from fewstep.experiments.policy_settings import PolicyRun, Setting
from fewstep.experiments.running import MamlAnt, MamlHalfCheetah
from fewstep.report import courses
from fewstep.rl.bodies import BODIES
from fewstep.rl.locomotion import RunningTasks
from fewstep.rl.rollouts import Rollouts

QUIET = Console(quiet=True)
SETTING = Setting(
    iterations=2, tasks=2, episodes=2, hidden=(6,), horizon=25, val_tasks=2, test_tasks=3,
    test_episodes=2,
)  # fmt: skip


@pytest.mark.pictures
def test_the_table_and_the_figures(tmp_path):
    experiment = MamlHalfCheetah(seeds=1, setting=SETTING, out=tmp_path, methods=("MAML", "oracle"))
    experiment.run(QUIET)
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("Half-cheetah direction, 2 iterations of 2 tasks of 2 episodes")
    assert "| MAML, paper | -50.69 | 293.19 | 313.48 | 315.65 |" in text
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [len(rows[method]["steps"]) for method in ("MAML", "oracle")] == [4, 1]
    for picture in ("returns.png", "courses.png"):
        with Image.open(tmp_path / picture) as image:
            assert min(image.size) > 300
    with pytest.raises(InputError, match=r"problem='half-cheetah direction', but .* velocity"):
        replace(experiment, goal="velocity").run(QUIET)


def test_the_defaults_are_those_of_the_policy_that_the_authors_test():
    setting = MamlHalfCheetah().setting
    assert (setting.iterations, setting.tasks, setting.episodes) == (300, 40, 20)
    assert (setting.max_divergence, setting.horizon, setting.hidden) == (0.02, 200, (100, 100))
    assert (setting.inner_lr, setting.test_lrs, setting.test_episodes) == (0.1, (0.1, 0.05), 20)


@pytest.mark.pictures
def test_ants_have_the_same_table_and_figures(tmp_path):
    setting = replace(SETTING, horizon=50)
    experiment = MamlAnt(seeds=1, setting=setting, out=tmp_path, methods=("MAML",))
    experiment.run(QUIET)
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("Ant direction, 2 iterations of 2 tasks of 2 episodes")
    assert "paper" not in text
    with Image.open(tmp_path / "courses.png") as image:
        assert min(image.size) > 300


@pytest.mark.parametrize(("experiment", "seconds"), [(MamlHalfCheetah, 0.01), (MamlAnt, 0.02)])
def test_courses_are_those_of_the_centre_of_mass(experiment, seconds, tmp_path, monkeypatch):
    environments = RunningTasks(BODIES[experiment.body], "test").environments(0, 1, episodes=1)
    environments.reset()
    environments._states[0, 1] = 7.0  # x
    o = environments.step(torch.zeros(1, 1, environments._model.nu)).observations
    of_time = torch.stack([o, o + 1, o + 2], 2)
    zeros, running = torch.zeros(1, 1, 3), torch.tensor([[[1.0, 1.0, 0.0]]])
    rollouts = Rollouts(of_time, zeros[..., None], zeros[..., None], zeros, running)
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *xy, **how: drawn.append(xy))
    monkeypatch.setattr(courses, "legend_below", lambda *_: None)
    experiment(out=tmp_path).draw("", [rollouts])
    ((times, x),) = drawn
    assert times.tolist() == pytest.approx([0, seconds, 2 * seconds])
    assert x[:2].tolist() == pytest.approx([7, 8], abs=0.3)
    assert x[2].isnan()  # it has fallen


def test_velocities_have_no_numbers_of_the_paper(tmp_path):
    MamlHalfCheetah(
        seeds=1, setting=SETTING, out=tmp_path, methods=("pretrained",), goal="velocity"
    ).run(QUIET)
    assert "paper" not in (tmp_path / "table.md").read_text()


def test_a_run_has_the_tasks_of_its_problem_and_seed():
    for name, goal in product(BODIES, ("direction", "velocity")):
        runs = [PolicyRun(f"{name} {goal}", "oracle", seed, SETTING) for seed in (0, 1)]
        for split in ("train", "val", "test"):
            found = [run.tasks(split) for run in runs]
            expected = RunningTasks(BODIES[name], split, goal, horizon=25, shows_goal=True)
            assert torch.equal(found[0].goals(0, 9), expected.goals(0, 9))
            assert torch.equal(*(tasks.noise(0, 1, 1, 0) for tasks in found)) == (split != "train")
            assert found[0].observation_size == expected.observation_size


def test_without_mujoco_what_to_install_is_told(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "mujoco"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("bodies", "locomotion"):
        monkeypatch.delitem(sys.modules, f"fewstep.rl.{name}")
    monkeypatch.setitem(sys.modules, "mujoco", None)
    words = ["--methods", "MAML", "--out", str(tmp_path / "out")]
    assert main(["reproduce", "maml-half-cheetah", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "fewstep: half-cheetahs and ants need mujoco, which is not installed: pip install"
    )
