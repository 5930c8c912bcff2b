"""Another loss inside than outside, fixed or learned, against plain loops."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fewstep
from fewstep import FixedOrder, InputError, MetaLearner, MultiStepLoss, TaskBatch
from tests.core.reference import MODELS, relative_error

pytestmark = pytest.mark.usefixtures("float64")

STEPS, RATE = 3, 0.1
CASE = MODELS["layer norm"]
WAYS = {
    "at once": {},
    "a step's graph": {"checkpoint_every": 1},
    "loop": {"vectorize": False},
    "a task at a time": {"chunk_size": 1},
    "replayed": {"replay": True},
}


def sharpness(outputs, _):
    """Entropy of the predictions: a loss that needs no label."""
    return -(outputs.softmax(-1) * outputs.log_softmax(-1)).sum(-1).mean()


class Learned(nn.Module):
    """A loss of each output and its target, by a small network; frozen in part."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * ways, 5), nn.Tanh(), nn.Linear(5, 1))
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, outputs, y):
        hot = F.one_hot(y, outputs.shape[-1]).to(outputs.dtype)
        found = self.layers(torch.cat([outputs, hot], -1))
        return self.scale * found.square().mean() + self.shift * F.cross_entropy(outputs, y)


def plain_gradient(module, support_loss, batch, order, weights):
    phi = dict(module.named_parameters())
    own = {}
    if isinstance(support_loss, nn.Module):
        own = {n: p for n, p in support_loss.named_parameters() if p.requires_grad}
    total = 0.0
    for x, y, x_query, y_query in zip(*batch.tensors(), strict=True):
        theta = dict(phi)
        for k in range(STEPS + 1):
            query = F.cross_entropy(functional_call(module, theta, (x_query,)), y_query)
            total = total + weights[k] * query / len(batch)
            outputs = functional_call(module, theta, (x,))
            loss = support_loss(outputs, y)
            gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=order == 2)
            theta = {n: p - RATE * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
    leaves = phi | {f"support_loss.{n}": p for n, p in own.items()}
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("support_loss", "order"), [(sharpness, 1), (sharpness, 2), (Learned, 2)]
)  # fmt: skip
def test_the_meta_gradient_is_that_of_a_plain_loop(support_loss, order, way):
    module, batch = CASE.build(), CASE.batch()
    support_loss = support_loss() if support_loss is Learned else support_loss
    algorithm = replace(
        fewstep.maml(STEPS, RATE),
        derivative_order=FixedOrder(order),
        query_weights=MultiStepLoss(10),
    )
    learner = MetaLearner(module, algorithm, F.cross_entropy, support_loss=support_loss, **way)
    for _ in range(3):
        gradient, metrics = learner.meta_gradient(batch)
    weights = algorithm.weights_at(0.0)
    expected = plain_gradient(module, support_loss, batch, order, weights)
    assert relative_error(gradient, expected) < 1e-12
    assert metrics.metric_name == "accuracy"


def test_a_learned_loss_is_trained_kept_and_used():
    module, batch, support_loss = CASE.build(), CASE.batch(), Learned()
    learner = MetaLearner(
        module, fewstep.maml(STEPS, RATE), F.cross_entropy, support_loss=support_loss
    )
    before = learner.state_tensors()
    assert "model.support_loss.layers.0.weight" in before
    first = learner.step(batch).loss
    assert not torch.equal(
        support_loss.layers[0].weight, before["model.support_loss.layers.0.weight"]
    )
    assert support_loss.scale == 0.5
    for _ in range(30):
        last = learner.step(batch).loss
    assert last < first
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    with torch.no_grad():
        loss = F.cross_entropy(adapted(batch.x_query[0]), batch.y_query[0])
    torch.testing.assert_close(learner.evaluate(batch, 3).loss[0, -1], loss)
    learner.load_state_tensors(before)
    assert learner.step(batch).loss == first


def test_a_metric_sees_query_sets_alone():
    seen = []

    def metric(outputs, y):
        seen.append(y.shape)
        return F.mse_loss(outputs, y)

    x = torch.randn(2, 4, 3)
    batch = TaskBatch(x, torch.randn(2, 4, 7), torch.randn(2, 5, 3), torch.randn(2, 5, 2))
    learner = MetaLearner(
        nn.Linear(3, 2),
        fewstep.maml(2, RATE),
        F.mse_loss,
        metric=metric,
        support_loss=lambda outputs, y: (outputs.sum(-1) - y.sum(-1)).square().mean(),
    )
    learner.meta_gradient(batch)
    learner.evaluate(batch, 2)
    assert set(seen) == {(5, 2)}


class Scaled(nn.Module):
    """A clipping that would like to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, gradients):
        return {n: self.factor * g for n, g in gradients.items()}


def captured(frozen: bool):
    network = nn.Linear(3, 1).requires_grad_(not frozen)
    return lambda outputs, y: network(outputs).square().mean()


def gradient_of(algorithm=None, **options):
    algorithm = algorithm or fewstep.maml(2, RATE)
    return MetaLearner(CASE.build(), algorithm, F.cross_entropy, **options).meta_gradient(
        CASE.batch()
    )


def test_a_frozen_network_may_be_in_a_loss():
    gradient_of(support_loss=captured(frozen=True))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"the meta-loss reads a parameter of shape \(1, 3\) past .* freeze",
            lambda: gradient_of(support_loss=captured(frozen=False)),
        ),
        (
            r"reads a parameter of shape \(1, 3\) past",
            lambda: gradient_of(support_loss=captured(frozen=False), checkpoint_every=1),
        ),
        (
            r"reads a parameter of shape \(\) past .* gives? what it learns in its table",
            lambda: gradient_of(replace(fewstep.maml(2, RATE), inner_clipping=Scaled())),
        ),
        (
            "Learned has parameters, which first-order methods cannot learn",
            lambda: gradient_of(fewstep.fomaml(2, RATE), support_loss=Learned()),
        ),
        ("support_loss=0.5 must be a function", lambda: gradient_of(support_loss=0.5)),
        ("support_loss=MSELoss must be a function", lambda: gradient_of(support_loss=nn.MSELoss)),
        (
            r"the support loss returned shape \(6,\) for one task",
            lambda: gradient_of(support_loss=lambda outputs, y: outputs.sum(-1)),
        ),
        (
            "part named 'support_loss', the name of what",
            lambda: MetaLearner(
                nn.ModuleDict({"support_loss": nn.Linear(2, 2)}),
                fewstep.maml(),
                F.cross_entropy,
                support_loss=Learned(),
            ),
        ),
    ],
)
def test_what_nothing_would_learn_is_refused(message, call):
    with pytest.raises(InputError, match=message):
        call()


def test_a_parameter_of_both_is_refused():
    module, support_loss = CASE.build(), Learned()
    support_loss.layers[0].weight = module[0].weight
    with pytest.raises(InputError, match=r"`support_loss\.layers\.0\.weight` is `0\.weight` of"):
        MetaLearner(module, fewstep.maml(), F.cross_entropy, support_loss=support_loss)


def test_a_task_without_a_target_that_counts_has_no_accuracy():
    batch = CASE.batch()
    y = batch.y_query.clone()
    y[1] = -100
    batch = TaskBatch(batch.x_support, batch.y_support, batch.x_query, y)
    learner = MetaLearner(CASE.build(), fewstep.maml(1), F.cross_entropy)
    with pytest.raises(InputError, match="query set of task 1 has no target that counts"):
        learner.evaluate(batch, 3)
