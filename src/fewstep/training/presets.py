"""Default settings of each data set: naming it is enough to learn it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

from fewstep.core.errors import InputError, check_name
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.config import SOURCES, Recipe, RunConfig
from fewstep.training.episode_options import (
    ClassificationOptions,
    RegressionOptions,
    SupervisedOptions,
)
from fewstep.training.network_options import NETWORKS, Conv4Options

HEADS = {"conv4": ("head.*",), "fully-connected": ("13.*",), "sinusoid-mlp": ("4.*",)}
PHOTOGRAPHS = ("mini-imagenet", "folder")


def preset(dataset: str = "glyphs", network: str | None = None, recipe: str = "maml") -> RunConfig:
    """Return the default settings for a data set, a network and a recipe.

    Args:
        dataset: Name of the data set.
        network: Name of the network; None takes the data set's usual one.
        recipe: Name of the recipe.

    Raises:
        InputError: unknown name.
    """
    check_name("dataset", dataset, SOURCES)
    if network is None:
        network = "sinusoid-mlp" if dataset == "sinusoid" else "conv4"
    check_name("network", network, NETWORKS)
    check_name("recipe", recipe, get_args(Recipe))
    base: dict[str, Any] = {
        "dataset": dataset,
        "network": network,
        "recipe": recipe,
        "data": SOURCES[dataset](),
        "model": NETWORKS[network](),
    }
    base |= _problem_defaults(dataset, network)
    if recipe == "supervised":
        return RunConfig(**(base | _supervised(dataset)))
    return _with_recipe(RunConfig(**base))


def _with_recipe(config: RunConfig) -> RunConfig:
    """Return the settings with the parts of their recipe in place of MAML's."""
    of = config.algorithm
    match config.recipe:
        case "fomaml":
            of = replace(of, first_order_epochs=math.inf)
        case "anil" if config.network not in HEADS:
            raise InputError(
                f"recipe='anil' adapts the last layer, whose name in network={config.network!r} "
                "only you know; give --recipe maml --adapted 'NAME.*'"
            )
        case "anil":
            of = replace(of, adapted=HEADS[config.network])
        case "meta-sgd":  # rates of one step may diverge in the next
            of = replace(of, learned_rates="element", eval_steps=of.num_steps)
        case "prototypes":
            of = replace(of, num_steps=0, eval_steps=0, start="prototypes")
        case "proto-maml":
            # A head of class means is large, and larger steps than the recipe's destroy it.
            of = replace(of, start="prototypes", inner_lr=0.01)
        case "alpha-maml":
            of = _alpha_maml(config)
        case "maml++":
            return _maml_plus_plus(config, is_paper=True)
        case "maml++-reference-code":
            return _maml_plus_plus(config, is_paper=False)
        case "auto":
            return _auto(_maml_plus_plus(config, is_paper=False))
    return replace(config, algorithm=of)


def _supervised(dataset: str) -> dict[str, Any]:
    """Return what learning all training classes sets: no inner step; images turned or moved."""
    are_photographs = dataset in PHOTOGRAPHS
    return {
        "episodes": SupervisedOptions(
            rotations="classes" if dataset == "omniglot" else "none",
            flips=are_photographs,
            shifts=8 if are_photographs else 0,
        ),
        "algorithm": AlgorithmOptions(
            num_steps=0, eval_steps=0, outer_schedule="cosine", final_outer_lr=1e-5
        ),
        "iterations": 400 if dataset == "glyphs" else 9_000,
        "tasks": 1,
        "val_every": 100 if dataset == "glyphs" else 500,
        "val_tasks": 15,
        "test_tasks": 15,
    }


def _auto(config: RunConfig) -> RunConfig:
    """Return MAML++'s settings with both rates under scale-free hypergradients."""
    algorithm = replace(
        config.algorithm,
        inner_hyper_lr=0.02,
        outer_hyper_lr=0.02,
        hyper_step="sign",
        outer_schedule="constant",
        final_outer_lr=0.0,
        clip_value=None,
    )
    return replace(config, algorithm=algorithm)


def _alpha_maml(config: RunConfig) -> AlgorithmOptions:
    """Return Alpha MAML as the paper has it, but for the mean over tasks."""
    # Sinusoids have no finite loss at the rates of images after three iterations.
    outer_lr, hyper_lr = (0.01, 1e-5) if config.dataset == "sinusoid" else (0.1, 1e-2)
    return replace(
        config.algorithm,
        learned_rates="one",
        inner_hyper_lr=hyper_lr,
        outer="sgd",
        outer_lr=outer_lr,
        outer_hyper_lr=hyper_lr,
        outer_schedule="constant",
    )


def _maml_plus_plus(config: RunConfig, *, is_paper: bool) -> RunConfig:
    """Return the settings with MAML++'s parts; `docs/maml++/index.md` has the table."""
    are_photographs, is_sinusoid = config.dataset in PHOTOGRAPHS, config.dataset == "sinusoid"
    algorithm = replace(
        config.algorithm,
        num_steps=5,
        eval_steps=5,
        inner_lr=0.01 if is_sinusoid or (are_photographs and is_paper) else 0.1,
        inner_clip_norm=10.0 if is_sinusoid else None,  # where steep tasks carry the rates off
        learned_rates="layer" if is_paper else "tensor",
        multi_step_epochs=15 if are_photographs else 10,
        first_order_epochs=50 if is_paper else 0,
        per_step_affine=True,
        per_step_statistics=True,
        statistics="running" if is_paper else "batch",
        outer_lr=1e-3,
        outer_schedule="cosine",
        final_outer_lr=1e-3 if are_photographs and not is_paper else 1e-5,
        clip_value=10.0 if are_photographs and not is_paper else None,
    )
    iterations = {"glyphs": 200, "omniglot": 6_000}.get(config.dataset, config.iterations)
    keep_best = 3 if is_paper else 5
    return replace(config, algorithm=algorithm, iterations=iterations, keep_best=keep_best)


def _problem_defaults(dataset: str, network: str) -> dict[str, Any]:
    """Return what a data set sets besides its source and model."""
    one_step = AlgorithmOptions(
        num_steps=1, eval_steps=3, inner_lr=0.4, outer_lr=3e-3, outer_schedule="cosine"
    )
    match dataset:
        case "sinusoid":
            return {
                "episodes": RegressionOptions(),
                "algorithm": AlgorithmOptions(num_steps=1, eval_steps=10, inner_lr=0.01),
                "iterations": 30_000,
                "tasks": 25,
                "chunk_size": 200,
                "val_every": 2_000,
            }
        case "omniglot":
            return {
                "episodes": ClassificationOptions(
                    queries=3, rotations="classes", eval_rotations="classes"
                ),
                "algorithm": one_step,
                "iterations": 15_000,
                "val_every": 2_500,
            }
        case "glyphs":
            return {
                "episodes": ClassificationOptions(queries=3),
                "algorithm": one_step,
                "iterations": 400,
                "val_every": 100,
                "val_tasks": 100,
            }
        case _:
            defaults: dict[str, Any] = {
                "episodes": ClassificationOptions(queries=15),
                "algorithm": AlgorithmOptions(num_steps=5, eval_steps=10, inner_lr=0.05),
                "iterations": 60_000,
                "tasks": 4,
                "val_every": 1_000,
            }
            if network == "conv4":
                defaults["model"] = Conv4Options(filters=32)
            return defaults
