"""Tables and figures of policies, on short episodes of few tasks."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from fewstep import ConstantRate, StepRates
from fewstep.cli.main import main
from fewstep.core.errors import InputError
from fewstep.experiments import policy_runs
from fewstep.experiments.navigation import MamlNavigation
from fewstep.experiments.policy_runs import train_policy, trained_policy
from fewstep.experiments.policy_settings import METHODS, PolicyRun, Setting
from fewstep.rl import NavigationTasks, PolicyLearner, Returns
from fewstep.rl.experience import ratio_loss

QUIET = Console(quiet=True)
SETTING = Setting(
    iterations=3, tasks=3, episodes=3, hidden=(6,), horizon=5, val_every=2, val_tasks=3,
    test_tasks=4, test_episodes=3,
)  # fmt: skip


@pytest.fixture
def experiment(tmp_path):
    return MamlNavigation(seeds=2, setting=SETTING, out=tmp_path / "out")


@pytest.fixture
def run():
    return PolicyRun("navigation", "MAML", 0, SETTING)


@pytest.mark.pictures
def test_the_table_and_the_figures(experiment, monkeypatch):
    experiment.run(QUIET)
    table = json.loads((experiment.out / "table.json").read_text())
    assert list(table["rows"]) == list(experiment.methods)
    outcomes = [
        json.loads((experiment.out / f"maml-seed{seed}" / "outcome.json").read_text())
        for seed in range(2)
    ]
    for step, found in enumerate(table["rows"]["MAML"]["steps"]):
        of_seeds = [[row[step] for row in outcome["test"]["of_tasks"]] for outcome in outcomes]
        of_tasks = [statistics.mean(returns) for returns in zip(*of_seeds, strict=True)]
        assert found["seeds"] == pytest.approx([statistics.mean(r) for r in of_seeds])
        assert found["mean"] == pytest.approx(statistics.mean(of_tasks))
        assert found["ci95"] == pytest.approx(
            3.182446305284263 * statistics.stdev(of_tasks) / SETTING.test_tasks**0.5
        )
    assert len(table["rows"]["oracle"]["steps"]) == 1  # it knows the goal and takes no step
    text = (experiment.out / "table.md").read_text()
    assert "| MAML, paper | -40.41 | -11.68 | -3.33 | -3.23 |" in text
    for picture in ("returns.png", "paths.png"):
        with Image.open(experiment.out / picture) as image:
            assert min(image.size) > 300

    monkeypatch.setattr(PolicyLearner, "step", lambda *_: pytest.fail("trained again"))
    experiment.run(QUIET)
    assert json.loads((experiment.out / "table.json").read_text())["rows"] == table["rows"]


def test_rows_of_an_earlier_call_stay_in_the_table_in_order(experiment):
    for method in ("oracle", "MAML"):
        replace(experiment, seeds=1, methods=(method,)).run(QUIET)
    table = json.loads((experiment.out / "table.json").read_text())
    assert list(table["rows"]) == ["MAML", "oracle"]
    assert "| oracle |" in (experiment.out / "table.md").read_text()
    other = replace(SETTING, test_tasks=5)
    replace(experiment, seeds=1, methods=("pretrained",), setting=other).run(QUIET)
    table = json.loads((experiment.out / "table.json").read_text())
    assert list(table["rows"]) == ["pretrained"]


def test_the_picture_is_of_the_method_that_gives_most_after_its_step(experiment):
    def row(*means):
        return {"steps": [{"mean": mean} for mean in means]}

    rows = {
        "MAML": row(0.0, 2.0, 9.0),
        "first-order MAML": row(0.0, 3.0, 1.0),
        "pretrained": row(5.0, 5.0, 5.0),
        "oracle": row(9.0),
    }
    assert experiment._best(rows) == "first-order MAML"
    assert experiment._best({"pretrained": row(1.0)}) is None
    untested = replace(experiment, setting=replace(SETTING, test_steps=0))
    assert untested._best({"MAML": row(1.0), "MAML with ratios": row(2.0)}) == "MAML with ratios"


def test_methods_differ_in_what_they_say():
    """Training moves all but the random one, whose policy all others but the oracle begin with."""
    learners = {method: PolicyRun("navigation", method, 0, SETTING).learner() for method in METHODS}
    start = {method: learner.state_tensors() for method, learner in learners.items()}
    for method in ("first-order MAML", "pretrained", "random"):
        assert all(torch.equal(t, start["MAML"][n]) for n, t in start[method].items())
    assert start["oracle"]["mean.0.weight"].shape == (6, 4)
    for method, learner in learners.items():
        order = learner._loop.algorithm.derivative_order(epoch=0)
        assert order == (1 if method == "first-order MAML" else 2)
        assert METHODS[method].num_steps == learner._loop.algorithm.num_steps
        adapted = learner._loop.algorithm.adapted.choose(start[method])
        assert (adapted == ("context.vector",)) == (method == "context")
        of_ratios = learner._loop.network.judge.loss.func is ratio_loss
        assert of_ratios == (method == "MAML with ratios")


def test_settings_reach_what_they_set(run):
    other = replace(SETTING, inner_lr=0.7, max_divergence=0.3, episodes=9)
    learner = replace(run, setting=other).learner()
    assert learner._loop.algorithm.inner_rate == ConstantRate(0.7)
    assert (learner.outer.max_divergence, learner.episodes) == (0.3, 9)
    for split in ("train", "val", "test"):
        goals = [replace(run, seed=seed).tasks(split).goals(0, 4) for seed in (0, 1)]
        assert torch.equal(*goals) == (split != "train")


def test_results_that_came_without_policies_have_a_table(experiment, run):
    one = replace(experiment, seeds=1, methods=("MAML",))
    one.run(QUIET)
    for file in ("maml-seed0/policy.safetensors", "table.md", "paths.png"):
        (one.out / file).unlink()
    one.run(QUIET)
    assert "| MAML |" in (one.out / "table.md").read_text()
    assert not (one.out / "paths.png").exists()
    with pytest.raises(InputError, match=r"maml-seed0 came without its policy.safetensors"):
        trained_policy(one.out / "maml-seed0", run)


def test_a_killed_run_goes_on_to_the_bit(run, tmp_path, monkeypatch):
    straight = train_policy(tmp_path / "straight", run)
    save, calls = policy_runs._save, []

    def killed(*args):
        save(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(policy_runs, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        train_policy(tmp_path / "killed", run)
    monkeypatch.setattr(policy_runs, "_save", save)
    again = train_policy(tmp_path / "killed", run)
    for part in ("training", "validation", "updates", "test", "best"):
        assert again[part] == straight[part]
    assert len(again["updates"]) == SETTING.iterations
    assert all(0 < u["divergence"] <= SETTING.max_divergence for u in again["updates"])
    policies = [load_file(tmp_path / n / "policy.safetensors") for n in ("straight", "killed")]
    assert all(torch.equal(t, policies[1][name]) for name, t in policies[0].items())


@pytest.mark.parametrize("method", ["MAML", "random"])
def test_a_finished_run_goes_on_to_more_iterations(method, run, tmp_path):
    run = replace(run, method=method, setting=replace(SETTING, val_every=3))
    more = replace(run, setting=replace(run.setting, iterations=5))
    straight = train_policy(tmp_path / "straight", more)
    first = train_policy(tmp_path / "run", run)
    assert train_policy(tmp_path / "run", run) == first
    again = train_policy(tmp_path / "run", more)
    for part in ("run", "training", "validation", "test", "best"):
        assert again[part] == straight[part]
    with pytest.raises(InputError, match="iterations=5, but iterations=3 is asked for"):
        train_policy(tmp_path / "run", run)


def test_seeds_that_were_validated_at_other_iterations_share_a_figure(experiment):
    """As one that ended at 3 is, which goes on to 5 with another that begins."""
    some = replace(experiment, seeds=1, methods=("MAML",))
    some.run(QUIET)
    more = replace(SETTING, iterations=5)
    replace(some, seeds=2, setting=more).run(QUIET)
    of_seeds = [
        json.loads((some.out / f"maml-seed{seed}" / "outcome.json").read_text()) for seed in (0, 1)
    ]
    found = [[row[0] for row in outcome["validation"]] for outcome in of_seeds]
    assert found == [[2, 3, 4, 5], [2, 4, 5]]


def test_a_finished_run_without_its_state_is_kept(run, tmp_path):
    first = train_policy(tmp_path / "run", run)
    (tmp_path / "run" / "state.safetensors").unlink()
    more = replace(run, setting=replace(SETTING, iterations=5))
    with pytest.raises(InputError, match=r"without its state\.safetensors.* iterations=5; choose"):
        train_policy(tmp_path / "run", more)
    assert train_policy(tmp_path / "run", run) == first


@pytest.mark.parametrize("first", [1.0, math.nan])
def test_the_best_policy_in_validation_is_tested(first, run, tmp_path, monkeypatch):
    evaluate, told, seen = PolicyLearner.evaluate, iter([first, 3.0, 2.0, 3.0]), {}

    def judged(self, tasks, num_tasks, **test):
        if test:
            return evaluate(self, tasks, num_tasks, **test)
        seen[self.iteration] = self.policy.state_dict()["log_std"].clone()
        return Returns(torch.full((num_tasks, 2), next(told)))

    monkeypatch.setattr(PolicyLearner, "evaluate", judged)
    run = replace(run, setting=replace(SETTING, iterations=4, val_every=1))
    outcome = train_policy(tmp_path / "run", run)
    assert outcome["validation"][1:] == [[2, 3, 0], [3, 2, 0], [4, 3, 0]]
    learner = trained_policy(tmp_path / "run", run)
    assert learner.iteration == outcome["best"] == 2
    assert torch.equal(learner.policy.log_std, seen[2])
    tasks = NavigationTasks("test", horizon=5)
    rates = StepRates((0.1, 0.05))
    again = evaluate(learner, tasks, 4, num_steps=3, inner_rate=rates, episodes=3)
    assert outcome["test"]["curve"] == again.curve


def test_other_settings_are_refused_in_the_folder_of_a_run(run, tmp_path):
    other = replace(run, setting=replace(SETTING, inner_lr=0.5))
    train_policy(tmp_path / "done", run)
    with pytest.raises(InputError, match=r"inner_lr=0\.1, but inner_lr=0\.5 is asked for"):
        train_policy(tmp_path / "done", other)
    (tmp_path / "done" / "outcome.json").unlink()  # as if it had been killed
    with pytest.raises(InputError, match=r"inner_lr=0\.1, but inner_lr=0\.5 is asked for"):
        train_policy(tmp_path / "done", other)


@pytest.mark.parametrize("file", ["state.safetensors", "outcome.json"])
def test_a_damaged_file_is_told(file, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_bytes(b"{")
    with pytest.raises(InputError, match=f"{file}.* is damaged"):
        train_policy(tmp_path / "run", run)


def test_a_loss_that_is_not_finite_stops_with_what_to_do(tmp_path, capsys):
    words = ["--methods", "MAML", "--inner-lr", "1e30", "--horizon", "3", "--tasks", "2"]
    assert main(["reproduce", "maml-navigation", "--out", str(tmp_path / "out"), *words]) == 1
    told = capsys.readouterr().err
    assert told.startswith("fewstep: training stopped: MAML, seed 0, iteration 1: the loss is nan")
    assert told.endswith("try a smaller --inner-lr and --test-lrs, in another folder\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "mmal"], "unknown method 'mmal'; did you mean 'MAML'?"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
        (["--iterations", "-1"], "iterations=-1 must be at least 0"),
        (["--test-tasks", "1"], "test_tasks=1 must be at least 2"),
        (["--test-lrs", "0.1", "nan"], "test_lrs=(0.1, nan) must be finite rates, one or more"),
        (["--inner-lr", "nan"], "inner_lr=nan must be a finite number"),
        (["--hidden", "0"], "must have at least 1 each"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, tmp_path, capsys):
    assert main(["reproduce", "maml-navigation", "--out", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err


def test_iterations_have_tasks_of_their_own_and_validations_have_others(run, tmp_path, monkeypatch):
    starts, splits = [], []
    step, tasks = PolicyLearner.step, PolicyRun.tasks

    def noting_start(learner, environments, start, count):
        starts.append((start, count))
        return step(learner, environments, start, count)

    def noting_split(self, split):
        splits.append(split)
        return tasks(self, split)

    monkeypatch.setattr(PolicyLearner, "step", noting_start)
    monkeypatch.setattr(PolicyRun, "tasks", noting_split)
    found = train_policy(tmp_path / "run", run)
    assert starts == [(0, 3), (3, 3), (6, 3)]
    assert splits.count("val") == len(found["validation"]) == 2
    assert splits.count("test") == 1


def test_a_seed_draws_a_policy_and_training_goals(run):
    other = replace(run, seed=1)
    weights = [
        next(p for p in each.learner().policy.parameters() if p.ndim == 2) for each in (run, other)
    ]
    assert not torch.equal(*weights)
    for split in ("train", "val", "test"):
        goals = [each.tasks(split).goals(0, 4) for each in (run, other)]
        assert torch.equal(*goals) == (split != "train"), split
