"""The errors of sinusoids, of a few tiny runs."""

import json
import math
import statistics
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.experiments.sinusoid import (
    QUERIES,
    RECIPES,
    TUNED_RATES,
    VAL_TASKS,
    MamlSinusoid,
    _cell,
    _errors,
    plot_errors,
)
from fewstep.training.load import load_learner
from fewstep.training.trainer import Trainer


@pytest.fixture
def experiment(tmp_path):
    return MamlSinusoid(
        methods=("MAML++", "pretrained"), seeds=2, iterations=4, points=(5, 10), hidden=4,
        val_every=2, test_tasks=3, out=tmp_path / "out",
    )  # fmt: skip


def _test(learner, split, points, tasks, steps):
    episodes = SinusoidEpisodes(split, shots=points, queries=QUERIES)
    return learner.evaluate(episodes, tasks, num_steps=steps)


@pytest.mark.pictures
def test_the_table_and_the_figures(experiment, monkeypatch):
    experiment.run(Console(quiet=True))
    rows = json.loads((experiment.out / "table.json").read_text())["rows"]
    assert list(rows) == ["MAML++", "pretrained"]
    errors = rows["MAML++"]["points"]["10"]
    assert len(errors) == 6  # after 0 to 5 steps
    learners = [load_learner(experiment.out / f"maml++-seed{seed}") for seed in range(2)]
    curves = [_test(each, "test", 10, 3, 5).curve for each in learners]
    for step, error in enumerate(errors):
        assert error["seeds"] == pytest.approx([curve[step] for curve in curves])
    table = (experiment.out / "table.md").read_text()
    assert errors[5]["median"] == pytest.approx(statistics.median(
        error for each in learners for error in _test(each, "test", 10, 3, 5).metric[:, 5].tolist()
    ))  # fmt: skip
    from_ten = table.split("| from 10 points | 0 | 1 | 5 | 10 | s per run |")[1]
    line = next(line for line in from_ten.splitlines() if line.startswith("| MAML++ |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:5] == [_cell(errors[0]), _cell(errors[1]), _cell(errors[5]), ""]  # five steps
    assert "| pretrained, paper |  | 2.41 | 2.23 | 2.19 |  |" in table
    for name in ("errors.png", "fits.png"):
        with Image.open(experiment.out / name) as picture:
            assert picture.size > (400, 200)

    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained again"))
    experiment.run(Console(quiet=True))
    assert json.loads((experiment.out / "table.json").read_text())["rows"] == rows


def test_the_baseline_takes_the_rate_that_suits_validation_best(experiment):
    alone = replace(experiment, methods=("pretrained",), seeds=1, points=(5,))
    alone.run(Console(quiet=True))
    learners = [alone._learner("pretrained", 0, "cpu", rate) for rate in TUNED_RATES]
    validation = [_test(each, "val", 5, VAL_TASKS, 10).mean for each in learners]
    best = learners[min(range(len(TUNED_RATES)), key=validation.__getitem__)]
    rows = json.loads((alone.out / "table.json").read_text())["rows"]
    means = [error["mean"] for error in rows["pretrained"]["points"]["5"]]
    assert means == pytest.approx(_test(best, "test", 5, 3, 10).curve)
    assert len({round(mean, 6) for mean in validation}) == len(TUNED_RATES)  # it is a choice


def test_rows_of_an_earlier_call_stay_in_the_table_in_order(experiment):
    for method in ("pretrained", "MAML"):
        replace(experiment, methods=(method,), seeds=1).run(Console(quiet=True))
    rows = json.loads((experiment.out / "table.json").read_text())["rows"]
    assert list(rows) == ["MAML", "pretrained"]


def test_the_settings_are_the_papers():
    config = MamlSinusoid().config("MAML", 2)
    assert (config.iterations, config.tasks, config.seed) == (70_000, 25, 2)
    assert (config.episodes.shots, config.model.hidden) == (10, 40)
    parts = config.algorithm
    assert (parts.num_steps, parts.eval_steps, parts.inner_lr, parts.outer_lr) == (
        1,
        10,
        0.01,
        1e-3,
    )
    assert MamlSinusoid().config("pretrained", 0) == replace(
        MamlSinusoid().config("MAML", 0), algorithm=replace(parts, num_steps=0)
    )
    assert MamlSinusoid(compile=True).config("MAML", 0).compile
    for method in RECIPES:
        MamlSinusoid().config(method, 0).algorithm.build(100)  # has the steps of its test


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("MALM",)}, "did you mean 'MAML'"),
        ({"methods": ()}, "methods"),
        ({"points": ()}, "points"),
        ({"points": (5, 0)}, "points=0 must be at least 1"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"test_tasks": 1}, "test_tasks=1 must be at least 2"),
    ],
)
def test_bad_input(experiment, changes, message):
    with pytest.raises(InputError, match=message):
        replace(experiment, **changes).run(Console(quiet=True))


@pytest.mark.parametrize("lost", [math.nan, math.inf, 1e9])
def test_a_task_that_diverges_leaves_the_median(lost, tmp_path):
    found = _errors([[0.1, 0.2, lost], [0.3, 0.4, 0.5]])
    assert _cell(found) == "median 0.35"
    rows = {"MAML": {"points": {5: [_errors([[3.0, 2.0, 3.0]]), found]}}}
    plot_errors(rows, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").exists()
    assert _cell(_errors([[0.1, 0.2, 0.3, 0.2]])) == "0.2 ± 0.13"
