"""Another loss inside than outside, fixed or learned, against plain loops."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fewstep
from fewstep import (
    FixedOrder,
    InputError,
    MetaLearner,
    MultiStepLoss,
    TaskBatch,
)
from fewstep.core import first_calls
from tests.core.reference import MODELS, ROUTES, relative_error

pytestmark = pytest.mark.usefixtures("float64")

STEPS, RATE = 3, 0.1
CASE = MODELS["layer norm"]


def sharpness(outputs, _):
    """Entropy of the predictions: a loss that needs no label."""
    return -(outputs.softmax(-1) * outputs.log_softmax(-1)).sum(-1).mean()


class Learned(nn.Module):
    """A loss of each output and its target, by a small network; frozen in part."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * ways, 5), nn.Tanh(), nn.Linear(5, 1))
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, outputs, y):
        hot = F.one_hot(y, outputs.shape[-1]).to(outputs.dtype)
        found = self.layers(torch.cat([outputs, hot], -1))
        return self.scale * found.square().mean() + 0.1 * F.cross_entropy(outputs, y)


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


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize(
    ("support_loss", "order"), [(sharpness, 1), (sharpness, 2), (Learned, 2)]
)  # fmt: skip
def test_the_meta_gradient_is_that_of_a_plain_loop(support_loss, order, route):
    module, batch = CASE.build(), CASE.batch()
    support_loss = support_loss() if support_loss is Learned else support_loss
    algorithm = replace(
        fewstep.maml(STEPS, RATE),
        derivative_order=FixedOrder(order),
        query_weights=MultiStepLoss(10),
    )
    learner = MetaLearner(module, algorithm, F.cross_entropy, support_loss=support_loss, **route)
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


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(3, 3)


class Listed(nn.Module):
    """Keeps a layer where it is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.layers = [nn.Linear(4, 3)]

    def forward(self, x):
        return self.scale * self.layers[0](x)


def called_from_a_list():
    MetaLearner(Listed(), fewstep.maml(1), F.cross_entropy).meta_gradient(CASE.batch())


def encoded():
    encoder, batch = nn.Linear(4, 4), CASE.batch()
    batch = TaskBatch(encoder(batch.x_support), *batch.tensors()[1:])
    MetaLearner(CASE.build(), fewstep.maml(1), F.cross_entropy).meta_gradient(batch)


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
            r"the support loss reads a parameter of shape \(1, 3\) that nothing would .* freeze",
            lambda: gradient_of(support_loss=captured(frozen=False)),
        ),
        (
            r"reads a parameter of shape \(1, 3\) that nothing would",
            lambda: gradient_of(support_loss=captured(frozen=False), checkpoint_every=1),
        ),
        (
            r"reads a parameter of shape \(\) that nothing .* in the table of the algorithm's part",
            lambda: gradient_of(replace(fewstep.maml(2, RATE), inner_clipping=Scaled())),
        ),
        (
            "Learned has parameters, which are learned through the second derivative",
            lambda: gradient_of(fewstep.fomaml(2, RATE), support_loss=Learned()),
        ),
        (
            "take a step and derivative_order=FixedOrder",
            lambda: gradient_of(fewstep.maml(0, RATE), support_loss=Learned()),
        ),
        (
            "`running_mean` of BatchNorm1d is a buffer, which a loss that is learned may not",
            lambda: gradient_of(support_loss=nn.BatchNorm1d(3)),
        ),
        ("a Linear of Twice has two names", lambda: gradient_of(support_loss=Twice())),
        (r"reads a parameter of shape \(3, 4\) that nothing", lambda: called_from_a_list()),
        (r"reads a parameter of shape \(4, 4\) .*detach\(\) inputs", lambda: encoded()),
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


def test_a_refusal_stays_one():
    learner = MetaLearner(
        CASE.build(), fewstep.maml(1), F.cross_entropy, support_loss=captured(frozen=False)
    )
    for _ in range(2):
        with pytest.raises(InputError, match="that nothing would learn"):
            learner.step(CASE.batch())


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=["function", "module"]
)
def test_reads_are_looked_for_once(loss, monkeypatch):
    looked = []
    monkeypatch.setattr(first_calls, "check_reads", lambda *args: looked.append(args))
    learner = MetaLearner(CASE.build(), fewstep.maml(1), loss, chunk_size=1)
    for _ in range(3):
        learner.step(CASE.batch())
    assert [what for what, *_ in looked] == ["support loss", "meta-loss"]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("vectorize", [True, False])
def test_a_penalty_on_the_module_itself_is_no_part_of_an_inner_step(order, vectorize):
    """Each task has parameters of its own, which such a penalty would not see."""
    module = CASE.build()

    def penalised(outputs, y):
        return F.cross_entropy(outputs, y) + sum(p.square().sum() for p in module.parameters())

    algorithm = replace(fewstep.maml(2), derivative_order=FixedOrder(order))
    options = {"support_loss": penalised, "vectorize": vectorize}
    for call in (
        lambda of: of.meta_gradient(CASE.batch()),
        lambda of: of.predict(CASE.batch(), 2),
        lambda of: of.adapt(CASE.batch().x_support[0], CASE.batch().y_support[0]),
    ):
        of = MetaLearner(module, algorithm, F.cross_entropy, **options)
        with pytest.raises(InputError, match=r"^the support loss reads `0.weight` past the call"):
            call(of)


class Drawing(nn.Module):
    """A learned loss that draws: by dropout, and by a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        self.generator = torch.Generator().manual_seed(1)

    def __deepcopy__(self, memo):
        twin = Drawing()
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, outputs, y):
        noise = torch.randn(3, generator=self.generator) if self.training else 0
        return F.cross_entropy(self.layers(outputs) + noise, y)


def test_a_learned_loss_draws_in_training_alone_and_the_same_again():
    module, batch = CASE.build(), CASE.batch()
    found, first = [], Drawing()
    for every in (None, 1):
        loss = copy.deepcopy(first)
        learner = MetaLearner(
            module,
            fewstep.maml(3, RATE),
            F.cross_entropy,
            support_loss=loss,
            checkpoint_every=every,
        )
        torch.manual_seed(1)
        found.append(learner.meta_gradient(batch)[0])
    assert relative_error(found[1], found[0]) < 1e-12
    random = torch.get_rng_state()
    scores = [learner.evaluate(batch, 3).mean for _ in range(2)]
    assert scores[0] == scores[1]
    assert torch.equal(torch.get_rng_state(), random)
    assert loss.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: loss.layers[0].requires_grad_(False), r"`support_loss\.layers\.0.* was"),
        (lambda loss: loss.scale.requires_grad_(), r"`support_loss\.scale` was unfrozen"),
        (lambda loss: setattr(loss, "scale", nn.Parameter(torch.ones(()))), "was replaced"),
        (lambda loss: loss.layers[0].weight.register_hook(lambda g: g), "has a hook on its"),
    ],
)  # fmt: skip
def test_a_learned_loss_that_changed_is_refused(change, message):
    loss = Learned()
    learner = MetaLearner(CASE.build(), fewstep.maml(1), F.cross_entropy, support_loss=loss)
    change(loss)
    with pytest.raises(InputError, match=message):
        learner.step(CASE.batch())


class Recurrently(nn.Module):
    """A learned loss with a part that PyTorch cannot vectorise."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2, batch_first=True)

    def forward(self, outputs, y):
        return self.rnn(outputs[None])[0].square().mean()


def test_a_learned_loss_may_be_recurrent():
    found, module, batch, loss = [], CASE.build(), CASE.batch(), Recurrently()
    for vectorize in (True, False):
        learner = MetaLearner(
            module, fewstep.maml(2, RATE), F.cross_entropy, support_loss=loss, vectorize=vectorize
        )
        found.append(learner.meta_gradient(batch)[0])
    assert relative_error(*found) < 1e-12
    assert found[0]["support_loss.rnn.weight_hh_l0"].abs().max() > 0
    copy.deepcopy(learner).step(batch)


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
    with pytest.raises(InputError, match="query set of task 1 has no target that counts"):
        learner.evaluate_ensemble([learner.state_tensors()], batch, 3)


def test_a_metric_of_one_s_own_may_be_undefined():
    def accuracy(outputs, y):
        return outputs.sum() * float("nan")

    learner = MetaLearner(CASE.build(), fewstep.maml(1), F.cross_entropy, metric=accuracy)
    assert math.isnan(learner.evaluate(CASE.batch(), 3).mean)
