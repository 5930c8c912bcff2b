"""A setting that does nothing is told, and what is told to do nothing does none."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from fewstep.cli.main import main
from fewstep.cli.runs import Train
from fewstep.core.errors import InputError
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.build import Experiment
from fewstep.training.config import RunConfig
from fewstep.training.effects import _NEEDS, check_effects
from fewstep.training.parse import load_config, parse
from fewstep.training.presets import preset

NO_STEPS = "--num-steps 0 --eval-steps 0"
NO_NORM = "--norm none"
# What each is refused for, once for each row of the table that names it.
IDLE = [
    (f"{NO_STEPS} --inner-lr 0.3", "inner_lr=0.3 does nothing without inner steps"),
    (f"{NO_STEPS} --inner-clip-norm 2", "inner_clip_norm=2.0 does nothing without inner steps"),
    (f"{NO_STEPS} --adapted head.*", "adapted=('head.*',) does nothing without inner steps"),
    (f"{NO_STEPS} --per-step-affine True", "per_step_affine=True does nothing without inner"),
    (f"{NO_STEPS} --per-step-statistics True", "per_step_statistics=True does nothing without in"),
    (f"{NO_STEPS} --learned-rates one", "learned_rates='one' does nothing without num_steps"),
    (
        f"{NO_STEPS} --recipe maml++ --head-lr 0.3",
        "head_lr=0.3 does nothing without num_steps of at least 1",
    ),
    (
        f"{NO_STEPS} --recipe alpha-maml --inner-hyper-lr 0.3",
        "inner_hyper_lr=0.3 does nothing without num_steps",
    ),
    (f"{NO_STEPS} --first-order-epochs 2", "first_order_epochs=2.0 does nothing without num_st"),
    (
        f"{NO_STEPS} --start prototypes --first-order-epochs 2",
        "first_order_epochs=2.0 does nothing without num_steps",
    ),
    ("--multi-step-epochs 9", "multi_step_epochs=9 does nothing without num_steps of at least 2"),
    ("--head-lr 0.5", "head_lr=0.5 does nothing without learned_rates='tensor' or 'layer'"),
    ("--hyper-step sign", "hyper_step='sign' does nothing without inner_hyper_lr or outer_hyper"),
    ("--momentum 0.5", "momentum=0.5 does nothing without outer='sgd'"),
    (
        "--outer sgd --outer-schedule constant --outer-hyper-lr 1e-3 --weight-decay 0.5",
        "weight_decay=0.5 does nothing without outer='sgd' and a rate that no outer_hyper_lr",
    ),
    (
        "--outer-schedule constant --final-outer-lr 1e-4",
        "final_outer_lr=0.0001 does nothing without outer_schedule='cosine'",
    ),
    (
        f"{NO_NORM} --num-steps 3 --per-step-affine True",
        "per_step_affine=True does nothing without layers",
    ),
    (f"{NO_NORM} --statistics running", "statistics='running' does nothing without batch norm"),
    ("--norm layer --statistics support", "statistics='support' does nothing without batch norm"),
    (
        f"{NO_NORM} --num-steps 3 --per-step-statistics True",
        "per_step_statistics=True does nothing without ba",
    ),
]


def _asked(arguments: str) -> RunConfig:
    words = f"--filters 3 --ways 2 --tasks 2 --replay False --device cpu {arguments}".split()
    return parse(Train, words, prog="fewstep train", default=Train.default(words)).settings


@pytest.mark.parametrize(("arguments", "told"), IDLE)
def test_an_idle_setting_is_refused(arguments, told):
    with pytest.raises(InputError) as error:
        check_effects(_asked(arguments))
    assert str(error.value).startswith(told)
    assert str(error.value).endswith("; leave it out")


@pytest.mark.parametrize(("arguments", "told"), IDLE)
def test_what_is_refused_does_nothing(arguments, told):
    """Without it, training and tests give the same numbers."""
    name = told.partition("=")[0]
    asked = _asked(arguments)
    other = getattr(preset(recipe=asked.recipe).algorithm, name)
    without = replace(asked, algorithm=replace(asked.algorithm, **{name: other}))
    torch.testing.assert_close(_losses(asked), _losses(without), rtol=0, atol=0)


def _losses(config: RunConfig) -> list[torch.Tensor]:
    """Return the losses of a short training and of tests after it."""
    experiment = Experiment.build(config)
    learner, episodes = experiment.learner, experiment.problem.episodes
    losses = [learner.step(episodes["train"].batch(2 * i, 2)).loss for i in range(3)]
    steps = config.algorithm.eval_steps
    return [*losses, learner.evaluate(episodes["test"], 2, num_steps=steps).loss]


def test_every_row_is_tried():
    told = {told for _, told in IDLE}
    for names, needed, _ in _NEEDS:
        for name in names:
            assert any(t.startswith(f"{name}=") and needed[:2] in t for t in told), (name, needed)
    known = {field.name for field in fields(AlgorithmOptions)}
    assert known >= {name for names, *_ in _NEEDS for name in names}


@pytest.mark.parametrize(
    "arguments",
    [
        f"--recipe maml++ {NO_STEPS}", "--recipe maml++ --num-steps 1 --eval-steps 1",
        "--recipe maml++ --outer-schedule constant", "--recipe maml++ --norm none",
        f"--recipe anil {NO_STEPS}", "--recipe prototypes", "--recipe supervised",
        "--num-steps 0 --eval-steps 2 --inner-lr 0.3", "--learned-rates layer --head-lr 0.3",
        "--outer sgd --momentum 0.5", "--num-steps 2 --multi-step-epochs 3",
        "--norm layer --per-step-affine True", "--recipe auto --hyper-step multiplicative",
    ],
)  # fmt: skip
def test_what_the_recipe_sets_and_what_does_something_pass(arguments):
    words = arguments.split()
    check_effects(parse(Train, words, prog="fewstep train", default=Train.default(words)).settings)


def test_settings_of_kept_results_pass():
    files = sorted((Path(__file__).parents[2] / "results").rglob("config.toml"))
    tried = [file for file in files if not file.parent.name.startswith("tried-")]
    assert tried
    for file in tried:
        check_effects(load_config(file))


def test_train_refuses_before_it_makes_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dataset", "sinusoid", "--multi-step-epochs", "50"]) == 2
    error = "fewstep: multi_step_epochs=50 does nothing without num_steps of at least 2; leave"
    assert capsys.readouterr().err.startswith(error)
    assert not list(tmp_path.iterdir())
