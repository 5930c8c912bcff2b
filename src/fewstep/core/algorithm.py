"""An algorithm is a list of parts; `recipes` names the published ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, get_args

from fewstep.core.adapted import AdaptedParameters
from fewstep.core.clipping import Clipping, NoClipping
from fewstep.core.derivative_order import DerivativeOrder, FixedOrder
from fewstep.core.errors import InputError, check_name
from fewstep.core.hypergradient import HypergradientRates
from fewstep.core.inner_start import InnerStart, SharedStart
from fewstep.core.inner_step import GradientStep, InnerStep
from fewstep.core.norm import NormAffine, NormStatistics, SharedAffine
from fewstep.core.outer import Adam, ConstantSchedule, OuterOptimiser, OuterSchedule
from fewstep.core.query_weights import FinalStep, QueryWeights
from fewstep.core.rates import InnerRate, LearnedRate

ExtraSteps = Literal["refuse", "repeat"]

# What a slot takes, and what to give in place of something else.
_SLOTS: dict[str, tuple[Any, str]] = {
    "inner_rate": (InnerRate, "ConstantRate(0.1)"),
    "query_weights": (QueryWeights, "FinalStep()"),
    "derivative_order": (DerivativeOrder, "FixedOrder(2)"),
    "adapted": (AdaptedParameters, "AdaptedParameters(('head.*',))"),
    "norm_affine": (NormAffine, "SharedAffine()"),
    "norm_statistics": (NormStatistics, "NormStatistics('batch')"),
    "inner_clipping": (Clipping, "ClipByNorm(10.0)"),
    "inner_start": (InnerStart, "SharedStart(), or of a subclass of InnerStart"),
    "inner_step": (InnerStep, "GradientStep(), or of a subclass of InnerStep"),
    "rate_update": (HypergradientRates | None, "HypergradientRates(0.001)"),
    "outer": (OuterOptimiser, "Adam(0.001), or a callable with an attribute owns_rate"),
    "outer_schedule": (OuterSchedule, "ConstantSchedule()"),
    "outer_clipping": (Clipping, "ClipByNorm(10.0)"),
}


@dataclass(frozen=True)
class Algorithm:
    """The slots that methods of the MAML family fill differently.

    start of a task:            theta[0] = s(phi, support set), by default phi
    inner loop, k = 0 .. K-1:   theta[k+1] = u(theta[k], grad L_support(theta[k]), alpha[k]),
                                by default theta[k] - alpha[k] * grad L_support(theta[k])
    meta-loss, mean over tasks: sum_k v[k] * L_query(theta[k])
    outer update:               phi <- outer(phi, d meta-loss / d phi)

    Args:
        num_steps: K, inner steps; 0 trains on the query loss at theta[0].
        inner_rate: alpha.
        query_weights: v.
        derivative_order: 2 differentiates through the inner gradients; 1 takes them as constants
            and builds no second-order graph.
        adapted: The parameters that the inner loop changes.
        norm_affine: Scale and shift of normalisation layers: shared by all steps, or one per step.
        norm_statistics: What batch normalisation normalises by.
        inner_start: s: phi for every task, or one that looks at its support set.
        inner_clipping: What happens to a task's support gradient before the step.
        inner_step: u: gradient descent, momentum, Adam, or one that is learned.
        rate_update: Who updates the inner rates that are learned; None leaves them to the outer
            optimiser.
        task_reduction: The meta-loss is the mean over the tasks of a batch, or their sum, as the
            papers write it.
        outer: The optimiser of phi.
        outer_schedule: The course of its rate over training.
        outer_clipping: What happens to the meta-gradient of parameters before the optimiser sees
            it; that of what parts learn, such as inner rates, stays as it is, as in MAML++'s code.
        iterations_per_epoch: Outer updates of an epoch, the unit of every schedule above.
        extra_steps: Where parts have a row for each step, refuse more steps than `num_steps`, or
            repeat the last row.

    Raises:
        InputError: `num_steps` is negative, `iterations_per_epoch` is not positive,
            `extra_steps` or `task_reduction` is unknown, a part does not fit its slot or gives
            what it must not at the start, or two parts do not go together.
    """

    num_steps: int
    inner_rate: InnerRate
    query_weights: QueryWeights = field(default_factory=FinalStep)
    derivative_order: DerivativeOrder = field(default_factory=FixedOrder)
    adapted: AdaptedParameters = field(default_factory=AdaptedParameters)
    norm_affine: NormAffine = field(default_factory=SharedAffine)
    norm_statistics: NormStatistics = field(default_factory=NormStatistics)
    inner_start: InnerStart = field(default_factory=SharedStart)
    inner_clipping: Clipping = field(default_factory=NoClipping)
    inner_step: InnerStep = field(default_factory=GradientStep)
    rate_update: HypergradientRates | None = None
    task_reduction: Literal["mean", "sum"] = "mean"
    outer: OuterOptimiser = field(default_factory=Adam)
    outer_schedule: OuterSchedule = field(default_factory=ConstantSchedule)
    outer_clipping: Clipping = field(default_factory=NoClipping)
    iterations_per_epoch: float = 500
    extra_steps: ExtraSteps = "refuse"

    def __post_init__(self) -> None:
        for slot, (kind, remedy) in _SLOTS.items():
            part = getattr(self, slot)
            if isinstance(part, type) or not isinstance(part, kind):  # a class has its methods
                given = " ".join(repr(part).split())
                raise InputError(
                    f"{slot}={given} of type {type(part).__name__} does not fit; give a part such "
                    f"as {remedy}"
                )
        _check_steps("num_steps", self.num_steps)
        if not self.iterations_per_epoch > 0:
            raise InputError(f"iterations_per_epoch={self.iterations_per_epoch} must be positive")
        if self.outer.owns_rate and self.outer_schedule != ConstantSchedule():
            raise InputError(
                f"{type(self.outer).__name__} and {type(self.outer_schedule).__name__} would both "
                "set the outer rate; leave one out"
            )
        if self.outer.owns_rate and self.outer_clipping != NoClipping():
            raise InputError(
                f"{type(self.outer).__name__} and {type(self.outer_clipping).__name__} do not go "
                "together: the hypergradient is that of the gradient as it is; leave one out, or "
                "give guards"
            )
        if self.rate_update is not None and not self.inner_rate.is_learned:
            raise InputError(
                f"{type(self.rate_update).__name__} has no rate to update under "
                f"{self.inner_rate}; use LearnedRate(...) or another that is learned"
            )
        is_exact = self.rate_update is None or self.rate_update.exact
        for part, needed in ((self.inner_rate, LearnedRate), (self.inner_step, GradientStep)):
            if not is_exact and not isinstance(part, needed):
                raise InputError(
                    f"HypergradientRates(exact=False) needs {needed.__name__}, not "
                    f"{type(part).__name__}; leave exact=False out"
                )
        check_name("task_reduction", self.task_reduction, ("mean", "sum"))
        check_name("extra_steps", self.extra_steps, get_args(ExtraSteps))
        self.weights_at(0.0)
        self.order_at(0.0)
        self.outer_factor_at(0.0)

    def weights_at(self, epoch: float) -> tuple[float, ...]:
        """Return v[0 .. num_steps] at an epoch.

        Raises:
            InputError: they are fewer or more, not finite, or all 0.
        """
        v = self.query_weights(self.num_steps, epoch)
        are_numbers = all(math.isfinite(weight) for weight in v)
        if len(v) != self.num_steps + 1 or not are_numbers or not any(v):
            raise InputError(
                f"{type(self.query_weights).__name__} gave the query weights {v} at epoch {epoch}; "
                f"give {self.num_steps + 1} finite numbers, for 0 to {self.num_steps} inner steps, "
                "not all of them 0"
            )
        return v

    def order_at(self, epoch: float) -> Literal[1, 2]:
        """Return the derivative order at an epoch.

        Raises:
            InputError: it is neither 1 nor 2.
        """
        order = self.derivative_order(epoch)
        if order not in (1, 2):
            raise InputError(
                f"{type(self.derivative_order).__name__} gave the derivative order {order!r} at "
                f"epoch {epoch}; give 1 or 2"
            )
        return order

    def outer_factor_at(self, epoch: float) -> float:
        """Return the factor on the outer rate at an epoch.

        Raises:
            InputError: it is negative or not finite.
        """
        factor = self.outer_schedule(epoch)
        if not (math.isfinite(factor) and factor >= 0):
            raise InputError(
                f"{type(self.outer_schedule).__name__} gave the factor {factor} on the outer rate "
                f"at epoch {epoch}; give a finite number, 0 or more"
            )
        return factor

    def check_steps(self, num_steps: int, name: str = "num_steps") -> None:
        """Check that the parts can take so many steps, called `name` where they were given.

        Raises:
            InputError: they cannot.
        """
        _check_steps(name, num_steps)
        parts = (self.inner_rate, self.inner_step, self.norm_affine, self.norm_statistics)
        per_step = [type(part).__name__ for part in parts if part.per_step]
        if num_steps > self.num_steps == 0 and self.inner_rate.per_step:
            raise InputError(
                f"{name}={num_steps} needs the rate of a step, and {per_step[0]} learned none; "
                "take 0, or train with a step or more"
            )
        if num_steps > self.num_steps and per_step and self.extra_steps == "refuse":
            raise InputError(
                f"{name}={num_steps} is more than the {self.num_steps} that "
                f"{' and '.join(per_step)} learned; take fewer, or give "
                "extra_steps='repeat' to repeat the last step's values"
            )


def _check_steps(name: str, num_steps: object) -> None:
    if not (isinstance(num_steps, Integral) and int(num_steps) >= 0):
        raise InputError(f"{name}={num_steps} must be a whole number, 0 or more inner steps")
