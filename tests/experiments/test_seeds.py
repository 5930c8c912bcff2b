"""Seeds that are tested on the same tasks."""

import statistics

import pytest
from rich.console import Console

from fewstep.experiments.seeds import (
    cell,
    earlier_rows,
    mean_seconds,
    over_seeds,
    percent,
    rounded,
)


def test_seeds_that_agree_on_every_task_are_no_more_tasks():
    tasks = [0.2, 0.9, 0.4, 0.7]
    found = over_seeds([tasks] * 3)
    one = over_seeds([tasks])
    assert found["mean"] == pytest.approx(0.55)
    assert found["ci95"] == pytest.approx(3.182446305284263 * statistics.stdev(tasks) / 2)
    assert one["ci95"] == pytest.approx(found["ci95"])
    assert found["std_over_seeds"] == pytest.approx(0)
    assert "std_over_seeds" not in one


def test_seeds_that_err_on_other_tasks_tell_more():
    found = over_seeds([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
    assert (found["mean"], found["ci95"]) == (0.5, 0)
    assert found["seeds"] == [0.5, 0.5]


def test_the_time_of_a_row_is_unknown_where_one_run_s_is():
    runs = [[{"training_seconds": 10.0}, {}], [{"training_seconds": 31.0}]]
    assert rounded(mean_seconds(runs)) == "20"
    runs.append([{"training_seconds": None}])
    assert mean_seconds(runs) is None
    assert rounded(None) == "-"


def test_accuracies_are_in_percent_and_other_numbers_are_as_they_are():
    one = {"mean": 0.9765, "ci95": 0.0123, "seeds": [0.9765]}
    several = one | {"std_over_seeds": 0.0045}
    assert percent(one) == "97.65 ± 1.23"
    assert percent(several) == "97.65 ± 1.23 (0.45)"
    assert cell(several, ".3f", ".4f") == "0.977 ± 0.0123 (0.0045)"


def test_a_row_is_of_all_its_seeds_or_left_out(tmp_path, capsys):
    runs = {
        row: {tmp_path / f"{row}{seed}": seed for seed in range(2)}
        for row in ("whole", "half", "new")
    }
    for name in ("whole0", "whole1", "half0"):
        (tmp_path / name).touch()
    found = earlier_rows(
        runs, lambda path, seed: 10 + seed if path.exists() else None, Console(soft_wrap=True)
    )
    assert found == {"whole": [10, 11]}
    told = capsys.readouterr().out
    assert told == "left out of the table: half, not finished or of other settings\n"
