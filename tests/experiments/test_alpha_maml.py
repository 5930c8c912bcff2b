"""The figures of Alpha MAML, on a few tiny images."""

import importlib.util
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from fewstep.cli.main import COMMANDS, main
from fewstep.core.errors import InputError
from fewstep.core.learner import MetaLearner
from fewstep.experiments import alpha_convergence, alpha_runs, alpha_sensitivity, pool
from fewstep.experiments.alpha_comparison import CHANGES, AlphaComparison, draw, interval
from fewstep.experiments.alpha_convergence import AlphaConvergence, plot_convergence
from fewstep.experiments.alpha_runs import Setting, numeral, train
from fewstep.experiments.alpha_sensitivity import AlphaSensitivity, _compare, plot_grids
from fewstep.experiments.maml_plus_plus import MamlPlusPlusAblation
from fewstep.experiments.pool import each
from fewstep.experiments.sweep import complete_all

QUIET = Console(quiet=True)


@pytest.fixture
def setting(monkeypatch, images):
    usual = Setting.config

    def config(self, *rates):
        return replace(usual(self, *rates), dataset="folder", data=images)

    monkeypatch.setattr(Setting, "config", config)
    alpha_runs._problem.cache_clear()
    return Setting(dataset="glyphs", ways=2, tasks=2, filters=4)


@pytest.fixture
def sensitivity(setting, tmp_path):
    return AlphaSensitivity(
        setting=setting, inner_lrs=(0.01, 0.1), outer_lrs=(0.05, 0.5, 1e30),
        hyper_lrs=("0.01,0.02",), guarded=True, iterations=12, threshold=5.0, out=tmp_path / "out",
    )  # fmt: skip


@pytest.mark.pictures
def test_the_grid(sensitivity, monkeypatch):
    sensitivity.run(QUIET)
    summary = json.loads((sensitivity.out / "grid.json").read_text())
    grids = summary["iterations_to_threshold"]
    assert list(grids) == [
        "MAML",
        "Alpha MAML, eta_alpha=0.01, eta_beta=0.02",
        "Alpha MAML, guarded, eta_alpha=0.01, eta_beta=0.02",
    ]
    # The first full window is below 5 at once; at a rate of 1e30 no number stays finite.
    assert grids["MAML"] == [[10, 10, None], [10, 10, None]]
    assert summary["shares"]["MAML"]["reached"] == 4
    with Image.open(sensitivity.out / "grid.png") as picture:
        assert picture.size > (400, 200)
    table = (sensitivity.out / "table.md").read_text()
    assert "| MAML | 4 of 6 (67%) | 0 | 4 | 0 | 2 |" in table

    monkeypatch.setattr(alpha_runs, "build_learner", lambda *_: pytest.fail("trained again"))
    sensitivity.run(QUIET)
    assert json.loads((sensitivity.out / "grid.json").read_text())["shares"] == summary["shares"]


def test_rates_that_hardly_differ_have_outcomes_of_their_own(sensitivity):
    near = replace(
        sensitivity, inner_lrs=(0.1, 0.10000001), outer_lrs=(0.1,), iterations=1,
        hyper_lrs=("0.01,0.02", "0.01,0.020000001"), guarded=False,
    )  # fmt: skip
    near.run(QUIET)
    assert len(list((near.out / "cells").iterdir())) == 6
    assert len(json.loads((near.out / "grid.json").read_text())["shares"]) == 3
    names = [f"{numeral(rate)} {rate:g}".split() for rate in (0.1, 10.0, 0.00464, 1e-5, 1e30, 0.0)]
    assert all(name == usual for name, usual in names)


def test_the_grid_names_rates_as_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(alpha_sensitivity, "save_figure", lambda figure, path: drawn.append(figure))
    rates = (0.00464, 0.0215, 2.15, 10.0)
    plot_grids({"MAML": [[1] * 4] * 4}, rates, rates, 5, tmp_path / "grid.png")
    axes = drawn[0].axes[0]
    names = ["0.00464", "0.0215", "2.15", "10"]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == names


def test_shares_count_what_contradicts_the_claim():
    counts = _compare([[5, None, 7], [None, 9, 3]], [[5, 6, None], [None, 8, 4]])
    assert counts == {
        "cells": 6, "reached": 4, "faster": 2, "equal": 1, "slower": 2, "neither": 1,
    }  # fmt: skip


def test_an_outcome(setting, tmp_path):
    config = replace(
        setting.config(0.1, 0.05, 0.01, 0.02), iterations=12, val_tasks=3, test_tasks=4
    )
    outcome = train(tmp_path / "a.json", config, val_every=5, is_tested=True)
    assert outcome["reached"] is None
    assert outcome["broken"] is None
    assert len(outcome["losses"]) == len(outcome["rates"]) == 12
    assert [iteration for iteration, _ in outcome["validation"]] == [1, 5, 10]
    first, last = outcome["rates"][0], outcome["rates"][-1]
    assert first["outer_lr"] == pytest.approx(0.05)
    for name in ("inner_lr", "outer_lr"):
        assert last[name] != outcome[name]
        assert last[f"{name}_hypergradient"] != 0
    assert outcome["test"]["num_tasks"] == config.test_tasks
    losses = outcome["losses"]
    windows = {i: statistics.mean(losses[i - 3 : i]) for i in range(3, 13)}
    least = min(windows, key=windows.__getitem__)
    above = windows[least] * (1 + 1e-6)
    assert next(i for i in range(3, 13) if losses[i - 1] < above) != least  # the last loss alone
    reached = train(tmp_path / "b.json", config, threshold=above, window=3)
    assert reached["reached"] == least
    assert reached["losses"] == losses[:least]
    bursting = replace(config, algorithm=replace(config.algorithm, outer_lr=1e30))
    broken = train(tmp_path / "c.json", bursting)
    assert broken["broken"] is not None
    assert len(broken["losses"]) == broken["broken"] - 1


def test_validations_score_the_last_step_alone(setting, tmp_path, monkeypatch):
    scored, usual = [], MetaLearner.evaluate

    def noted(learner, *arguments, every_step=True):
        scored.append(every_step)
        return usual(learner, *arguments, every_step=every_step)

    monkeypatch.setattr(MetaLearner, "evaluate", noted)
    config = replace(setting.config(0.1, 0.05, None, None), iterations=2, val_tasks=2, test_tasks=2)
    train(tmp_path / "a.json", config, val_every=1, is_tested=True)
    assert scored == [False, False, True]


@pytest.mark.pictures
def test_the_courses(setting, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        alpha_convergence, "each", lambda *a, **k: asked.append(a[1]) or each(*a, **k)
    )
    convergence = AlphaConvergence(
        setting=setting, iterations=12, val_every=5, val_tasks=3, hyper_lrs=(0.001, 0.01),
        out=tmp_path / "out",
    )  # fmt: skip
    convergence.run(QUIET)
    curves = json.loads((convergence.out / "summary.json").read_text())["curves"]
    assert "tuned: MAML" in curves
    assert len(curves) == 2 + 3 + 3
    paths = [path for path, _ in asked[0].values()]
    assert len(paths) == len(set(paths)) == 6  # MAML, and one of both rates, are in two columns
    for alpha, beta, name in ((*convergence.tuned, "tuned"), (*convergence.untuned, "untuned")):
        path = convergence.out / "curves" / f"{alpha:g}-{beta:g}-None-None.json"
        course = json.loads(path.read_text())
        found = next(c for k, c in curves.items() if k.startswith(name) and k.endswith(": MAML"))
        assert found["training_loss"] == pytest.approx(statistics.mean(course["losses"]))
        assert found["validation_loss"] == course["validation"][-1][1]
    with Image.open(convergence.out / "convergence.png") as picture:
        assert picture.size > (400, 400)


def test_the_comparison(setting, tmp_path):
    comparison = AlphaComparison(
        setting=setting, bounds=(0.01, 0.1), seeds=2, iterations=8, trials=2, val_tasks=3,
        test_tasks=3, out=tmp_path / "out",
    )  # fmt: skip
    comparison.run(QUIET)
    summary = json.loads((comparison.out / "comparison.json").read_text())
    assert list(summary["test_accuracy"]) == list(CHANGES)
    for alpha, beta in summary["initial_rates"]:
        assert 0.01 <= min(alpha, beta) <= max(alpha, beta) <= 0.1
    outcomes = comparison.out / "outcomes"

    def outcome(method, name="seed0"):
        return json.loads((outcomes / method / f"{name}.json").read_text())

    start = tuple(summary["initial_rates"][0])
    assert (outcome("maml")["inner_lr"], outcome("maml")["outer_lr"]) == start
    assert summary["test_accuracy"]["MAML"][0] == outcome("maml")["test"]["mean"]
    # Random search: two trials of two iterations, then four with the better one's rates.
    trials = [outcome("random-search", f"seed0-trial{i}") for i in range(2)]
    assert [len(t["losses"]) for t in trials] == [2, 2]
    better = min(trials, key=lambda t: t["validation"][-1][1])
    assert outcome("random-search")["inner_lr"] == better["inner_lr"]
    assert len(outcome("random-search")["losses"]) == 4
    assert "| Alpha MAML, guarded |" in (comparison.out / "table.md").read_text()
    # Every method is another one; those with a whole course differ in it.
    names = ("maml", "meta-sgd", "lslr", "alpha-maml", "alpha-maml-guarded", "alpha-maml-sign")
    courses = [tuple(outcome(name)["losses"]) for name in names]
    assert len(set(courses)) == len(names)
    assert len({course[0] for course in courses}) == 1


def test_draws_and_intervals():
    assert draw((0.001, 10), 3, 1) == draw((0.001, 10), 3, 1) != draw((0.001, 10), 3, 2)
    assert interval([0.5, 0.7]) == "60.0 ± 127.1"
    assert interval([0.5] * 30) == "50.0 ± 0.0"
    assert interval([0.0, 1.0] * 15) == "50.0 ± 19.0"


def test_the_table_of_the_comparison_is_in_percent():
    table = AlphaComparison()._markdown({"MAML": [0.5, 0.7, 0.6], "LSLR": [0.3, 0.5, 0.4]})
    assert "| MAML | 60.0 ± 24.8 | 60.0 | 50.0 | - |" in table  # 4.3027 * 10 / sqrt(3)
    assert "| LSLR | 40.0 ± 24.8 | 40.0 | 30.0 | 20.0 ± 0.0 |" in table


def test_draws_are_log_uniform_and_of_each_seed_and_trial():
    drawn = [draw((0.001, 10.0), seed, number) for seed in range(50) for number in range(8)]
    assert len(set(drawn)) == 400
    for rates in zip(*drawn, strict=True):
        assert 0.001 <= min(rates) <= max(rates) <= 10
        decades = [math.floor(math.log10(rate)) for rate in rates]
        for decade in (-3, -2, -1, 0):  # a quarter each, give or take three deviations
            assert 74 <= decades.count(decade) <= 126


@pytest.mark.parametrize("text", ["0.1", "a,b", "1,2,3"])
def test_a_wrong_pair(sensitivity, text):
    with pytest.raises(InputError, match=f"'{text}' must be two numbers"):
        replace(sensitivity, hyper_lrs=(text,)).run(QUIET)


@pytest.mark.parametrize(
    ("of", "options", "message"),
    [
        (AlphaSensitivity, {"hyper_lrs": ("0.01,0.01", "1,nan")}, "nan"),
        (AlphaSensitivity, {"inner_lrs": (0.1, -5.0)}, "-5"),
        (AlphaConvergence, {"hyper_lrs": (0.1, float("nan"))}, "nan"),
        (AlphaConvergence, {"untuned": (float("nan"), 1.0)}, "nan"),
    ],
)
def test_every_run_is_checked_before_the_first_trains(of, options, message, setting, tmp_path):
    figure = of(setting=setting, iterations=2, out=tmp_path / "out", **options)
    with pytest.raises(InputError, match=message):
        figure.run(QUIET)
    assert not figure.out.exists()


def _double(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs(workers):
    jobs = {str(i): (i,) for i in range(5)}
    found = dict(each(_double, jobs, workers=workers, ray=False, console=QUIET))
    assert found == {str(i): 2 * i for i in range(5)}


def test_ray_gives_what_workers_give(monkeypatch):
    """Of its interface only: what is begun first is done last."""
    futures, settled = {}, []

    class Ray(ModuleType):
        def init(self, **options):
            settled.append("init")

        def remote(self, **options):
            assert options == {"num_cpus": 1}
            return lambda call: SimpleNamespace(remote=partial(self._begin, call))

        def _begin(self, call, *job):
            number = f"future {len(futures)}"
            futures[number] = call(*job)
            return number

        def wait(self, waiting, num_returns):
            assert num_returns == 1
            return waiting[-1:], waiting[:-1]

        def get(self, future):
            return futures[future]

    monkeypatch.setitem(sys.modules, "ray", Ray("ray"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ray")
    monkeypatch.setattr(pool, "_settle", lambda: settled.append("job"))
    jobs = {"a": (1,), "b": (2,), "c": (3,)}
    found = list(each(_double, jobs, workers=1, ray=True, console=QUIET))
    assert found == [("c", 6), ("b", 4), ("a", 2)]
    assert settled == ["init", "job", "job", "job"]


def test_jobs_need_workers_or_ray(monkeypatch):
    with pytest.raises(InputError, match="workers=0"):
        dict(each(_double, {}, workers=0, ray=False, console=QUIET))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        dict(each(_double, {}, workers=1, ray=True, console=QUIET))


def test_jobs_are_not_done_by_every_process_of_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"torchrun started 3 processes.*leave torchrun out"):
        dict(each(_double, {"a": (1,)}, workers=1, ray=False, console=QUIET))
    with pytest.raises(InputError, match=r"torchrun started 3 processes.*leave torchrun out"):
        complete_all({}, (), QUIET, workers=1)


ENDLESS = """
import sys, time
from pathlib import Path
from rich.console import Console
from fewstep.experiments.pool import each

def endless(path):
    Path(path).touch()
    while True:
        time.sleep(0.05)
        Path(path).write_text(str(time.time()))

if __name__ == "__main__":
    import signal
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = {i: (f"{sys.argv[1]}/{i}",) for i in range(3)}
    list(each(endless, jobs, workers=2, ray=False, console=Console(quiet=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_command(tmp_path, number):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    command = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.DEVNULL)
    while not all((tmp_path / str(i)).exists() for i in range(2)):
        time.sleep(0.1)
    command.send_signal(number)
    assert command.wait(120) != 0
    time.sleep(1)
    before = [(tmp_path / str(i)).read_text() for i in range(2)]
    time.sleep(0.5)
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == before
    assert not (tmp_path / "2").exists()


def test_outcomes_of_other_settings_are_refused_and_half_ones_done_again(setting, tmp_path):
    config, path = replace(setting.config(0.1, 0.05, None, None), iterations=3), tmp_path / "a.json"
    outcome = train(path, config)
    assert train(path, replace(config, device="auto")) == outcome
    longer = replace(config, iterations=5)
    for other, how, named in (
        (longer, {}, "iterations=3, but iterations=5"),
        (replace(config, seed=1), {}, "seed=0, but seed=1"),
        (replace(config, tasks=3), {}, "tasks=2, but tasks=3"),
        (config, {"threshold": 2.0}, "threshold=None, but threshold=2.0"),
        (config, {"is_tested": True}, "test=False, but test=True"),
    ):
        with pytest.raises(InputError, match=f"{named} is asked for; choose another folder"):
            train(path, other, **how)
    path.write_bytes(path.read_bytes()[:-20])
    assert train(path, config) == outcome
    path.write_text("{}")  # of a version that did not say
    with pytest.raises(InputError, match=r"None, but .* is asked for"):
        train(path, config)


@pytest.mark.parametrize(
    "name", ["alpha-sensitivity", "alpha-convergence", "alpha-comparison", "maml++-ablation"]
)
def test_options_of_the_commands(name, monkeypatch):
    """All that --help lists, those of the setting too."""
    kind = COMMANDS[f"reproduce {name}"]
    ran = []
    monkeypatch.setattr(kind, "run", lambda options, console: ran.append(options))
    assert main(["reproduce", name, "--dataset", "glyphs", "--ways", "3", "--filters", "4"]) == 0
    (options,) = ran
    found = getattr(options, "setting", options)
    assert (found.dataset, found.ways, found.filters) == ("glyphs", 3, 4)


def test_a_course_that_breaks_at_once_is_drawn_as_far_as_it_goes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(alpha_convergence, "save_figure", lambda figure, path: drawn.append(figure))
    outcome = {"inner_lr": 0.1, "outer_lr": 0.1, "validation": []}
    plot_convergence(
        {
            ("a", "none"): outcome | {"losses": [], "rates": []},
            ("a", "few"): outcome | {"losses": [3.0] * 9, "rates": [{}] * 9},
            ("a", "enough"): outcome | {"losses": [3.0] * 11, "rates": [{}] * 11},
        },
        tmp_path / "convergence.png",
    )
    lines = drawn[0].axes[2].lines  # of the training losses
    assert [line.get_xydata().tolist() for line in lines] == [[[10.0, 3.0], [11.0, 3.0]]]
    assert lines[0].get_color() == drawn[0].axes[0].lines[2].get_color()  # as in the legend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (AlphaSensitivity(hyper_lrs=()), "hyper_lrs is empty; give at least one"),
        (AlphaSensitivity(inner_lrs=()), "inner_lrs is empty"),
        (AlphaSensitivity(threshold=float("nan")), "threshold=nan must be a finite number"),
        (AlphaSensitivity(threshold=float("inf")), "threshold=inf must be a finite number"),
        (AlphaConvergence(hyper_lrs=()), "hyper_lrs is empty"),
        (AlphaComparison(methods=()), "methods is empty"),
        (AlphaComparison(trials=0), "trials=0 must be at least 1"),
        (AlphaComparison(trials=9, iterations=16), "trials=9 .* half of iterations=16"),
        (AlphaComparison(bounds=(0.1, float("inf"))), "bounds=.* must be positive and in order"),
        (MamlPlusPlusAblation(variants=()), "variants is empty"),
    ],
    ids=range(10),
)
def test_what_gives_no_table_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        options.run(QUIET)
