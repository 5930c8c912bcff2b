"""An algorithm is a list of parts; the recipes name the published ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from fewstep.core.errors import InputError
from fewstep.core.parts import (
    Adam,
    AdaptedParameters,
    Constant,
    ConstantRate,
    FinalStep,
    InnerRate,
    OuterOptimiser,
    OuterSchedule,
    QueryWeights,
)


@dataclass(frozen=True)
class Algorithm:
    """The slots that methods of the MAML family fill differently.

    inner loop, k = 0 .. K-1:   theta[k+1] = theta[k] - alpha[k] * grad L_support(theta[k])
    meta-loss, mean over tasks: sum_k v[k] * L_query(theta[k])
    outer update:               phi <- outer(phi, d meta-loss / d phi)

    Args:
        num_steps: K, inner steps; 0 trains on the query loss of the initial parameters.
        inner_rate: alpha.
        query_weights: v.
        derivative_order: 2 differentiates through the inner gradients; 1 takes them as constants
            and builds no second-order graph.
        adapted: The parameters that the inner loop changes.
        outer: The optimiser of phi.
        outer_schedule: The course of its rate over training.

    Raises:
        InputError: `num_steps` is negative, or `derivative_order` is neither 1 nor 2.
    """

    num_steps: int
    inner_rate: InnerRate
    query_weights: QueryWeights = field(default_factory=FinalStep)
    derivative_order: Literal[1, 2] = 2
    adapted: AdaptedParameters = field(default_factory=AdaptedParameters)
    outer: OuterOptimiser = field(default_factory=Adam)
    outer_schedule: OuterSchedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise InputError(f"num_steps={self.num_steps} must be 0 or more inner steps")
        if self.derivative_order not in (1, 2):
            raise InputError(
                f"derivative_order={self.derivative_order} must be 1 (FOMAML) or 2 (MAML)"
            )


def maml(
    num_steps: int = 5,
    inner_lr: float = 0.1,
    outer_lr: float = 1e-3,
    adapted: AdaptedParameters | None = None,
) -> Algorithm:
    """MAML: learn initial parameters from which a few gradient steps solve a new task.

    theta[k+1] = theta[k] - alpha * grad L_support(theta[k]);  phi <- Adam(phi, d L_query(theta[K]))

    Args:
        num_steps: K, inner steps.
        inner_lr: alpha. Losses here are means over the examples; the authors' code sums over the
            classes, so that for N-way tasks its 0.4 is `inner_lr` = 0.4 N here.
        outer_lr: Adam's rate.
        adapted: The parameters that the inner loop changes; all by default.

    Deviation: the mean over tasks replaces the sum; Adam does not notice, but for its epsilon.

    Reference: Finn, Abbeel and Levine, Model-Agnostic Meta-Learning, ICML 2017, arXiv:1703.03400.

    >>> maml(num_steps=1, inner_lr=0.4).derivative_order
    2
    """
    return Algorithm(
        num_steps=num_steps,
        inner_rate=ConstantRate(inner_lr),
        query_weights=FinalStep(),
        derivative_order=2,
        adapted=adapted or AdaptedParameters(),
        outer=Adam(outer_lr),
    )


def fomaml(
    num_steps: int = 5,
    inner_lr: float = 0.1,
    outer_lr: float = 1e-3,
    adapted: AdaptedParameters | None = None,
) -> Algorithm:
    """First-order MAML: `maml` with the inner gradients taken as constants.

    d meta-loss / d phi = grad L_query(theta[K]), the query gradient at the adapted parameters.
    Arguments, deviation and reference as in `maml`.

    >>> fomaml(num_steps=1).derivative_order
    1
    """
    return replace(maml(num_steps, inner_lr, outer_lr, adapted), derivative_order=1)
