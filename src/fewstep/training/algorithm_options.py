"""The parts of a method as settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fewstep.core.adapted import AdaptedParameters
from fewstep.core.algorithm import Algorithm, ExtraSteps
from fewstep.core.clipping import ClipByNorm, ClipByValue, NoClipping
from fewstep.core.derivative_order import DerivativeAnnealing, DerivativeOrder, FixedOrder
from fewstep.core.errors import InputError
from fewstep.core.hypergradient import (
    SAFE,
    SCALE_FREE,
    Guards,
    HypergradientAdam,
    HypergradientRates,
    HypergradientSGD,
    Step,
)
from fewstep.core.inner_start import PrototypeStart, SharedStart
from fewstep.core.norm import NormStatistics, PerStepAffine, SharedAffine, Use
from fewstep.core.outer import (
    SGD,
    Adam,
    ConstantSchedule,
    CosineAnnealing,
    OuterOptimiser,
    check_outer_lr,
)
from fewstep.core.query_weights import FinalStep, MultiStepLoss
from fewstep.core.rates import (
    ConstantRate,
    ElementRates,
    InnerRate,
    LayerStepRates,
    LearnedRate,
)


@dataclass(frozen=True)
class AlgorithmOptions:
    """The parts of the method."""

    num_steps: int = 5
    """Inner steps, in training."""
    eval_steps: int = 5
    """Inner steps, in validation and test."""
    start: Literal["shared", "prototypes"] = "shared"
    """Every task starts from the same parameters, or with the mean features of its classes in the
    place of the last layer."""
    inner_lr: float = 0.1
    """Inner learning rate, for losses that are means; the initial one where it is learned."""
    learned_rates: Literal["no", "tensor", "layer", "one", "element"] = "no"
    """Learn inner rates: by step and tensor or layer (LSLR), one, or by element (Meta-SGD)."""
    head_lr: float | None = None
    """Initial rate of the last layer that is adapted, by LSLR; that of all if not given."""
    inner_clip_norm: float | None = None
    """Clip each task's support gradient to this norm."""
    inner_hyper_lr: float | None = None
    """Let the learned rates follow hypergradients, at this rate (Alpha MAML)."""
    multi_step_epochs: int = 0
    """Epochs in which the query loss after every step counts, less and less (MSL)."""
    first_order_epochs: float = 0
    """Epochs of first order before the second (DA); inf for first order throughout."""
    per_step_affine: bool = False
    """A scale and shift of normalisation layers for each step, learned by the outer loop
    (BNWB)."""
    per_step_statistics: bool = False
    """Running statistics for each step (BNRS)."""
    statistics: Use = "batch"
    """What batch norm normalises by: batch (transductive), support set or running averages."""
    adapted: tuple[str, ...] = ("*",)
    """Patterns of names of the parameters that the inner loop changes, such as "head.*" (ANIL)."""
    not_adapted: tuple[str, ...] = ()
    """Patterns of those among them that it leaves alone, such as "*.norm.*"."""
    outer: Literal["adam", "sgd"] = "adam"
    """The outer optimiser."""
    outer_lr: float = 1e-3
    """Its rate."""
    momentum: float = 0.0
    """Nesterov's momentum of sgd."""
    weight_decay: float = 0.0
    """Weight decay of sgd, on all that it updates."""
    outer_hyper_lr: float | None = None
    """Let that rate follow its hypergradient, at this rate (Alpha MAML)."""
    hyper_step: Step = "additive"
    """How a hypergradient changes a rate: by adding to it, by a factor within bounds
    (multiplicative), or by a fixed factor up or down (sign)."""
    task_reduction: Literal["mean", "sum"] = "mean"
    """The meta-loss is the mean over the tasks, or their sum."""
    outer_schedule: Literal["constant", "cosine"] = "constant"
    """Keep that rate, or let it fall along half a cosine (CA)."""
    final_outer_lr: float = 0.0
    """Where the cosine ends."""
    clip_value: float | None = None
    """Clip each element of the meta-gradient to this, up and down."""
    extra_steps: ExtraSteps = "refuse"
    """More test steps than trained: refuse, or repeat the last, where parts differ by step."""

    def __post_init__(self) -> None:
        if self.multi_step_epochs < 0:
            raise InputError(f"multi_step_epochs={self.multi_step_epochs} must be 0 or more")
        check_outer_lr(self.outer_lr)
        for name in ("inner_clip_norm", "clip_value"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise InputError(f"{name}={value} must be positive, or left out")
        if not 0 <= self.final_outer_lr <= self.outer_lr:
            raise InputError(
                f"final_outer_lr={self.final_outer_lr} must be between 0 and "
                f"outer_lr={self.outer_lr}"
            )

    def build(self, iterations: int, epoch_length: float | None = None) -> Algorithm:
        """Return the algorithm for a training of so many iterations.

        Args:
            iterations: All of them.
            epoch_length: Those of an epoch; None takes a hundredth.

        Raises:
            InputError: a part refuses its settings, or the parts cannot take `eval_steps`.
        """
        epoch_length = epoch_length or max(1, iterations) / 100
        algorithm = Algorithm(
            num_steps=self.num_steps,
            inner_start=SharedStart() if self.start == "shared" else PrototypeStart(),
            inner_rate=self._inner_rate(),
            inner_clipping=NoClipping()
            if self.inner_clip_norm is None
            else ClipByNorm(self.inner_clip_norm),
            rate_update=None
            if self.inner_hyper_lr is None
            else HypergradientRates(self.inner_hyper_lr, guards=self._guards()),
            task_reduction=self.task_reduction,
            query_weights=MultiStepLoss(self.multi_step_epochs)
            if self.multi_step_epochs
            else FinalStep(),
            derivative_order=_derivative_order(self.first_order_epochs),
            adapted=AdaptedParameters(self.adapted, self.not_adapted),
            norm_affine=PerStepAffine() if self.per_step_affine else SharedAffine(),
            norm_statistics=NormStatistics(self.statistics, self.per_step_statistics),
            outer=self._outer(),
            outer_schedule=CosineAnnealing(
                iterations / epoch_length, self.final_outer_lr / self.outer_lr
            )
            if self.outer_schedule == "cosine"
            else ConstantSchedule(),
            outer_clipping=NoClipping()
            if self.clip_value is None
            else ClipByValue(self.clip_value),
            iterations_per_epoch=epoch_length,
            extra_steps=self.extra_steps,
        )
        algorithm.check_steps(self.eval_steps, "eval_steps")
        return algorithm

    def _inner_rate(self) -> InnerRate:
        match self.learned_rates:
            case "no":
                return ConstantRate(self.inner_lr)
            case "one":
                return LearnedRate(self.inner_lr)
            case "element":
                return ElementRates(self.inner_lr)
            case per:
                return LayerStepRates(self.inner_lr, per, self.head_lr)

    def _outer(self) -> OuterOptimiser:
        if self.outer_hyper_lr is None:
            if self.outer == "adam":
                return Adam(self.outer_lr)
            return SGD(self.outer_lr, self.momentum, self.weight_decay)
        make = HypergradientAdam if self.outer == "adam" else HypergradientSGD
        return make(self.outer_lr, self.outer_hyper_lr, self._guards())

    def _guards(self) -> Guards:
        return {"additive": Guards(), "multiplicative": SAFE, "sign": SCALE_FREE}[self.hyper_step]


def _derivative_order(first_order_epochs: float) -> DerivativeOrder:
    if first_order_epochs in (0, math.inf):
        return FixedOrder(2 if first_order_epochs == 0 else 1)
    return DerivativeAnnealing(first_order_epochs)
