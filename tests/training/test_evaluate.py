"""Scores as their file holds them."""

import math

import pytest

from fewstep.experiments.seeds import over_seeds
from fewstep.training.evaluate import Scoring, read_scores
from fewstep.training.run_folder import write_json


def test_scores_that_were_not_finite_are_nan_again(tmp_path):
    values = {
        "mean": math.nan, "ci95": math.inf, "curve": [0.5, math.nan], "per_task": [0.5, math.inf],
        "views": None,
    }  # fmt: skip
    write_json(tmp_path / "a.json", values)
    found = read_scores(tmp_path / "a.json")
    assert all(map(math.isnan, (found["mean"], found["ci95"], found["curve"][1])))
    assert found["per_task"] == [0.5, pytest.approx(math.nan, nan_ok=True)]
    assert found["views"] is None
    assert math.isnan(over_seeds([found["per_task"]])["mean"])


def test_a_file_s_name_says_what_differs_from_the_run_s_own_test():
    assert Scoring("ensemble").changes == []
    scoring = Scoring(
        statistics="running", views="turned", num_tasks=3000, episodes={"ways": 3, "shots": None}
    )
    assert scoring.changes == ["ways-3", "statistics-running", "tasks-3000", "views-turned"]
