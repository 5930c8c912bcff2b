"""Whether settings do something, beside the others."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.core.errors import InputError
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.config import RunConfig
from fewstep.training.presets import preset


def _norm(config: RunConfig) -> str:
    """Return how the network normalises; one of the user's own may, which only it knows."""
    norm: str = getattr(config.model, "norm", "batch")
    return "none" if config.network == "sinusoid-mlp" else norm


# Settings of an algorithm, what they need to do something, and whether it is there. `not_adapted`
# is none of them: where nothing is adapted, what it names is left alone.
_NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[RunConfig], bool]], ...] = (
    (
        ("inner_lr", "inner_clip_norm", "adapted", "per_step_affine", "per_step_statistics"),
        "inner steps, of num_steps or eval_steps",
        lambda of: of.algorithm.num_steps > 0 or of.algorithm.eval_steps > 0,
    ),
    (
        ("learned_rates", "head_lr", "inner_hyper_lr", "first_order_epochs"),
        "num_steps of at least 1",
        lambda of: of.algorithm.num_steps > 0,
    ),
    (
        ("multi_step_epochs",),
        "num_steps of at least 2",
        lambda of: of.algorithm.num_steps > 1,
    ),
    (
        ("head_lr",),
        "learned_rates='tensor' or 'layer'",
        lambda of: of.algorithm.learned_rates in ("tensor", "layer"),
    ),
    (
        ("hyper_step",),
        "inner_hyper_lr or outer_hyper_lr",
        lambda of: {of.algorithm.inner_hyper_lr, of.algorithm.outer_hyper_lr} != {None},
    ),
    (
        ("momentum", "weight_decay"),
        "outer='sgd' and a rate that no outer_hyper_lr changes",
        lambda of: of.algorithm.outer == "sgd" and of.algorithm.outer_hyper_lr is None,
    ),
    (
        ("final_outer_lr",),
        "outer_schedule='cosine'",
        lambda of: of.algorithm.outer_schedule == "cosine",
    ),
    (
        ("per_step_affine",),
        "layers that normalise",
        lambda of: _norm(of) != "none",
    ),
    (
        ("statistics", "per_step_statistics"),
        "batch normalisation",
        lambda of: _norm(of) == "batch",
    ),
)


def check_effects(config: RunConfig) -> None:
    """Check that each setting of the algorithm that was asked for does something.

    What the recipe itself sets may be idle, such as its inner rate where it is given no step.

    Raises:
        InputError: one does nothing, as what it needs is not there.
    """
    recipe = preset(config.dataset, config.network, config.recipe).algorithm
    for names, needed, is_there in _NEEDS:
        for name in names:
            value = getattr(config.algorithm, name)
            usual = (getattr(recipe, name), getattr(AlgorithmOptions(), name))
            if value not in usual and not is_there(config):
                raise InputError(f"{name}={value!r} does nothing without {needed}; leave it out")
