"""What validations and tests compute."""

import json
from pathlib import Path

import pytest

from fewstep.cli.main import main
from fewstep.core import evaluation as core_evaluation
from fewstep.core import learner
from fewstep.core.tasks import TaskBatch
from fewstep.training.build import Experiment
from fewstep.training.load import load_learner
from fewstep.training.parse import load_config
from tests.cli.conftest import train_on_images


def test_validations_score_the_last_step_alone_and_the_test_every_step(tmp_path, monkeypatch):
    scored = []

    def noted(loop, episodes, numbers, query_after, **options):
        scored.append(tuple(query_after))
        return core_evaluation.adapt_and_query(loop, episodes, numbers, query_after, **options)

    monkeypatch.setattr(learner, "adapt_and_query", noted)
    options = ["train", "--dataset", "sinusoid", "--iterations", "2", "--val-every", "1",
               "--val-tasks", "2", "--test-tasks", "2", "--keep-best", "1",
               "--eval-steps", "3"]  # fmt: skip
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    assert scored == [(3,), (3,), (0, 1, 2, 3)]


def _scores_and_losses(run: Path) -> tuple[list[float], list[list[float]]]:
    file = json.loads((run / "evaluation-test-best-5-steps.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    named = ("loss", "val_loss")
    return file["per_task"], [[m[name] for m in metrics if name in m] for name in named]


@pytest.mark.usefixtures("own_cache")
def test_as_many_ways_in_training_as_in_tests_change_nothing(tmp_path):
    command = f"{train_on_images(tmp_path / 'images')} --recipe proto-maml --eval-steps 5"
    for options in ("--out own", "--out given --train-ways 2"):
        words = f"{command} {options}".replace("--out ", f"--out {tmp_path}/")
        assert main(words.split()) == 0
    assert _scores_and_losses(tmp_path / "own") == _scores_and_losses(tmp_path / "given")


@pytest.mark.usefixtures("own_cache")
def test_training_on_more_ways_than_tests_have(tmp_path, monkeypatch):
    seen, step = [], learner.MetaLearner.step

    def noted(self, batch: TaskBatch, **options):
        seen.append(batch.y_support)
        return step(self, batch, **options)

    monkeypatch.setattr(learner.MetaLearner, "step", noted)
    run = tmp_path / "run"
    command = f"{train_on_images(tmp_path / 'images')} --recipe proto-maml --eval-steps 5"
    assert main(f"{command} --train-ways 4 --keep-best 2 --out {run}".split()) == 0
    assert all(sorted(y.tolist()) == [0, 1, 2, 3] for batch in seen for y in batch)
    scores, (_, validation) = _scores_and_losses(run)

    config = load_config(run / "config.toml")
    tests = Experiment.build(config.for_tests(), splits=["val", "test"])
    last, best = (load_learner(run, checkpoint=c, device="cpu") for c in ("last", "best"))
    episodes = tests.problem.episodes
    assert episodes["test"].batch(0, 1).y_support.tolist() == [[0, 1]]
    again = best.evaluate(episodes["test"], len(scores), num_steps=5)
    assert again.metric[:, -1].tolist() == pytest.approx(scores)
    of_val = last.evaluate(episodes["val"], config.val_tasks, num_steps=5).loss[:, -1]
    assert of_val.mean().item() == pytest.approx(validation[-1], rel=1e-6)

    assert main(f"resume {run} --iterations 6".split()) == 0
    assert main(f"evaluate {run} --split train --tasks 3".split()) == 0
    of_train = json.loads((run / "evaluation-train-best-5-steps.json").read_text())
    assert of_train["episodes"]["ways"] == 2
    assert "train_ways" not in of_train["episodes"]
