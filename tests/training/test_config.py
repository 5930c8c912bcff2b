import inspect
import io
import sys
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import tomli_w
import torch

import fewstep
from fewstep.cli.runs import Train
from fewstep.core.errors import InputError
from fewstep.core.hypergradient import (
    SAFE,
    SCALE_FREE,
    Guards,
    HypergradientAdam,
    HypergradientRates,
)
from fewstep.core.modules import last_layer, layer_of
from fewstep.core.outer import SGD
from fewstep.core.rates import LayerStepRates
from fewstep.data.omniglot import Omniglot
from fewstep.models import Conv4
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.config import SOURCES, Recipe, RunConfig, to_dict
from fewstep.training.network_options import NETWORKS, Conv4Options
from fewstep.training.parse import load_config, parse, run_config
from fewstep.training.presets import HEADS, preset


def _train(*arguments: str) -> Train:
    return parse(Train, arguments, prog="fewstep train", default=Train.default(arguments))


def test_no_option_means_the_glyphs():
    assert run_config([]) == preset("glyphs")


RECIPES = get_args(Recipe)
OF_CLASSES = ("supervised", "prototypes", "proto-maml")


@pytest.mark.parametrize(
    ("dataset", "recipe"),
    [(d, r) for d in SOURCES for r in RECIPES if d != "sinusoid" or r not in OF_CLASSES],
)
def test_settings_survive_their_file(tmp_path, dataset, recipe):
    config = preset(dataset, recipe=recipe)
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(to_dict(config)))
    assert load_config(path) == config


DECAY = ("algorithm.momentum", "algorithm.weight_decay")  # not beside outer_hyper_lr


SETTINGS_OF_AN_ALGORITHM = {
    "num_steps": 4, "start": "prototypes", "inner_lr": 0.3,
    "learned_rates": "layer", "head_lr": 0.2, "inner_clip_norm": 2.0,
    "inner_hyper_lr": 0.1, "multi_step_epochs": 3,
    "first_order_epochs": 2, "per_step_affine": True, "per_step_statistics": True,
    "statistics": "support", "adapted": ("head.*",), "not_adapted": ("head.*",),
    "outer": "sgd", "outer_lr": 0.02, "momentum": 0.5, "weight_decay": 0.1,
    "outer_hyper_lr": 0.2, "hyper_step": "sign",
    "task_reduction": "sum", "outer_schedule": "cosine", "final_outer_lr": 1e-4,
    "clip_value": 5.0, "extra_steps": "repeat",
}  # fmt: skip
ALONGSIDE = {
    "head_lr": {"learned_rates": "layer"},
    "inner_hyper_lr": {"learned_rates": "one"},
    "momentum": {"outer": "sgd"},
    "weight_decay": {"outer": "sgd"},
    "hyper_step": {"outer_hyper_lr": 0.1},
    "final_outer_lr": {"outer_schedule": "cosine"},
}


@pytest.mark.parametrize("name", SETTINGS_OF_AN_ALGORITHM)
def test_every_setting_of_an_algorithm_does_something(name):
    before = AlgorithmOptions(eval_steps=2, **ALONGSIDE.get(name, {}))
    after = replace(before, **{name: SETTINGS_OF_AN_ALGORITHM[name]})
    assert after.build(1000) != before.build(1000)


@pytest.mark.parametrize("iterations", [30, 60, 199, 299, 1000])
def test_a_short_training_keeps_the_shape_of_a_long_one(iterations):
    """First order for half of it, whatever its length."""
    algorithm = AlgorithmOptions(first_order_epochs=50).build(iterations)
    orders = [
        algorithm.derivative_order(i / algorithm.iterations_per_epoch) for i in range(iterations)
    ]
    assert abs(orders.count(1) - iterations / 2) <= 1
    assert orders == sorted(orders)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--iterations four", "--iterations 'four' must be a whole number; see"),
        ("--epoch-length x", "--epoch-length 'x' must be a whole number; see"),
        ("--inner-lr x", "--inner-lr 'x' must be a number; see"),
        ("--ways 1", "ways=1 must be at least 2; see"),
        ("-iterations 3", "-iterations, 3: no option takes this; options begin with two hyphens"),
        ("--root x", "--root goes with --dataset omniglot or mini-imagenet or folder, not glyphs"),
        ("--dataset sinusoid --ways 5", "--ways goes with --dataset glyphs or omniglot or mini-"),
        ("--recipe supervised --shots 5", "--shots goes with --recipe maml or fomaml or "),
        ("--examples 5", "--examples goes with --recipe supervised, not maml; leave"),
        ("--hiden 5", "unknown option '--hiden'; did you mean"),
    ],
)
def test_what_cannot_be_parsed_is_told_in_plain_words(words, told):
    with pytest.raises(InputError) as error:
        _train(*words.split())
    assert str(error.value).startswith(told)


def test_a_section_without_settings_is_told(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('network = "fully-connected"\n[model]\nfilters = 8\n')
    with pytest.raises(InputError, match="unknown key 'filters'; its section has no settings here"):
        load_config(path)


def test_all_settings_of_an_algorithm_are_tried():
    named = {field.name for field in fields(AlgorithmOptions)}
    assert named == {*SETTINGS_OF_AN_ALGORITHM, "eval_steps"}  # which no algorithm holds


@pytest.mark.parametrize(
    ("hyper_step", "guards"),
    [("additive", Guards()), ("multiplicative", SAFE), ("sign", SCALE_FREE)],
)
def test_ways_to_step_are_guards(hyper_step, guards):
    options = AlgorithmOptions(
        learned_rates="one", inner_hyper_lr=0.1, outer_hyper_lr=0.2, hyper_step=hyper_step
    )
    algorithm = options.build(1000)
    assert algorithm.rate_update == HypergradientRates(0.1, guards=guards)
    assert algorithm.outer == HypergradientAdam(1e-3, 0.2, guards)


def test_every_changed_setting_survives_the_file(tmp_path):
    changed = (
        "--dataset omniglot --root /data/o --class-split finn --size 32 --ways 20 --shots 5 "
        "--train-ways 30 --queries 2 --eval-queries 3 --rotations episode "
        "--eval-rotations episode --flips True --shifts 3 --crops 0.4 --colours 0.2 "
        "--filters 16 "
        "--norm layer --downsample stride --activation leaky-relu --conv-bias True "
        "--initialisation torch --spatial-mean True --projection True "
        "--unit-features True --head cosine "
        "--recipe fomaml "
        "--start prototypes --num-steps 2 --eval-steps 4 --inner-lr 0.3 "
        "--learned-rates layer --head-lr 0.2 --multi-step-epochs 3 --first-order-epochs 2 "
        "--inner-clip-norm 6 --clip-value 5 --statistics support "
        "--per-step-affine True --per-step-statistics True "
        "--outer-lr 0.01 --outer-schedule constant --final-outer-lr 0.001 "
        "--adapted blocks.* --not-adapted *.norm.* "
        "--inner-hyper-lr 0.1 --outer sgd --outer-hyper-lr 0.2 --hyper-step sign "
        "--task-reduction sum --extra-steps repeat --iterations 7 --epoch-length 3 --keep-best 2 "
        "--tasks 3 --chunk-size 2 --val-every 4 --val-tasks 5 --test-tasks 6 --seed 9 --device cpu "
        "--checkpoint-every 2 --memory-budget 100.5 --replay False --compile True "
        "--precision bfloat16 --initial runs/first"
    )
    settings = _train(*changed.split()).settings
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(to_dict(settings)))
    assert load_config(path) == settings
    default = preset("omniglot")
    for name, value in _leaves(settings):
        if name not in ("dataset", "network", *DECAY):
            assert value != dict(_leaves(default))[name], f"{name} was not changed"


def test_every_changed_setting_of_supervised_batches_survives_the_file(tmp_path):
    changed = "--examples 3 --held-out 0.2 --rotations classes --flips True --shifts 4"
    changed += " --crops 0.5 --colours 0.1 --outer sgd --momentum 0.9 --weight-decay 0.01"
    settings = _train("--recipe", "supervised", *changed.split()).settings
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(to_dict(settings)))
    assert load_config(path) == settings
    default = dict(_leaves(preset(recipe="supervised").episodes))
    for name, value in _leaves(settings.episodes):
        assert value != default[name], f"{name} was not changed"
    assert [dict(_leaves(settings))[name] for name in DECAY] == [0.9, 0.01]
    assert settings.algorithm.build(10).outer == SGD(settings.algorithm.outer_lr, 0.9, 0.01)


def test_the_last_layer_may_have_a_rate_of_its_own():
    rates = AlgorithmOptions(learned_rates="layer", head_lr=0.5).build(10).inner_rate
    assert rates == LayerStepRates(0.1, "layer", 0.5)


def _leaves(config):
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from ((f"{f.name}.{name}", v) for name, v in _leaves(value))
        else:
            yield f.name, value


def test_the_data_set_sets_the_defaults_and_options_override_them():
    train = _train("--dataset", "omniglot", "--class-split=finn", "--ways", "20")
    assert train.settings.data == Omniglot(class_split="finn")
    assert train.settings.episodes == replace(preset("omniglot").episodes, ways=20)


def test_the_file_gives_defaults_and_options_override_them(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('dataset = "sinusoid"\niterations = 3\n[algorithm]\ninner_lr = 0.5\n')
    settings = _train("--config", str(path), "--iterations", "4").settings
    assert settings.iterations == 4
    assert settings.algorithm == AlgorithmOptions(num_steps=1, eval_steps=10, inner_lr=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iteratons = 3", "unknown key 'iteratons'; did you mean 'iterations'?"),
        ("[algorithm]\ninner_rate = 3", "unknown key 'inner_rate'; did you mean 'inner_lr'?"),
        ('iterations = "many"', "--iterations"),
        ('dataset = "omniglott"', "unknown dataset 'omniglott'; did you mean 'omniglot'?"),
        ("iterations = ", "is not valid TOML"),
        ("[iterations]\nx = 1", "'iterations' must be a value, not a section"),
        ("data = 3", "'data' must be a section"),
        ("dataset = 5", "c.toml: unknown dataset '5'; valid are glyphs"),
        ("recipe = [1]", "unknown recipe '[1]'"),
        ("[network]\nx = 1", "unknown network \"{'x': 1}\""),
        (f"seed = {2**70}", f"seed={2**70} must be between"),
        ("memory_budget = inf", "memory_budget=inf must be positive and finite, in MiB"),
        (
            '[algorithm]\nnot_adapted = ["--seed", "5"]',
            "not_adapted has '--seed', which reads as an",
        ),
        ('[algorithm]\nnot_adapted = ["-x"]', "reads as an option; write its hyphen as '[-]'"),
        ('initial = ""', "c.toml: --initial '' is empty; give a value or leave it out"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        run_config(["--config", str(path)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_word_with_a_hyphen_is_no_option(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('initial = "--seed=3"\n[algorithm]\nnot_adapted = ["[-]x"]')
    config = load_config(path)
    assert (config.initial, config.seed) == (Path("--seed=3"), 0)
    assert config.algorithm.not_adapted == ("[-]x",)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--itrations", "3"], "unknown option '--itrations'; did you mean '--iterations'?"),
        (["--iterations", "x"], "--iterations"),
        (["--iterations", "0"], "iterations=0 must be at least 1"),
        (["--outer-lr", "-1"], "outer_lr=-1.0 must be a positive number"),
        (["--final-outer-lr", "1"], "final_outer_lr=1.0 must be between 0 and outer_lr=0.003"),
        (["--clip-value", "-1"], "clip_value=-1.0 must be positive"),
        (["--inner-clip-norm", "0"], "inner_clip_norm=0.0 must be positive"),
        (["--clip-value", "nan"], "clip_value=nan must be positive"),
        (["--checkpoint-every", "0"], "checkpoint_every=0 must be at least 1 step"),
        (["--memory-budget", "0"], "memory_budget=0.0 must be positive and finite, in MiB"),
        (["--seed", str(2**64)], f"seed={2**64} must be between {-(2**63)} and {2**64 - 1}"),
        (["--seed", str(-(2**63) - 1)], "must be between"),
        (["--initial", ""], "--initial '' is empty"),
        (["--initial="], "--initial '' is empty"),
        (["--dataset", "sinusoid", "--ways", "3"], "--ways goes with --dataset glyphs"),
        (["--dataset", "omniglot", "--class-split", "lake"], "'lake'"),
        (["--network", "conv5"], "unknown network 'conv5'; did you mean 'conv4'?"),
        (["--dataset", "sinusoid", "--network", "conv4"], "network='conv4' does not fit"),
        (["--dataset", "sinusoid", "--recipe", "supervised"], "learns classes, and dataset='sin"),
        (["--dataset", "sinusoid", "--recipe", "proto-maml"], "start='prototypes' learns classes"),
        (["--recipe", "supervised", "--ways", "3"], "--ways goes with --recipe maml"),
        (["--train-ways", "20"], "train_ways=20: the last layer, or its inner rates, are learned"),
        (
            ["--recipe", "prototypes", "--train-ways", "20", "--learned-rates", "element"],
            "train with --start prototypes and no --learned-rates element",
        ),
        (["--recipe", "prototypes", "--train-ways", "1"], "train_ways=1 must be at least 2"),
        (["--recipe", "supervised", "--start", "prototypes"], "no support set to adapt to or to"),
        (["--recipe", "supervised", "--num-steps", "1"], "no support set to adapt to or to"),
        (["--recipe", "supervised", "--statistics", "support"], "leave out num_steps, eval_steps"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(arguments, message, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(InputError) as error:
        _train(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "least", "greatest"), [
    ("iterations", 1, None), ("tasks", 1, None), ("chunk_size", 1, None), ("keep_best", 1, None),
    ("val_every", 1, None), ("epoch_length", 1, None), ("checkpoint_every", 1, None),
    ("val_tasks", 2, None), ("test_tasks", 2, None),  # an interval needs two
    ("seed", -(2**63), 2**64 - 1),
])  # fmt: skip
def test_the_least_and_the_greatest_of_a_whole_number_are_taken(name, least, greatest):
    config = preset()
    for value, beyond in ((least, least - 1), (greatest, greatest and greatest + 1)):
        if value is not None:
            assert getattr(replace(config, **{name: value}), name) == value
            with pytest.raises(InputError, match=f"{name}={beyond} must be "):
                replace(config, **{name: beyond})


def test_a_schedule_may_end_where_it_began():
    same = AlgorithmOptions(outer_lr=0.1, outer_schedule="cosine", final_outer_lr=0.1)
    assert same.build(10).outer_schedule.final == 1


def test_no_epochs_of_multi_step_losses_are_the_final_loss():
    assert AlgorithmOptions(multi_step_epochs=0).build(10).query_weights == fewstep.FinalStep()
    with pytest.raises(InputError, match="multi_step_epochs=-1 must be 0 or more"):
        AlgorithmOptions(multi_step_epochs=-1)


def test_a_test_may_adapt_some_parameters_where_training_adapts_none():
    config = preset(recipe="prototypes")
    steps = replace(config.algorithm, eval_steps=3, adapted=("head.*",))
    assert replace(config, algorithm=steps).algorithm == steps


def test_parts_must_fit_their_names():
    with pytest.raises(InputError, match="dataset='omniglot' goes with data of type Omniglot"):
        RunConfig(dataset="omniglot")
    with pytest.raises(InputError, match="recipe='supervised' goes with episodes of type Superv"):
        RunConfig(recipe="supervised")


def test_every_network_has_a_preset():
    for network in set(NETWORKS) - {"sinusoid-mlp"}:
        assert preset("omniglot", network).network == network
    assert isinstance(preset("omniglot").data, Omniglot)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("maml", partial(fewstep.maml, 5, 0.1)),
        ("fomaml", partial(fewstep.fomaml, 5, 0.1)),
        ("anil", partial(fewstep.anil, 5, 0.1)),
        (
            "alpha-maml",
            partial(
                fewstep.alpha_maml,
                1,
                0.4,
                inner_hyper_lr=1e-2,
                outer_hyper_lr=1e-2,
                task_reduction="mean",
            ),
        ),
        ("maml++", partial(fewstep.maml_plus_plus, iterations_per_epoch=60)),
        ("auto", partial(fewstep.auto, iterations_per_epoch=60)),
        (
            "maml++-reference-code",
            partial(fewstep.maml_plus_plus, iterations_per_epoch=60, version="reference_code"),
        ),
    ],
)
def test_a_recipe_has_the_same_parts_here_and_in_python(name, recipe):
    settings = preset("omniglot", recipe=name).algorithm
    if name in ("maml", "fomaml", "anil"):
        settings = replace(
            settings, num_steps=5, inner_lr=0.1, outer_lr=1e-3, outer_schedule="constant"
        )
    algorithm = settings.build(iterations=6000)
    same_unit = {"iterations_per_epoch": 60}
    assert replace(algorithm, **same_unit) == replace(recipe(), **same_unit)


@pytest.mark.parametrize("network", HEADS)
def test_anil_adapts_the_last_layer_of_every_network(network):
    dataset = "sinusoid" if network == "sinusoid-mlp" else "omniglot"
    config = preset(dataset, network, "anil")
    names = dict(config.model.build((1, 28, 28), 5).named_parameters())
    adapted = config.algorithm.build(100).adapted.choose(names)
    assert [n for n in names if layer_of(n) == last_layer(names)] == list(adapted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("filters", 6), ("norm", "layer"), ("downsample", "stride"), ("activation", "leaky-relu"),
        ("conv_bias", True), ("initialisation", "finn"), ("spatial_mean", True),
        ("projection", True), ("unit_features", True), ("head", "cosine"),
    ],
)  # fmt: skip
def test_every_option_of_conv4_reaches_it(name, value):
    def described(network):
        return repr(network), {name: t.tolist() for name, t in network.state_dict().items()}

    torch.manual_seed(0)
    own = Conv4Options(**{"filters": 4, name: value}).build((1, 32, 32), 3)
    torch.manual_seed(0)
    expected = Conv4(1, 3, 32, **{"filters": 4, "bias": False, name.removeprefix("conv_"): value})
    torch.manual_seed(0)
    plain = Conv4(1, 3, 32, filters=4)
    assert described(own) == described(expected) != described(plain)


def test_the_options_of_conv4_are_its_arguments():
    named = {option.name.removeprefix("conv_") for option in fields(Conv4Options)}
    arguments = inspect.signature(Conv4).parameters
    assert named == arguments.keys() - {"in_channels", "ways", "size"}


def test_no_ways_are_not_those_of_the_run():
    config = preset("glyphs", recipe="prototypes")
    assert config.for_tests() == config
    with pytest.raises(InputError, match="ways=0 must be at least 2"):
        config.for_tests(0)


@pytest.mark.parametrize(
    ("dataset", "recipe", "inner_lr", "multi_step", "final_outer_lr", "clip_value", "keep_best"),
    [
        ("omniglot", "maml++", 0.1, 10, 1e-5, None, 3),
        ("omniglot", "maml++-reference-code", 0.1, 10, 1e-5, None, 5),
        ("mini-imagenet", "maml++", 0.01, 15, 1e-5, None, 3),
        ("mini-imagenet", "maml++-reference-code", 0.1, 15, 1e-3, 10.0, 5),
    ],
)
def test_maml_plus_plus_has_the_values_of_paper_and_code(
    dataset, recipe, inner_lr, multi_step, final_outer_lr, clip_value, keep_best
):
    """As the table of docs/maml++/index.md has them."""
    config = preset(dataset, recipe=recipe)
    of = config.algorithm
    assert (of.num_steps, of.eval_steps, of.inner_lr) == (5, 5, inner_lr)
    assert of.multi_step_epochs == multi_step
    assert (of.outer_schedule, of.final_outer_lr) == ("cosine", final_outer_lr)
    assert (of.clip_value, of.inner_clip_norm) == (clip_value, None)
    assert config.keep_best == keep_best


def test_sinusoids_have_the_values_of_mamls_paper():
    config = preset("sinusoid")
    assert (config.algorithm.num_steps, config.algorithm.inner_lr, config.tasks) == (1, 0.01, 25)
    assert (config.algorithm.outer, config.algorithm.outer_lr) == ("adam", 1e-3)
    assert preset("sinusoid", recipe="maml++").algorithm.inner_clip_norm == 10


def test_photographs_have_the_steps_and_tasks_of_mamls_paper():
    config = preset("mini-imagenet")
    assert (config.algorithm.num_steps, config.algorithm.eval_steps) == (5, 10)
    assert config.algorithm.inner_lr == pytest.approx(5 * 0.01)  # a mean where the code sums
    assert (config.iterations, config.tasks, config.model.filters) == (60_000, 4, 32)
    assert (config.episodes.queries, config.episodes.eval_queries) == (15, 15)
