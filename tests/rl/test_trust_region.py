"""The trust region on quadratics, where its step has a closed form."""

import math

import pytest
import torch
from torch.nn import functional as F

from fewstep import InputError
from fewstep.rl import TrustRegion
from fewstep.rl.trust_region import Seen, conjugate_gradient

pytestmark = pytest.mark.usefixtures("float64")

DIM = 6


def positive_definite():
    a = torch.randn(DIM, DIM)
    return a @ a.T + torch.eye(DIM)


class Quadratic:
    """Loss g . d + c |d|^2, divergence q + e q^2, outputs B d; d = x - x0, x of two tensors.

    q = 1/2 d^T H d. It comes in two parts, of a third and two thirds.
    """

    def __init__(self, curvature=0.0, excess=0.0):
        self.h, self.g, self.curvature = positive_definite(), torch.randn(DIM), curvature
        self.excess = excess
        self.outputs = torch.randn(DIM, DIM)
        self.parameters = [
            torch.randn(2, requires_grad=True),
            torch.randn(2, 2, requires_grad=True),
        ]
        self.start = self.x().detach()

    def x(self):
        return torch.cat([p.reshape(-1) for p in self.parameters])

    def __call__(self, *, differentiable):
        y = self.outputs @ (self.x() - self.start)
        d = torch.linalg.solve(self.outputs, y)
        q = 0.5 * d @ self.h @ d
        loss, divergence = self.g @ d + self.curvature * d @ d, q + self.excess * q**2
        return [Seen(share * loss, share * divergence, y) for share in (1 / 3, 2 / 3)]


def test_conjugate_gradients_solve_the_system():
    a, b = positive_definite(), torch.randn(DIM)
    x, ax = conjugate_gradient(lambda v: a @ v, b, iterations=DIM)
    torch.testing.assert_close(a @ x, b)
    torch.testing.assert_close(ax, b)


def test_conjugate_gradients_that_stop_early_know_what_they_solve():
    a, b = positive_definite(), torch.randn(DIM)
    x, ax = conjugate_gradient(lambda v: a @ v, b, iterations=2)
    torch.testing.assert_close(a @ x, ax)
    assert not torch.isclose(ax, b).all()


@pytest.mark.parametrize("length", [0.0, 1e-4])
def test_conjugate_gradients_solve_for_what_is_small(length):
    a, b = positive_definite(), length * F.normalize(torch.randn(DIM), dim=0)
    x, ax = conjugate_gradient(lambda v: a @ v, b, iterations=DIM)
    assert (a @ x - b).norm() <= 1e-5  # where they stop
    torch.testing.assert_close(ax, a @ x)


def test_the_step_is_the_natural_gradient_at_the_bound():
    """x - x0 = -sqrt(2 delta / (g^T H^-1 g)) H^-1 g, shortened once, as it is at the bound."""
    problem = Quadratic()
    update = TrustRegion(0.01, damping=0.0, shrink=0.99).step(problem.parameters, problem)
    natural = torch.linalg.solve(problem.h, problem.g)
    full = -torch.sqrt(0.02 / (problem.g @ natural)) * natural
    assert update.shrinks in (0, 1)  # rounding decides on which side of the bound the first is
    torch.testing.assert_close(problem.x() - problem.start, 0.99**update.shrinks * full)
    assert update.divergence == pytest.approx(0.01 * 0.99 ** (2 * update.shrinks))
    assert update.loss == pytest.approx((problem.g @ (problem.x() - problem.start)).item())


def test_damping_turns_the_step_to_the_gradient():
    """x - x0 = -sqrt(2 delta / (g^T A^-1 g)) A^-1 g with A = H + damping; within the bound."""
    problem = Quadratic()
    update = TrustRegion(0.01, damping=3.0).step(problem.parameters, problem)
    natural = torch.linalg.solve(problem.h + 3 * torch.eye(DIM), problem.g)
    full = -torch.sqrt(0.02 / (problem.g @ natural)) * natural
    torch.testing.assert_close(problem.x() - problem.start, full)
    assert update.shrinks == 0
    assert update.divergence < 0.01


@pytest.mark.parametrize(("lengths", "shrinks"), [(4, 3), (3, None)])
def test_a_step_is_shortened_until_it_is_within_the_bound(lengths, shrinks):
    """At s of the full length the divergence is s^2 (1 + s^2) of the bound: too far above 0.787."""
    problem = Quadratic(excess=100.0)
    update = TrustRegion(0.01, damping=0.0, shrink=0.9, lengths=lengths).step(
        problem.parameters, problem
    )
    assert update.shrinks == shrinks
    natural = torch.linalg.solve(problem.h, problem.g)
    full = -torch.sqrt(0.02 / (problem.g @ natural)) * natural
    s = 0.0 if shrinks is None else 0.9**shrinks
    torch.testing.assert_close(problem.x() - problem.start, s * full)
    assert update.divergence == pytest.approx(0.01 * s**2 * (1 + s**2))


def test_a_loss_that_is_no_lower_moves_nothing():
    problem = Quadratic()

    def objective(*, differentiable):
        for part in problem(differentiable=differentiable):
            yield part._replace(loss=part.loss - part.loss.detach())  # a slope, and always 0

    update = TrustRegion().step(problem.parameters, objective)
    assert update.shrinks is None
    assert torch.equal(problem.x(), problem.start)


def test_no_step_is_tried_where_there_is_no_slope():
    problem = Quadratic()
    problem.g.zero_()

    def objective(*, differentiable):
        assert differentiable
        return problem(differentiable=differentiable)

    update = TrustRegion().step(problem.parameters, objective)
    assert (update.shrinks, update.divergence) == (None, 0.0)
    assert torch.equal(problem.x(), problem.start)


def test_a_step_is_shortened_until_the_loss_is_lower():
    problem = Quadratic(curvature=40.0)
    update = TrustRegion(1.0).step(problem.parameters, problem)
    assert update.shrinks > 3
    assert update.loss < update.loss_before
    assert update.loss == pytest.approx(
        sum(part.loss.item() for part in problem(differentiable=False))
    )


def test_nothing_moves_where_no_length_will_do():
    problem = Quadratic(curvature=1e9)
    update = TrustRegion(1.0, lengths=3).step(problem.parameters, problem)
    assert update.shrinks is None
    assert torch.equal(problem.x(), problem.start)


def test_an_interrupted_search_leaves_the_policy_as_it_was():
    problem = Quadratic()

    def objective(*, differentiable):
        if not differentiable:
            assert not torch.equal(problem.x(), problem.start)  # a step is being tried
            raise KeyboardInterrupt
        return problem(differentiable=differentiable)

    with pytest.raises(KeyboardInterrupt):
        TrustRegion().step(problem.parameters, objective)
    assert torch.equal(problem.x(), problem.start)


def test_parameters_that_nothing_depends_on_stay():
    problem = Quadratic()
    idle = torch.randn(3, requires_grad=True)
    before = idle.detach().clone()
    TrustRegion().step([*problem.parameters, idle], problem)
    assert torch.equal(idle, before)
    assert not torch.equal(problem.x(), problem.start)


def test_a_loss_that_is_not_finite_changes_nothing():
    problem = Quadratic()
    problem.g[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        TrustRegion().step(problem.parameters, problem)
    assert torch.equal(problem.x(), problem.start)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_divergence": 0.0}, {"max_divergence": math.inf}, {"damping": -1.0}, {"shrink": 1.0},
        {"lengths": 0}, {"iterations": 0},
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="TrustRegion"):
        TrustRegion(**wrong)


def test_the_defaults_are_trpos_as_mamls_code_has_them():
    of = TrustRegion()
    assert (of.iterations, of.damping, of.lengths, of.shrink) == (10, 1e-5, 15, 0.8)
