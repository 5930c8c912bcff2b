"""MAML++ from a classifier, on a few tiny images."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.experiments.from_classifier import MamlPlusPlusFromClassifier
from fewstep.experiments.sweep import check_same
from fewstep.models.features import projection_of
from fewstep.training.config import to_dict
from fewstep.training.episode_options import SupervisedOptions
from fewstep.training.parse import load_config
from fewstep.training.run_folder import RunFolder
from fewstep.training.trainer import Trainer

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def experiment(tmp_path, monkeypatch, images):
    usual = MamlPlusPlusFromClassifier.stages

    def stages(self):
        return {name: tiny(config) for name, config in usual(self).items()}

    def tiny(config):
        size = 16 if getattr(config.data, "size", 28) == 42 else 32
        episodes = config.episodes
        if isinstance(episodes, SupervisedOptions):
            episodes = replace(episodes, examples=8, held_out=0.3)
        else:
            episodes = replace(episodes, queries=1, eval_queries=2)
        return replace(
            config, dataset="folder", data=replace(images, size=size), episodes=episodes,
            val_every=2,
        )  # fmt: skip

    monkeypatch.setattr(MamlPlusPlusFromClassifier, "stages", stages)
    return MamlPlusPlusFromClassifier(
        ways=2, classifier_iterations=9, iterations=4, tasks=2, filters=4, val_tasks=3,
        test_tasks=3, out=tmp_path / "out",
    )  # fmt: skip


@pytest.mark.pictures
def test_every_run_starts_where_the_one_before_ended(experiment, monkeypatch, capsys):
    starts, train = {}, Trainer.train

    def watched(self):
        drawn = self.experiment.learner.state_tensors()
        starts[self.run.path.name] = {name: tensor.clone() for name, tensor in drawn.items()}
        return train(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", watched)
        experiment.run(Console())
    assert list(starts) == [
        "classifier-42", "classifier-84", "classifier-84-sgd",
        "classifier-84-shifts", "maml++",
    ]  # fmt: skip
    for source, target in pairwise(starts):
        run = RunFolder(experiment.path_of(source))
        weights = run.load_checkpoint(run.state().best[0].name)
        taken = {name for name in weights if name.endswith("conv.weight")}
        assert len(taken) == 4
        if target != "maml++":  # of the same classes and, by the mean, the same features
            taken.add("model.head.weight")
        for name in taken:
            assert torch.equal(starts[target][name], weights[name])
    assert not starts["maml++"]["model.head.weight"].any()
    projection = starts["maml++"]["model.blocks.projection.weight"]
    assert torch.equal(projection, projection_of(weights["model.head.weight"]))
    assert not torch.equal(projection, torch.eye(4))

    of_tasks = experiment.path_of("maml++").parent
    found = json.loads((of_tasks / "table.json").read_text())["runs"]
    assert [len(scores) for scores in found.values()] == [1, 1, 1, 1, 6]
    table = (of_tasks / "table.md").read_text()
    for name, row, score in (
        ("classifier-84", "images of the training classes held out", found["classifier-84"][0]),
        ("maml++", "one model", found["maml++"][0]),
        ("maml++", "ensemble of 2", found["maml++"][1]),
        ("maml++", "by batch statistics", found["maml++"][3]),
        ("maml++", "by support statistics", found["maml++"][2]),
        ("maml++", "ensemble of 2, mirrored views", found["maml++"][5]),
    ):
        assert f"| {name}, {row} | {100 * score['mean']:.2f} ± " in table
    used = [score["statistics"].split()[0] for score in found["maml++"]]
    assert used == ["running", "running", "support", "batch", "running", "running"]
    assert [score["views"] for score in found["maml++"]] == [None] * 4 + ["mirrored"] * 2
    assert "| paper, from drawn parameters | - | |" in table
    with Image.open(of_tasks / "curves.png") as picture:
        assert picture.size > (400, 200)
    assert f"fewstep predict {of_tasks / 'maml++'}" in capsys.readouterr().out.replace("\n", "")

    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained again"))
    experiment.run(Console(quiet=True))
    assert json.loads((of_tasks / "table.json").read_text())["runs"] == found


def test_an_interrupted_one_goes_on(experiment, monkeypatch, capsys):
    train = Trainer.train

    def stops(self):
        state, is_done = train(self)
        return state, is_done and self.run.path.name != "classifier-84"

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stops)
        experiment.run(Console())
    assert "is not done yet; the same command goes on" in capsys.readouterr().out.replace("\n", " ")
    table = experiment.path_of("maml++").parent / "table.json"
    assert not table.exists()
    experiment.run(Console(quiet=True))
    assert table.exists()
    initial = load_config(experiment.path_of("maml++") / "config.toml").initial
    assert initial == experiment.out / "classifier-84-shifts"


MINI_CLASSIFIERS = [
    f"supervised-mini-imagenet-{name}" for name in ("mean-42", "mean", "sgd", "shifts")
]


@pytest.mark.parametrize(
    ("options", "folders", "free"),
    [
        (
            {},
            [*MINI_CLASSIFIERS, "maml++-mini-5w1s-running"],
            {"device", "initial", "val_every"},
        ),
        (
            {"shots": 5, "tasks": 2, "iterations": 1_400},
            [*MINI_CLASSIFIERS, "maml++-mini-5w5s-projection"],
            {"device", "initial", "val_every"},
        ),
        (
            {"dataset": "omniglot"},
            ["supervised-omniglot", "supervised-omniglot-mirrored", "maml++-20w1s-projection"],
            {"device", "initial", "val_every"},
        ),
    ],
)
def test_the_settings_are_those_that_were_measured(options, folders, free):
    stages = MamlPlusPlusFromClassifier(**options).stages().values()
    for config, folder in zip(stages, folders, strict=True):
        measured = load_config(RESULTS / folder / "config.toml")
        own = replace(config, **{name: getattr(measured, name) for name in free})
        if folder in MINI_CLASSIFIERS[1:]:  # nothing but a head was drawn, at most
            model = replace(own.model, initialisation=measured.model.initialisation)
            own = replace(own, model=model)
        if folder == MINI_CLASSIFIERS[-1]:  # whose ensemble was tested, too
            own = replace(own, keep_best=measured.keep_best)
        assert own == measured


def test_one_shot_alone_goes_on_with_the_classifiers_statistics():
    one, two, five = (MamlPlusPlusFromClassifier(shots=shots).stages() for shots in (1, 2, 5))
    *classifiers, last = one
    assert all(one[name] == five[name] for name in classifiers)
    assert [stages[last].algorithm.statistics for stages in (one, two)] == ["running", "batch"]
    assert five[last].episodes.shots == 5
    assert two == {**five, last: replace(five[last], episodes=two[last].episodes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier_iterations": 3}, "classifier_iterations=3 must be at least 4"),
        (
            {"dataset": "omniglot", "classifier_iterations": 1},
            "classifier_iterations=1 must be at least 2",
        ),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"tasks": 0}, "tasks=0 must be at least 1"),
        ({"ways": 99}, "ways=99 asks for more classes than"),
        ({"shots": 4}, "shots=4 and queries=2 need 6 images of every class"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(experiment, changes, message):
    with pytest.raises(InputError, match=message):
        replace(experiment, **changes).run(Console(quiet=True))
    assert not experiment.out.exists()


def test_a_folder_may_be_named_otherwise_or_moved(experiment, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = replace(experiment, out=Path("out")).stages()["maml++"]
    assert config.initial == tmp_path / "out" / "classifier-84-shifts"
    moved = replace(experiment, out=tmp_path / "moved")
    held, asked = to_dict(config), moved.stages()["maml++"]
    check_same(moved.path_of("maml++"), held, asked)
    with pytest.raises(InputError, match=r"holds a run with initial="):
        check_same(tmp_path / "elsewhere" / "maml++", held, asked)
    with pytest.raises(InputError, match=r"holds a run with initial="):
        check_same(moved.path_of("maml++"), held | {"initial": "out/other"}, asked)


def test_other_tasks_share_the_classifiers(experiment):
    one, five = experiment, replace(experiment, shots=5)
    *classifiers, _ = one.stages()
    for name in classifiers:
        assert one.stages()[name] == five.stages()[name]
        assert one.path_of(name) == five.path_of(name)
    assert one.path_of("maml++") != five.path_of("maml++")
