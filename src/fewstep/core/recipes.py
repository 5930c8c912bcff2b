"""The published methods, and one of ours, as lists of parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fewstep.core.adapted import AdaptedParameters
from fewstep.core.algorithm import Algorithm
from fewstep.core.derivative_order import DerivativeAnnealing, FixedOrder
from fewstep.core.errors import check_name
from fewstep.core.hypergradient import (
    SAFE,
    SCALE_FREE,
    Guards,
    HypergradientAdam,
    HypergradientRates,
    HypergradientSGD,
)
from fewstep.core.inner_start import PrototypeStart
from fewstep.core.norm import NormStatistics, PerStepAffine
from fewstep.core.outer import Adam, ConstantSchedule, CosineAnnealing
from fewstep.core.query_weights import FinalStep, MultiStepLoss
from fewstep.core.rates import ConstantRate, ElementRates, LayerStepRates, LearnedRate


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


def anil(
    num_steps: int = 5, inner_lr: float = 0.1, outer_lr: float = 1e-3, *, head: str = "head.*"
) -> Algorithm:
    """ANIL: `maml` whose inner loop changes the head only.

    head[k+1] = head[k] - alpha * grad_head L_support(body, head[k]);  phi as in `maml`

    Args:
        num_steps: K, inner steps.
        inner_lr: alpha.
        outer_lr: Adam's rate.
        head: Pattern of the names of the head's parameters, "2.*" for the third layer of a
            Sequential.

    Reference: Raghu, Raghu, Bengio and Vinyals, Rapid learning or feature reuse?, ICLR 2020,
        arXiv:1909.09157.
    """
    return maml(num_steps, inner_lr, outer_lr, AdaptedParameters((head,)))


def cavia(
    num_steps: int = 1,
    inner_lr: float = 1.0,
    outer_lr: float = 1e-3,
    *,
    context: str = "context.*",
) -> Algorithm:
    """CAVIA: `maml` whose inner loop changes a context alone, the same at the start of every task.

    c[k+1] = c[k] - alpha * grad_c L_support(body, c[k]), c[0] = 0;  body <- Adam, as in `maml`

    Args:
        num_steps: K, inner steps.
        inner_lr: alpha.
        outer_lr: Adam's rate, of all but the context.
        context: Pattern of its parameters: of a `fewstep.models.Context`, which holds zeros.

    Deviation: none; MAML's authors, who compare with a context, learn its start, too, as
        `anil(head="context.*")` does.

    Reference: Zintgraf et al., Fast context adaptation via meta-learning, ICML 2019,
        arXiv:1810.03642.
    """
    return maml(
        num_steps, inner_lr, outer_lr, AdaptedParameters((context,), fixed_start=(context,))
    )


def meta_sgd(num_steps: int = 1, inner_lr: float = 0.1, outer_lr: float = 1e-3) -> Algorithm:
    """Meta-SGD: `maml` that learns an inner rate for each element of each parameter.

    theta[k+1] = theta[k] - alpha * grad L_support(theta[k]), alpha of the shape of theta

    Args:
        num_steps: K, inner steps; the paper takes one.
        inner_lr: Initial value of every rate.
        outer_lr: Adam's rate, of theta and alpha.

    Deviation: see `ElementRates`.

    Reference: Li et al., Meta-SGD, 2017, arXiv:1707.09835.
    """
    return replace(maml(num_steps, inner_lr, outer_lr), inner_rate=ElementRates(inner_lr))


def prototypical_networks(outer_lr: float = 1e-3, *, head: str | None = None) -> Algorithm:
    """Prototypical networks: no inner step; a query example is of the class whose mean is nearest.

    score of class n = -|f(x) - c[n]|^2, c[n] = mean of f over the support examples of class n

    Args:
        outer_lr: Adam's rate.
        head: Name of the linear layer whose place the class means take, see `PrototypeStart`.

    Deviation: a learner has as many classes in tests as in training, where the paper trains with
        more; the commands have --train-ways for it.

    Reference: Snell, Swersky and Zemel, Prototypical networks for few-shot learning, NeurIPS 2017,
        arXiv:1703.05175.
    """
    return proto_maml(0, outer_lr=outer_lr, head=head)


def proto_maml(
    num_steps: int = 5,
    inner_lr: float = 0.01,
    outer_lr: float = 1e-3,
    *,
    head: str | None = None,
) -> Algorithm:
    """Proto-MAML: `maml` from a head that starts as a prototypical network's.

    theta[0] = phi, with head w[n] = 2 c[n], b[n] = -|c[n]|^2 or as good;  then as `maml`

    Args:
        num_steps: K, inner steps.
        inner_lr: alpha.
        outer_lr: Adam's rate.
        head: Name of the linear layer that gives the scores, see `PrototypeStart`.

    Reference: Triantafillou et al., Meta-Dataset, ICLR 2020, arXiv:1903.03096.

    >>> proto_maml(num_steps=1).inner_start
    PrototypeStart(head=None)
    """
    return replace(maml(num_steps, inner_lr, outer_lr), inner_start=PrototypeStart(head))


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
        outer_schedule=ConstantSchedule(),
    )
