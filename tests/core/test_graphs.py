"""What is kept for differentiation, counted through saved-tensor hooks."""

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep import Algorithm, ConstantRate, FixedOrder, MetaLearner
from tests.core.reference import MODELS

pytestmark = pytest.mark.usefixtures("float64")

CASE = MODELS["mlp"]


@dataclass(eq=False)
class Held:
    tensor: Tensor


class Count(torch.autograd.graph.saved_tensors_hooks):
    """Count tensors saved for a backward pass, and the most alive whenever a loss is taken."""

    def __init__(self) -> None:
        super().__init__(self._pack, lambda held: held.tensor)
        self.saved = 0
        self.most_alive = 0
        self._alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def _pack(self, tensor: Tensor) -> Held:
        held = Held(tensor)
        self.saved += 1
        self._alive.add(held)
        return held

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the case's loss, and look."""
        self.most_alive = max(self.most_alive, len(self._alive))
        return CASE.loss(outputs, targets)


def count(order: int, num_steps: int, vectorize: bool, action: str) -> Count:
    counter = Count()
    algorithm = Algorithm(num_steps, ConstantRate(0.1), derivative_order=FixedOrder(order))
    learner = MetaLearner(CASE.build(), algorithm, counter.loss, vectorize=vectorize)
    batch = CASE.batch()
    with counter:
        if action == "evaluate":
            learner.evaluate(batch, 3)
        elif action == "adapt":
            learner.adapt(batch.x_support[0], batch.y_support[0])
        else:
            learner.meta_gradient(batch)
    return counter


both_ways = pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])


@both_ways
def test_first_order_builds_no_second_order_graph(vectorize):
    """K steps and the query save at most K + 1 times what one forward pass saves."""
    forward = count(1, 0, vectorize, "meta_gradient").saved
    assert forward > 0
    assert count(1, 3, vectorize, "meta_gradient").saved <= 4 * forward
    assert count(2, 3, vectorize, "meta_gradient").saved > 4 * forward


@both_ways
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("action", ["evaluate", "adapt"])
def test_evaluation_keeps_no_graph_from_step_to_step(vectorize, order, action):
    short, long = (count(order, steps, vectorize, action).most_alive for steps in (1, 6))
    assert short == long


@both_ways
def test_first_order_memory_does_not_grow_with_the_steps(vectorize):
    short, long = (count(1, steps, vectorize, "meta_gradient").most_alive for steps in (1, 6))
    assert short == long
    assert count(2, 6, vectorize, "meta_gradient").most_alive > long


@pytest.mark.parametrize("order", [1, 2])
def test_results_have_no_graph(order):
    algorithm = Algorithm(2, ConstantRate(0.1), derivative_order=FixedOrder(order))
    learner, batch = MetaLearner(CASE.build(), algorithm, CASE.loss), CASE.batch()
    scores = learner.evaluate(batch, 3)
    gradient, metrics = learner.meta_gradient(batch)
    tensors = [scores.loss, scores.metric, metrics.loss, metrics.metric, metrics.support_loss]
    assert not any(t.requires_grad for t in [*tensors, *gradient.values()])
