"""The table of MAML's paper, on a few tiny images."""

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.experiments.maml import (
    METHODS,
    NO_CONVOLUTIONS,
    PAPER,
    PROTOTYPES,
    SETTINGS,
    MamlClassification,
)
from fewstep.models.mlp import fully_connected

ONE = "5-way 1-shot"


@pytest.fixture
def experiment(tmp_path, monkeypatch, images):
    usual = MamlClassification.config

    def config(self, method, setting, seed):
        usually = usual(self, method, setting, seed)
        model, two = usually.model, replace(usually.episodes, ways=2)
        if usually.network == "conv4":
            model = replace(model, filters=4)
        return replace(usually, dataset="folder", data=images, model=model, episodes=two, tasks=2)

    monkeypatch.setattr(MamlClassification, "config", config)
    return MamlClassification(
        methods=("MAML", "MAML without convolutions"), settings=(ONE,),
        iterations=4, val_every=2, val_tasks=3, test_tasks=3, out=tmp_path / "out",
    )  # fmt: skip


@pytest.mark.pictures
def test_the_table(experiment):
    experiment.run(Console(quiet=True))
    rows = json.loads((experiment.out / "table.json").read_text())["rows"]
    for row, folder in (
        (f"MAML, {ONE}", "maml-5-way-1-shot-seed0"),
        (f"MAML without convolutions, {ONE}", "maml-without-convolutions-5-way-1-shot-seed0"),
    ):
        test = json.loads(
            (experiment.out / folder / "evaluation-test-best-3-steps.json").read_text()
        )
        assert rows[row]["single"]["mean"] == pytest.approx(test["mean"])
        assert rows[row]["paper"] == PAPER["omniglot"][row]
    lines = (experiment.out / "table.md").read_text().splitlines()
    assert any(line.startswith(f"| MAML, {ONE} | ") and "| 98.7 ± 0.4 |" in line for line in lines)
    assert (experiment.out / "curves.png").exists()


@pytest.mark.parametrize("dataset", list(PAPER))
def test_the_rows_are_the_papers_if_nothing_is_said(dataset):
    rows = [", ".join(row) for row in MamlClassification(dataset=dataset).rows()]
    assert sorted(rows) == sorted(r for r in PAPER[dataset] if r.split(", ")[0] in METHODS)
    others = MamlClassification(dataset=dataset, methods=("prototypical networks",)).rows()
    assert sorted(", ".join(row) for row in others) == sorted(set(PAPER[dataset]) - set(rows))
    few = MamlClassification(dataset=dataset, settings=(ONE,)).rows()
    assert [method for method, _ in few] == [r.split(", ")[0] for r in rows if r.endswith(ONE)]
    asked = MamlClassification(dataset=dataset, methods=("first-order MAML",), settings=(ONE,))
    assert asked.rows() == [("first-order MAML", ONE)]  # which the paper lacks for Omniglot


@pytest.mark.parametrize(
    ("dataset", "setting", "tasks", "steps", "inner_lr", "queries", "clip_value"),
    [
        ("omniglot", "5-way 1-shot", 32, (1, 3), 2.0, (1, 1), None),
        ("omniglot", "5-way 5-shot", 32, (1, 3), 2.0, (5, 5), None),
        ("omniglot", "20-way 1-shot", 16, (5, 5), 2.0, (1, 1), None),
        ("omniglot", "20-way 5-shot", 16, (5, 5), 2.0, (5, 5), None),
        ("mini-imagenet", "5-way 1-shot", 4, (5, 10), 0.05, (15, 1), 10 / 75),
        ("mini-imagenet", "5-way 5-shot", 2, (5, 10), 0.05, (15, 5), 10 / 15),
    ],
)
def test_the_settings_are_the_papers(dataset, setting, tasks, steps, inner_lr, queries, clip_value):
    config = MamlClassification(dataset=dataset).config("MAML", setting, 1)
    parts, episodes = config.algorithm, config.episodes
    assert (config.iterations, config.tasks, config.seed) == (60_000, tasks, 1)
    assert f"{episodes.ways}-way {episodes.shots}-shot" == setting
    assert (episodes.queries, episodes.eval_queries) == queries
    assert (parts.num_steps, parts.eval_steps) == steps
    assert parts.inner_lr == pytest.approx(inner_lr)
    assert (parts.outer, parts.outer_lr, parts.outer_schedule) == ("adam", 1e-3, "constant")
    assert parts.clip_value == (clip_value and pytest.approx(clip_value))
    turned = "episode" if dataset == "omniglot" else "none"
    assert (episodes.rotations, episodes.eval_rotations) == (turned, turned)
    model = config.model.build((1, 28, 28), 5)
    adapted = parts.build(100).adapted.choose(dict(model.named_parameters()))
    assert not any("norm" in name for name in adapted)
    first = MamlClassification(dataset=dataset).config("first-order MAML", setting, 1)
    assert first == replace(config, algorithm=replace(parts, first_order_epochs=math.inf))


@pytest.mark.parametrize(("method", "steps"), [("prototypical networks", 0), ("Proto-MAML", 5)])
def test_prototypes_differ_by_their_start_and_steps(method, steps):
    setting = "20-way 1-shot"
    plain, config = (MamlClassification().config(m, setting, 0) for m in ("MAML", method))
    parts = replace(
        plain.algorithm, start="prototypes", num_steps=steps, eval_steps=steps,
        inner_lr=config.algorithm.inner_lr,
    )  # fmt: skip
    assert steps == 0 or parts.inner_lr == 0.01  # of a head as large as class means
    assert config == replace(plain, recipe=PROTOTYPES[method], algorithm=parts)


def test_only_the_network_without_convolutions_is_compiled():
    experiment = MamlClassification(compile=True)
    assert [m for m in METHODS if experiment.config(m, ONE, 0).compile] == [NO_CONVOLUTIONS]
    with pytest.raises(InputError, match="compile=True is for 'MAML without convolutions', which"):
        replace(experiment, methods=("MAML",)).run(Console(quiet=True))


def test_the_network_without_convolutions_adapts_its_linear_layers():
    config = MamlClassification().config("MAML without convolutions", ONE, 0)
    names = dict(fully_connected(784, 5).named_parameters())
    adapted = config.algorithm.build(100).adapted.choose(names)
    assert sorted({int(name.split(".")[0]) for name in adapted}) == [1, 4, 7, 10, 13]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("MALM",)}, "did you mean 'MAML'"),
        ({"settings": ("5-way 1-shots",)}, "did you mean '5-way 1-shot'"),
        ({"settings": ()}, "settings"),
        ({"dataset": "mini-imagenet", "settings": ("20-way 1-shot",)}, "unknown setting"),
        ({"methods": ("first-order MAML",), "settings": None}, "name the settings, too"),
        ({"methods": ("MAML", "Proto-MAML"), "settings": None}, "no paper has 'Proto-MAML' there"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
    ],
)
def test_bad_input(experiment, changes, message):
    with pytest.raises(InputError, match=message):
        replace(experiment, **changes).run(Console(quiet=True))


def test_every_row_of_the_paper_has_a_setting():
    for dataset, rows in PAPER.items():
        assert {row.split(", ")[1] for row in rows} == set(SETTINGS[dataset])
