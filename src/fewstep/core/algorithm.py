"""An algorithm is a list of parts; the recipes name the published ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from fewstep.core.adapted import AdaptedParameters
from fewstep.core.clipping import Clipping, NoClipping
from fewstep.core.derivative_order import DerivativeAnnealing, DerivativeOrder, FixedOrder
from fewstep.core.errors import InputError, check_name
from fewstep.core.hypergradient import (
    SAFE,
    SCALE_FREE,
    Guards,
    HypergradientAdam,
    HypergradientRates,
    HypergradientSGD,
)
from fewstep.core.norm import NormAffine, NormStatistics, PerStepAffine, SharedAffine
from fewstep.core.outer import Adam, Constant, CosineAnnealing, OuterOptimiser, OuterSchedule
from fewstep.core.query_weights import FinalStep, MultiStepLoss, QueryWeights
from fewstep.core.rates import ConstantRate, InnerRate, LayerStepRates, LearnedRate

ExtraSteps = Literal["refuse", "repeat"]


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
        norm_affine: Whose scale and shift normalisation layers have.
        norm_statistics: What batch normalisation normalises by.
        inner_clipping: What happens to a task's support gradient before the step.
        rate_update: Who updates the inner rates that are learned; None leaves them to the outer
            optimiser.
        task_reduction: The meta-loss is the mean over the tasks of a batch, or their sum, as the
            papers write it.
        outer: The optimiser of phi.
        outer_schedule: The course of its rate over training.
        clipping: What happens to the meta-gradient of the module's parameters before the optimiser
            sees it; that of learned inner rates stays as it is, as in MAML++'s code.
        iterations_per_epoch: Outer updates of an epoch, the unit of every schedule above.
        extra_steps: Where parts have a row for each step, refuse more steps than `num_steps`, or
            repeat the last row.

    Raises:
        InputError: `num_steps` is negative, `iterations_per_epoch` is not positive,
            `extra_steps` or `task_reduction` is unknown, or two parts do not go
            together.
    """

    num_steps: int
    inner_rate: InnerRate
    query_weights: QueryWeights = field(default_factory=FinalStep)
    derivative_order: DerivativeOrder = field(default_factory=FixedOrder)
    adapted: AdaptedParameters = field(default_factory=AdaptedParameters)
    norm_affine: NormAffine = field(default_factory=SharedAffine)
    norm_statistics: NormStatistics = field(default_factory=NormStatistics)
    inner_clipping: Clipping = field(default_factory=NoClipping)
    rate_update: HypergradientRates | None = None
    task_reduction: Literal["mean", "sum"] = "mean"
    outer: OuterOptimiser = field(default_factory=Adam)
    outer_schedule: OuterSchedule = field(default_factory=Constant)
    clipping: Clipping = field(default_factory=NoClipping)
    iterations_per_epoch: float = 500
    extra_steps: ExtraSteps = "refuse"

    def __post_init__(self) -> None:
        if isinstance(self.inner_rate, int | float):
            raise InputError(
                f"inner_rate={self.inner_rate} is a number; give ConstantRate({self.inner_rate})"
            )
        if self.num_steps < 0:
            raise InputError(f"num_steps={self.num_steps} must be 0 or more inner steps")
        if not self.iterations_per_epoch > 0:
            raise InputError(f"iterations_per_epoch={self.iterations_per_epoch} must be positive")
        if self.outer.owns_rate and self.outer_schedule != Constant():
            raise InputError(
                f"{type(self.outer).__name__} and {type(self.outer_schedule).__name__} would both "
                "set the outer rate; leave one out"
            )
        if self.outer.owns_rate and self.clipping != NoClipping():
            raise InputError(
                f"{type(self.outer).__name__} and {type(self.clipping).__name__} do not go "
                "together: the hypergradient is that of the gradient as it is; leave one out, or "
                "give guards"
            )
        if self.rate_update is not None and not self.inner_rate.is_learned:
            raise InputError(
                f"{type(self.rate_update).__name__} has no rate to update under "
                f"{self.inner_rate}; use LearnedRate(...) or another that is learned"
            )
        is_exact = self.rate_update is None or self.rate_update.exact
        if not is_exact and not isinstance(self.inner_rate, LearnedRate):
            raise InputError(
                f"HypergradientRates(exact=False) needs LearnedRate, not "
                f"{type(self.inner_rate).__name__}; leave exact=False out"
            )
        check_name("task_reduction", self.task_reduction, ("mean", "sum"))
        check_name("extra_steps", self.extra_steps, get_args(ExtraSteps))

    def check_steps(self, num_steps: int, name: str = "num_steps") -> None:
        """Check that the parts can take so many steps, called `name` where they were given.

        Raises:
            InputError: they cannot.
        """
        if num_steps < 0:
            raise InputError(f"{name}={num_steps} must be 0 or more inner steps")
        parts = (self.inner_rate, self.norm_affine, self.norm_statistics)
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
    FixedOrder(order=2)
    """
    return Algorithm(
        num_steps=num_steps,
        inner_rate=ConstantRate(inner_lr),
        query_weights=FinalStep(),
        derivative_order=FixedOrder(2),
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
    FixedOrder(order=1)
    """
    return replace(maml(num_steps, inner_lr, outer_lr, adapted), derivative_order=FixedOrder(1))


def maml_plus_plus(
    num_steps: int = 5,
    inner_lr: float = 0.1,
    outer_lr: float = 1e-3,
    *,
    num_epochs: int = 100,
    iterations_per_epoch: int = 500,
    version: Literal["paper", "reference_code"] = "paper",
) -> Algorithm:
    """MAML++: MAML with six parts exchanged.

    theta[k+1] = theta[k] - alpha[layer, k] * grad L_support(theta[k]);  loss sum_k v[k] L_query

    Args:
        num_steps: K, inner steps.
        inner_lr: Initial value of every learned rate (LSLR).
        outer_lr: Adam's rate at the start, falling to a hundredth along half a cosine (CA).
        num_epochs: Epochs of the whole training.
        iterations_per_epoch: Outer updates of an epoch.
        version: "paper" has every part as the paper's text describes it: derivative-order
            annealing for half of the 100 epochs (50) and normalisation by running statistics of
            each step. "reference_code" has what the authors' settings for Omniglot ran: second
            order throughout and batch statistics.

    Raises:
        InputError: unknown `version`.

    Deviation: see `docs/maml++/index.md` for a table of paper, code and this.

    Reference: Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019, arXiv:1810.09502.

    >>> maml_plus_plus().inner_rate
    LayerStepRates(inner_lr=0.1, per='layer', head_lr=None)
    """
    check_name("version", version, ("paper", "reference_code"))
    is_paper = version == "paper"
    return Algorithm(
        num_steps=num_steps,
        inner_rate=LayerStepRates(inner_lr, per="layer" if is_paper else "tensor"),
        query_weights=MultiStepLoss(num_epochs=10),
        derivative_order=DerivativeAnnealing(num_epochs // 2) if is_paper else FixedOrder(2),
        norm_affine=PerStepAffine(),
        norm_statistics=NormStatistics("running" if is_paper else "batch", per_step=True),
        outer=Adam(outer_lr),
        outer_schedule=CosineAnnealing(num_epochs, final=0.01),
        iterations_per_epoch=iterations_per_epoch,
    )


def alpha_maml(
    num_steps: int = 1,
    inner_lr: float = 0.1,
    outer_lr: float = 0.1,
    *,
    inner_hyper_lr: float = 1e-3,
    outer_hyper_lr: float = 1e-3,
    task_reduction: Literal["mean", "sum"] = "sum",
    safe: bool = False,
) -> Algorithm:
    """Alpha MAML: MAML whose two learning rates follow their own gradients.

    alpha <- alpha + eta_alpha * sum q . s;  beta <- beta + eta_beta * G[t] . G[t-1]

    Args:
        num_steps: K, inner steps.
        inner_lr: alpha at the start.
        outer_lr: beta at the start, of an outer gradient descent.
        inner_hyper_lr: eta_alpha.
        outer_hyper_lr: eta_beta.
        task_reduction: "sum" over tasks as in the paper, or "mean".
        safe: Update the logarithms of the rates, by hypergradients clipped at 1, within 1e-5 and
            10 (as ours; the paper has no guards).

    Deviation: see `HypergradientRates` and `HypergradientSGD`.

    Reference: Behl, Baydin and Torr, Alpha MAML, 2019, arXiv:1905.07435.

    >>> alpha_maml(inner_lr=0.2).inner_rate
    LearnedRate(inner_lr=0.2)
    """
    guards = SAFE if safe else Guards()
    return Algorithm(
        num_steps=num_steps,
        inner_rate=LearnedRate(inner_lr),
        rate_update=HypergradientRates(inner_hyper_lr, guards=guards),
        task_reduction=task_reduction,
        outer=HypergradientSGD(outer_lr, outer_hyper_lr, guards),
    )


def auto(
    num_steps: int = 5,
    inner_lr: float = 0.1,
    outer_lr: float = 1e-3,
    *,
    iterations_per_epoch: int = 500,
) -> Algorithm:
    """MAML++ whose learning rates tune themselves: our combination, in no paper.

    log alpha[layer, k] and log beta move by 2% an iteration along the sign of their hypergradient,
    so that no hyper-rate has a scale to be tuned. beta is Adam's rate.

    Args:
        num_steps: K, inner steps.
        inner_lr: Initial value of every inner rate; its order of magnitude matters little.
        outer_lr: beta at the start; likewise.
        iterations_per_epoch: Outer updates of an epoch, the unit of the multi-step loss.

    >>> auto().rate_update.hyper_lr
    0.02
    """
    return replace(
        maml_plus_plus(
            num_steps, inner_lr, iterations_per_epoch=iterations_per_epoch, version="reference_code"
        ),
        rate_update=HypergradientRates(0.02, guards=SCALE_FREE),
        outer=HypergradientAdam(outer_lr, 0.02, SCALE_FREE),
        outer_schedule=Constant(),
    )
