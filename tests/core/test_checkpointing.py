"""Steps recomputed in the backward pass give what steps whose graphs are kept give."""

import random
import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fewstep
from fewstep import MetaLearner, TaskBatch
from fewstep.core import segments
from fewstep.core.derivative_order import FixedOrder
from fewstep.core.hypergradient import HypergradientRates
from fewstep.core.memory import GraphMemory
from fewstep.core.norm import NormStatistics
from fewstep.core.query_weights import MultiStepLoss
from fewstep.core.rates import LearnedRate
from fewstep.models import Conv4
from tests.core.reference import MODELS, Case, numbers, relative_error

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 4
maml = fewstep.maml(STEPS, 0.2)
plus_plus = replace(fewstep.maml_plus_plus(STEPS, 0.2), derivative_order=FixedOrder(2))
ALGORITHMS = {
    "maml": maml,
    "fomaml": fewstep.fomaml(STEPS, 0.2),
    "maml++, first order": replace(plus_plus, derivative_order=FixedOrder(1)),
    "maml++": plus_plus,
    "maml++, running statistics": replace(
        plus_plus, norm_statistics=NormStatistics("running", per_step=True)
    ),
    "maml++, support statistics": replace(
        plus_plus, norm_statistics=NormStatistics("support", per_step=True)
    ),
    "alpha maml": fewstep.alpha_maml(STEPS, 0.2, 0.1),
    "alpha maml, cheap": replace(
        maml,
        inner_rate=LearnedRate(0.2),
        rate_update=HypergradientRates(1e-3, exact=False),
    ),
    "sum over tasks": replace(maml, task_reduction="sum"),
}


@dataclass(frozen=True)
class Weights:
    """Query weights as given."""

    v: tuple[float, ...]

    def __call__(self, num_steps: int, epoch: float) -> tuple[float, ...]:
        return self.v


def both(module: nn.Module, algorithm, case: Case, batch: TaskBatch, every: int, **options):
    """Return gradients, metrics, buffers and the random state after, without and with."""
    results = []
    for checkpoint_every in (None, every):
        torch.manual_seed(1)
        learner = MetaLearner(
            module, algorithm, case.loss, checkpoint_every=checkpoint_every, **options
        )
        results.append((*learner._differentiate(batch), torch.get_rng_state()))
    return results


def assert_same(whole, stepped) -> None:
    assert relative_error(stepped[0], whole[0]) < 1e-12
    for a, b in zip(numbers(stepped[1]), numbers(whole[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for name, buffer in whole[2].items():
        torch.testing.assert_close(stepped[2][name], buffer, rtol=1e-12, atol=1e-14)
    assert torch.equal(stepped[3], whole[3])


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("every", [1, 3, 9])
def test_every_algorithm(algorithm, every):
    case = MODELS["batch norm"]
    assert_same(*both(case.build(), algorithm, case, case.batch(), every, chunk_size=2))


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_every_model(case, vectorize):
    assert_same(*both(case.build(), maml, case, case.batch(), 1, vectorize=vectorize))


@pytest.mark.parametrize("v", [(1, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0.5, 0, 0.2, 0, 0.3)])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("recipe", ["maml", "alpha maml, cheap"])
def test_every_weighting_of_the_queries(v, every, recipe):
    case = MODELS["batch norm"]
    algorithm = replace(ALGORITHMS[recipe], query_weights=Weights(v))
    assert_same(*both(case.build(), algorithm, case, case.batch(), every))


@pytest.mark.parametrize("num_steps", [3, 5])  # of 4 and more starts some are walked to again
@pytest.mark.parametrize("weights", [(0, 0, 0, 0, 0, 1), (0.1, 0.2, 0.3, 0.2, 0.1, 0.1)])
def test_dropout_draws_the_same(weights, num_steps):
    case = Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Linear(8, 3)), (6,))
    algorithm = replace(
        fewstep.maml(num_steps, 0.3), query_weights=Weights(weights[-num_steps - 1 :])
    )
    assert_same(*both(case.build(), algorithm, case, case.batch(), 1))


def test_no_step_at_all():
    case = MODELS["batch norm"]
    assert_same(*both(case.build(), fewstep.maml(0, 0.1), case, case.batch(), 1))


def graph_memory(num_steps: int, checkpoint_every: int | None, **parts) -> int:
    network = Conv4(1, 3, 16, filters=4)
    x, y = torch.rand(2, 2, 3, 1, 16, 16), torch.arange(3).expand(2, 3)
    learner = MetaLearner(
        network,
        replace(fewstep.maml(num_steps, 0.1), **parts),
        F.cross_entropy,
        checkpoint_every=checkpoint_every,
    )
    with GraphMemory() as saved:
        learner.meta_gradient(TaskBatch(x[0], y, x[1], y))
    assert saved.now == 0
    return saved.peak


@pytest.mark.parametrize(("every", "times"), [(None, 0), (1, 4), (2, 2)])
def test_freed_memory_goes_back_between_segments(monkeypatch, every, times):
    calls = []
    monkeypatch.setattr(segments, "return_freed_memory", lambda: calls.append(None))
    graph_memory(STEPS, every)
    assert len(calls) == times


def test_query_sets_on_the_way_are_kept_one_at_a_time_in_first_order():
    parts = {"derivative_order": FixedOrder(1), "query_weights": MultiStepLoss()}
    few, many = (graph_memory(steps, 1, **parts) for steps in (2, 8))
    assert many < 1.1 * few
    assert graph_memory(8, None, **parts) > 4 * many


def test_memory_does_not_grow_with_the_steps():
    assert graph_memory(8, None) > 3 * graph_memory(2, None)
    assert graph_memory(8, 1) == graph_memory(2, 1) < graph_memory(2, None)
    assert graph_memory(8, 1) < graph_memory(8, 2) < graph_memory(8, 4)


def test_few_points_are_kept_at_a_time(monkeypatch):
    made, most = [], []
    real = segments._walk

    def counted(*arguments):
        start = real(*arguments)
        made.append(weakref.ref(start.point))
        most.append(sum(ref() is not None for ref in made))
        return start

    monkeypatch.setattr(segments, "_walk", counted)
    case = MODELS["mlp"]
    learner = MetaLearner(case.build(), fewstep.maml(32, 0.1), case.loss, checkpoint_every=1)
    learner.meta_gradient(case.batch())
    assert len(most) == 31
    assert max(most) == 5


class Skipping(nn.Module):
    """A second layer that is skipped by chance, which Python or NumPy draws."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.first, self.second, self.draw = nn.Linear(4, 4), nn.Linear(4, 3), draw

    def forward(self, x):
        return self.second(x + float(self.draw() < 0.5) * torch.tanh(self.first(x)))


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["Python", "NumPy"])
def test_what_python_and_numpy_draw_is_drawn_again(draw):
    case, found = MODELS["mlp"], []
    module, batch = Skipping(draw), case.batch()
    for every in (None, 1):
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        learner = MetaLearner(module, fewstep.maml(6, 0.2), case.loss, checkpoint_every=every)
        found.append((learner.meta_gradient(batch)[0], draw()))
    assert relative_error(found[1][0], found[0][0]) < 1e-12
    assert found[1][1] == found[0][1]
