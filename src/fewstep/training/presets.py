"""Default settings of each data set: naming it is enough to learn it."""

from __future__ import annotations

from typing import Any

from fewstep.core.errors import check_name
from fewstep.training.config import (
    NETWORKS,
    SOURCES,
    ClassificationOptions,
    Conv4Options,
    MamlOptions,
    RegressionOptions,
    RunConfig,
)


def preset(dataset: str = "glyphs", network: str | None = None) -> RunConfig:
    """Return the default settings for a data set, and for a network other than its usual one.

    Raises:
        InputError: unknown name.
    """
    check_name("dataset", dataset, SOURCES)
    if network is None:
        network = "sinusoid-mlp" if dataset == "sinusoid" else "conv4"
    check_name("network", network, NETWORKS)
    base: dict[str, Any] = {
        "dataset": dataset,
        "network": network,
        "data": SOURCES[dataset](),
        "model": NETWORKS[network](),
    }
    return RunConfig(**(base | _problem_defaults(dataset, network)))


def _problem_defaults(dataset: str, network: str) -> dict[str, Any]:
    """Return what a data set sets besides its source and model."""
    one_step = MamlOptions(
        num_steps=1, eval_steps=3, inner_lr=0.4, outer_lr=3e-3, outer_schedule="cosine"
    )
    match dataset:
        case "sinusoid":
            return {
                "episodes": RegressionOptions(),
                "algorithm": MamlOptions(num_steps=1, eval_steps=10, inner_lr=0.01),
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
                "algorithm": MamlOptions(num_steps=5, eval_steps=10, inner_lr=0.05),
                "iterations": 60_000,
                "tasks": 4,
                "val_every": 1_000,
            }
            if network == "conv4":
                defaults["model"] = Conv4Options(filters=32)
            return defaults
