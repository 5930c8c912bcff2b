"""Learning rates that follow their own gradient: Alpha MAML's parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from fewstep.core.errors import InputError, check_name
from fewstep.core.outer import check_for_adam, check_outer_lr

Step = Literal["additive", "multiplicative", "sign"]


@dataclass(frozen=True)
class Guards:
    """What may keep a hypergradient update within reason; nothing by default.

    additive:        rate <- rate + eta * h                          h = -d loss / d rate
    multiplicative:  rate <- rate * exp(eta * rate * h)              the same step in log(rate)
    sign:            rate <- rate * exp(eta * sign(rate * h))        log(rate) moves by eta

    Args:
        lower: Least rate.
        upper: Greatest rate.
        clip: Greatest |h|.
        step: As above; all but "additive" keep a rate's sign, and "sign" knows no scale.

    Raises:
        InputError: the bounds are not in order, `clip` is not positive, or `step` is unknown.
    """

    lower: float = -math.inf
    upper: float = math.inf
    clip: float = math.inf
    step: Step = "additive"

    def __post_init__(self) -> None:
        if not self.lower <= self.upper:
            raise InputError(f"Guards(lower={self.lower}, upper={self.upper}) are not in order")
        if not self.clip > 0:
            raise InputError(f"Guards(clip={self.clip}) must be positive")
        check_name("step", self.step, get_args(Step))

    def __call__(self, rate: Tensor, h: Tensor, eta: float) -> Tensor:
        """Return the updated rate."""
        h = h.clamp(-self.clip, self.clip)
        match self.step:
            case "additive":
                moved = rate + eta * h
            case "multiplicative":
                moved = rate * torch.exp(eta * rate * h)
            case "sign":
                moved = rate * torch.exp(eta * torch.sign(rate * h))
        return moved.clamp(self.lower, self.upper)


SAFE = Guards(1e-5, 10.0, clip=1.0, step="multiplicative")
SCALE_FREE = Guards(1e-5, 10.0, step="sign")


@dataclass(frozen=True)
class HypergradientRates:
    """Inner rates that follow the gradient of the meta-loss.

    alpha <- alpha - eta_alpha * d meta-loss / d alpha
           = alpha + eta_alpha * sum over tasks and steps of lambda[k+1] . s[k]

    with s[k] the support gradient at theta[k], lambda[K] = q the query gradient at theta[K], and
    lambda[k] = (I - alpha H[k]) lambda[k+1]. The derivative comes out of the backward pass that
    gives the meta-gradient: alpha is one more leaf of its graph.

    Args:
        hyper_lr: eta_alpha. It goes with `task_reduction`: for B tasks, what is eta_alpha under
            "sum" is B * eta_alpha under "mean".
        exact: False puts q in place of every lambda, and so leaves out query losses before the
            last; the same for one step. Needs `LearnedRate`.
        guards: Bounds and the like.

    Raises:
        InputError: `hyper_lr` is negative or not finite.

    Deviation: the poster has one step; the sum over the steps is the exact derivative for several.

    Reference: Behl, Baydin and Torr, Alpha MAML, 2019, arXiv:1905.07435.
    """

    hyper_lr: float
    exact: bool = True
    guards: Guards = Guards()

    def __post_init__(self) -> None:
        _check_hyper_lr(self.hyper_lr)

    def __call__(self, alpha: Tensor, gradient: Tensor) -> Tensor:
        """Return the updated rates, given d meta-loss / d alpha."""
        return self.guards(alpha, -gradient, self.hyper_lr)


@dataclass(frozen=True)
class _ByHypergradient:
    """What the two outer optimisers below share; they differ in the direction u of an update."""

    outer_lr: float
    hyper_lr: float
    guards: Guards = Guards()
    owns_rate = True

    def __post_init__(self) -> None:
        check_outer_lr(self.outer_lr)
        _check_hyper_lr(self.hyper_lr)


@dataclass(frozen=True)
class HypergradientSGD(_ByHypergradient):
    """Gradient descent whose rate follows the gradient of the meta-loss.

    beta[t] = beta[t-1] + eta_beta * G[t] . G[t-1];   phi <- phi - beta[t] * G[t]

    The first update leaves beta as it is. Keeps one copy of the meta-gradient.

    Args:
        outer_lr: beta at the start.
        hyper_lr: eta_beta. It goes with `task_reduction`: for B tasks, what is eta_beta and beta
            under "sum" is B^3 * eta_beta and B * beta under "mean".
        guards: Bounds and the like.

    Raises:
        InputError: `outer_lr` is not a positive finite number, `hyper_lr` negative or not finite.

    Deviation: the poster's algorithm pairs task j's gradients of two iterations; the derivative
        is the product of the summed gradients, as here.

    Reference: Behl, Baydin and Torr, Alpha MAML, 2019, arXiv:1905.07435; Baydin et al., Online
        learning rate adaptation with hypergradient descent, ICLR 2018, arXiv:1703.04782.
    """

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return Hypergradient(parameters, self.outer_lr, self.hyper_lr, self.guards, _gradient)


@dataclass(frozen=True)
class HypergradientAdam(_ByHypergradient):
    """Adam whose rate follows the gradient of the meta-loss (Adam-HD).

    beta[t] = beta[t-1] + eta_beta * G[t] . u[t-1];   phi <- phi - beta[t] * u[t]

    with u Adam's update at rate 1, which knows no scale.

    Args:
        outer_lr: beta at the start, the same under "sum" and "mean".
        hyper_lr: eta_beta. For B tasks, what is eta_beta under "sum" is B * eta_beta under "mean".
        guards: Bounds and the like.

    Errors and references as in `HypergradientSGD`.
    """

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        check_for_adam(parameters)
        return Hypergradient(parameters, self.outer_lr, self.hyper_lr, self.guards, _adam)


def _check_hyper_lr(hyper_lr: object) -> None:
    if not (isinstance(hyper_lr, Real) and 0 <= float(hyper_lr) < math.inf):
        raise InputError(f"hyper_lr={hyper_lr!r} must be 0 or a positive number, such as 1e-4")


Direction = Callable[[Tensor, dict[str, Tensor]], Tensor]


def _gradient(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    return gradient


def _adam(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + 1e-8), with b1 = 0.9 and b2 = 0.999."""
    if "step" not in state:
        state["step"] = torch.zeros((), device=gradient.device)
        state["m"], state["v"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    t = state["step"].add_(1).to(gradient.dtype)
    m = state["m"].lerp_(gradient, 0.1)
    v = state["v"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    return m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


class Hypergradient(torch.optim.Optimizer):
    """phi <- phi - beta * u, with beta <- beta + eta * G . (previous u).

    beta and its hypergradient h = -d loss / d beta live in the state of the first parameter.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        outer_lr: float,
        hyper_lr: float,
        guards: Guards,
        direction: Direction,
    ) -> None:
        super().__init__(parameters, {"lr": outer_lr})
        self._hyper_lr = hyper_lr
        self._guards = guards
        self._direction = direction

    def __getstate__(self) -> dict[str, Any]:
        """Take our own attributes along, which the class above leaves behind."""
        own = {n: v for n, v in vars(self).items() if n in ("_hyper_lr", "_guards", "_direction")}
        return super().__getstate__() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; beta and h as precise as they were, not of the parameters' type."""
        super().load_state_dict(state_dict)
        first = self.param_groups[0]["params"][0]
        saved = state_dict["state"].get(0, {})
        self.state[first] |= {n: saved[n].to(first.device) for n in ("beta", "h") if n in saved}
        for p in self.param_groups[0]["params"]:  # a count named "step" is left where it was saved
            if "step" in self.state[p]:
                self.state[p]["step"] = self.state[p]["step"].to(p.device)

    def rates(self) -> dict[str, Tensor]:
        """Return beta and its hypergradient."""
        first = self.state[self.param_groups[0]["params"][0]]
        return {"outer_lr": first["beta"], "outer_lr_hypergradient": first["h"]}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one update.

        Raises:
            InputError: there is a `closure`; the gradients are to be in place.
        """
        if closure is not None:
            raise InputError(f"{type(self).__name__}.step takes no closure; leave it out")
        group: dict[str, Any] = self.param_groups[0]
        parameters: list[Tensor] = group["params"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        first = self.state[parameters[0]]
        if "beta" not in first:
            # In bfloat16 small steps would not move it.
            precise = torch.promote_types(parameters[0].dtype, torch.float32)
            first["beta"] = parameters[0].new_tensor(group["lr"], dtype=precise)
            first["h"] = torch.zeros_like(first["beta"])
        else:
            pairs = zip(gradients, parameters, strict=True)
            first["h"] = torch.stack(
                [(g * self.state[p]["previous"]).sum() for g, p in pairs]
            ).sum()
            first["beta"] = self._guards(first["beta"], first["h"], self._hyper_lr)
        for p, g in zip(parameters, gradients, strict=True):
            u = self._direction(g, self.state[p])
            p.addcmul_(u, first["beta"].to(p.dtype), value=-1)  # reading beta would wait
            self.state[p]["previous"] = u
        return None
