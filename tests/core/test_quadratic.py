"""Quadratic tasks, where adaptation and meta-gradient have a closed form.

L(theta) = 1/2 (theta - s)^T A (theta - s), with A = X^T X and targets X s. Then
theta[k+1] - s = (I - alpha[k] A) (theta[k] - s), and the chain rule gives the meta-gradient.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fewstep import (
    SGD,
    Adam,
    Algorithm,
    ConstantRate,
    FinalStep,
    FixedOrder,
    MetaLearner,
    StepRates,
    TaskBatch,
    fomaml,
    maml,
)

pytestmark = pytest.mark.usefixtures("float64")

DIM, TASKS = 4, 3
ALPHA = 0.02
RISING = StepRates((ALPHA, 2 * ALPHA, 3 * ALPHA))  # and 3 ALPHA from then on


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.theta


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum()


class EveryStep:
    """v = (0, 0.1, 0.2, ...): zero, and numbers that float32 cannot hold."""

    def __call__(self, num_steps: int, epoch: float) -> tuple[float, ...]:
        return tuple(0.1 * k for k in range(num_steps + 1))


@pytest.fixture
def batch():
    x_support, x_query = torch.randn(2, TASKS, 6, DIM)
    s_support, s_query = torch.randn(2, TASKS, DIM, 1)
    return TaskBatch(
        x_support, (x_support @ s_support)[..., 0], x_query, (x_query @ s_query)[..., 0]
    )


def closed_form(theta: Tensor, batch: TaskBatch, algorithm: Algorithm):
    """Return theta[K] of every task and the meta-gradient."""
    v = algorithm.query_weights(algorithm.num_steps, epoch=0)
    ends, gradient = [], torch.zeros(DIM)
    for x, y, x_query, y_query in zip(*batch.tensors(), strict=True):
        a, a_query = x.T @ x, x_query.T @ x_query
        s = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        s_query = torch.linalg.lstsq(x_query, y_query[:, None]).solution[:, 0]
        power = torch.eye(DIM)  # (I - alpha[k-1] A) ... (I - alpha[0] A), symmetric: they commute
        for k in range(algorithm.num_steps + 1):
            theta_k = s + power @ (theta - s)
            factor = power if algorithm.derivative_order(0) == 2 else torch.eye(DIM)
            gradient += v[k] * factor @ a_query @ (theta_k - s_query) / TASKS
            if k < algorithm.num_steps:
                alpha = algorithm.inner_rate({}, "theta", k)
                power = power @ (torch.eye(DIM) - alpha * a)
        ends.append(theta_k)
    return torch.stack(ends), gradient


def assert_equal_to_1e10(actual: Tensor, expected: Tensor) -> None:
    assert (actual.detach() - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rate", [ConstantRate(ALPHA), RISING], ids=["constant", "rising"])
@pytest.mark.parametrize("weights", [FinalStep(), EveryStep()], ids=["final step", "every step"])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_meta_gradient(batch, order, rate, weights, num_steps):
    algorithm = Algorithm(num_steps, rate, weights, FixedOrder(order))
    module = Point()
    gradient, _ = MetaLearner(module, algorithm, half_squares).meta_gradient(batch)
    _, expected = closed_form(module.theta.detach(), batch, algorithm)
    assert_equal_to_1e10(gradient["theta"], expected)


def test_the_last_of_fixed_rates_repeats():
    rates = [RISING({}, "theta", k) for k in range(5)]
    assert rates == [ALPHA, 2 * ALPHA, 3 * ALPHA, 3 * ALPHA, 3 * ALPHA]


@pytest.mark.parametrize("recipe", [maml, fomaml])
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_adaptation(batch, recipe, num_steps):
    module, algorithm = Point(), recipe(num_steps, ALPHA)
    learner = MetaLearner(module, algorithm, half_squares)
    expected, _ = closed_form(module.theta.detach(), batch, algorithm)
    for x, y, end in zip(batch.x_support, batch.y_support, expected, strict=True):
        assert_equal_to_1e10(learner.adapt(x, y).theta, end)


def test_losses_are_those_along_the_trajectory(batch):
    module, steps = Point(), 3
    learner = MetaLearner(module, maml(steps, ALPHA), half_squares)
    _, metrics = learner.meta_gradient(batch)
    scores = learner.evaluate(batch, TASKS)
    for k in range(steps + 1):
        theta, _ = closed_form(module.theta.detach(), batch, maml(k, ALPHA))
        query = half_squares_of_tasks(theta, batch.x_query, batch.y_query)
        assert_equal_to_1e10(scores.loss[:, k], query)
        if k < steps:
            support = half_squares_of_tasks(theta, batch.x_support, batch.y_support)
            assert_equal_to_1e10(metrics.support_loss[:, k], support)
    assert_equal_to_1e10(metrics.query_loss[:, 0], query)
    assert_equal_to_1e10(metrics.loss, query.mean())


def half_squares_of_tasks(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([half_squares(a @ t, b) for t, a, b in zip(theta, x, y, strict=True)])


@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_evaluation_may_take_another_number_of_steps(batch, num_steps):
    module = Point()
    learner = MetaLearner(module, maml(3, ALPHA), half_squares)
    expected, _ = closed_form(module.theta.detach(), batch, maml(num_steps, ALPHA))
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0], num_steps=num_steps)
    assert_equal_to_1e10(adapted.theta, expected[0])
    assert learner.evaluate(batch, TASKS, num_steps=num_steps).num_steps == num_steps


def test_outer_update_descends_the_meta_gradient(batch):
    module = Point()
    before = module.theta.detach().clone()
    algorithm = Algorithm(2, ConstantRate(ALPHA), outer=SGD(0.01))
    MetaLearner(module, algorithm, half_squares).step(batch)
    _, gradient = closed_form(before, batch, algorithm)
    assert_equal_to_1e10(before - module.theta.detach(), 0.01 * gradient)


def test_momentum_and_decay_of_the_outer_update(batch):
    module, outer = Point(), SGD(0.01, momentum=0.9, weight_decay=0.1)
    algorithm = Algorithm(2, ConstantRate(ALPHA), outer=outer)
    learner = MetaLearner(module, algorithm, half_squares)
    expected, v = module.theta.detach().clone(), 0
    for _ in range(3):
        _, gradient = closed_form(expected, batch, algorithm)
        g = gradient + 0.1 * expected
        v = 0.9 * v + g
        expected = expected - 0.01 * (g + 0.9 * v)
        state = learner.state_tensors()
        learner.load_state_tensors(state)  # which holds v
        learner.step(batch)
        assert_equal_to_1e10(module.theta.detach(), expected)


@pytest.mark.parametrize(
    ("outer", "theirs"),
    [
        (Adam(0.01), partial(torch.optim.Adam, lr=0.01)),
        (Adam(0.01, (0.8, 0.99)), partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.99))),
        (Adam(0.01, weight_decay=0.1), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
    ],
    ids=["defaults", "betas", "decay"],
)
def test_adam_is_pytorch_s(batch, outer, theirs):
    module = Point()
    algorithm = Algorithm(2, ConstantRate(ALPHA), outer=outer)
    learner = MetaLearner(module, algorithm, half_squares)
    expected = module.theta.detach().clone().requires_grad_()
    optimiser = theirs([expected])
    for _ in range(3):
        _, expected.grad = closed_form(expected.detach(), batch, algorithm)
        optimiser.step()
        learner.step(batch)
    assert_equal_to_1e10(module.theta.detach(), expected.detach())
