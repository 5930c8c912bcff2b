"""Starts that look at the support set: prototypes by distances, a learned one by a plain loop."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fewstep
from fewstep import (
    FixedOrder,
    InnerStart,
    InputError,
    MetaLearner,
    MomentumStep,
    MultiStepLoss,
    NormStatistics,
    PerStepAffine,
    PrototypeStart,
    TaskBatch,
)
from tests.core.reference import MODELS, ROUTES, WAYS, relative_error

pytestmark = pytest.mark.usefixtures("float64")

STEPS, RATE = 3, 0.05
WITH_A_HEAD = [n for n in MODELS if n not in ("sinusoid MLP", "Conv4 cosine head")]


def last_layer(module):
    return [*module.named_parameters()][-1][0].rpartition(".")[0]


def features_of(module, name, tensors, x):
    """Return the module's outputs with its head replaced by the identity."""
    body = copy.deepcopy(module)
    path, _, leaf = name.rpartition(".")
    setattr(body.get_submodule(path), leaf, nn.Identity())
    own = {n: t for n, t in tensors.items() if not n.startswith(name + ".")}
    return functional_call(body, own, (x,))


def means_of(features, y):
    return torch.stack([features[y == c].mean(0) for c in range(WAYS)])


@pytest.mark.parametrize("model", WITH_A_HEAD)
def test_without_a_step_it_is_the_loss_of_distances_to_class_means(model):
    case = MODELS[model]
    module, batch = case.build(), case.batch()
    name, phi = last_layer(module), dict(module.named_parameters())
    losses, scores = [], []
    for x, y, x_query, y_query in zip(*batch.tensors(), strict=True):
        means = means_of(features_of(module, name, phi, x), y)
        distances = torch.cdist(features_of(module, name, phi, x_query), means) ** 2
        losses.append(F.cross_entropy(-distances, y_query))
        scores.append(torch.log_softmax(-distances, -1).detach())
    body = {n: p for n, p in phi.items() if not n.startswith(name + ".")}
    found = torch.autograd.grad(torch.stack(losses).mean(), list(body.values()))
    learner = MetaLearner(module, fewstep.prototypical_networks(), case.loss)
    gradient, metrics = learner.meta_gradient(batch)
    of_head = {n: g for n, g in gradient.items() if n not in body}
    assert all(not g.any() for g in of_head.values())
    assert (
        relative_error({n: gradient[n] for n in body}, dict(zip(body, found, strict=True))) < 1e-9
    )  # cdist takes a root, which is squared again
    torch.testing.assert_close(metrics.query_loss[:, 0], torch.stack(losses).detach())
    outputs = learner.predict(batch, 3)[:, 0]
    torch.testing.assert_close(torch.log_softmax(outputs, -1), torch.stack(scores))


class Scaled(InnerStart):
    """Every parameter times a factor that a small network makes of the task, as MMAML's."""

    def __init__(self, part):
        self.part = part

    def table(self, phi):
        generator = torch.Generator().manual_seed(4)
        outputs = len(phi)
        return {
            "weight": torch.randn(outputs, 8 + WAYS, generator=generator) / 10,
            "bias": torch.ones(outputs),
        }

    def __call__(self, phi, support, table):
        hot = (support.y[..., None] == torch.arange(WAYS)).to(support.x.dtype)
        seen = torch.cat([support.inputs_of(self.part), hot], -1)
        factors = F.linear(seen.tanh().mean(1), table["weight"], table["bias"])
        return {
            n: f.view(-1, *[1] * (p.ndim - 1)) * p
            for (n, p), f in zip(phi.items(), factors.unbind(1), strict=True)
        }


def prototypes_plainly(module, phi, table, x, y):
    means = means_of(features_of(module, "2", phi, x), y)
    return phi | {"2.weight": 2 * means, "2.bias": -means.square().sum(1)}


def scaled_plainly(module, phi, table, x, y):
    hot = F.one_hot(y, WAYS).to(x.dtype)
    seen = torch.cat([features_of(module, "2", phi, x), hot], -1).tanh().mean(0)
    factors = table["weight"] @ seen + table["bias"]
    return {n: f * p for (n, p), f in zip(phi.items(), factors, strict=True)}


KINDS = {
    "prototypes": (PrototypeStart(), prototypes_plainly),
    "learned": (Scaled("2"), scaled_plainly),
}


def plain_gradient(module, batch, kind, order, weights):
    phi = dict(module.named_parameters())
    part, plainly = KINDS[kind]
    table = {n: t.requires_grad_() for n, t in part.table(phi).items()}
    losses = []
    for x, y, x_query, y_query in zip(*batch.tensors(), strict=True):
        theta = {n: p.clone() for n, p in plainly(module, phi, table, x, y).items()}
        momentum = {n: torch.zeros_like(p) for n, p in theta.items()}
        for k in range(STEPS + 1):
            query = F.cross_entropy(functional_call(module, theta, (x_query,)), y_query)
            losses.append(weights[k] * query)
            if k < STEPS:
                loss = F.cross_entropy(functional_call(module, theta, (x,)), y)
                adapted = [n for n, p in phi.items() if p.requires_grad]
                gradient = torch.autograd.grad(loss, [theta[n] for n in adapted], create_graph=True)
                for n, g in zip(adapted, gradient, strict=True):
                    momentum[n] = 0.9 * momentum[n] + (g.detach() if order == 1 else g)
                    theta[n] = theta[n] - RATE * momentum[n]
    leaves = {n: p for n, p in phi.items() if p.requires_grad}
    leaves |= {f"inner_start.{n}": t for n, t in table.items()}
    total = torch.stack(losses).sum() / len(batch)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(t) if g is None else g
        for (n, t), g in zip(leaves.items(), found, strict=True)
    }


@pytest.mark.parametrize("frozen", [(), ("2.weight", "2.bias")], ids=["all", "frozen head"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_that_of_a_plain_loop(kind, route, order, frozen):
    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    algorithm = replace(
        fewstep.maml(STEPS, RATE),
        derivative_order=FixedOrder(order),
        inner_start=KINDS[kind][0],
        inner_step=MomentumStep(0.9),
        query_weights=MultiStepLoss(10),
    )
    weights = (0.3, *algorithm.weights_at(0.0)[1:])
    algorithm = replace(algorithm, query_weights=lambda num_steps, epoch: weights)
    learner = MetaLearner(module, algorithm, case.loss, **route)
    for _ in range(3):  # a replay is recorded, played, and played again
        gradient, _ = learner.meta_gradient(batch)
    assert relative_error(gradient, plain_gradient(module, batch, kind, order, weights)) < 1e-12


def test_what_a_start_learns_is_updated_saved_and_loaded():
    case = MODELS["mlp"]
    batch = case.batch()
    algorithm = replace(fewstep.maml(STEPS, RATE), inner_start=Scaled("2"))
    learner = MetaLearner(case.build(), algorithm, case.loss)
    before = {n: p.detach().clone() for n, p in learner.parameters.items()}
    first = learner.step(batch).loss
    for _ in range(20):
        last = learner.step(batch).loss
    assert last < first
    for name in ("inner_start.weight", "inner_start.bias"):
        assert not torch.equal(before[name], learner.parameters[name])
    other = MetaLearner(case.build(), algorithm, case.loss)
    other.load_state_tensors(learner.state_tensors())
    torch.testing.assert_close(other.predict(batch, 3), learner.predict(batch, 3))


@pytest.mark.parametrize("statistics", ["batch", "support", "running"])
def test_an_adapted_copy_starts_there_too(statistics):
    case = MODELS["batch norm"]
    module, batch = case.build(), case.batch()
    algorithm = replace(
        fewstep.proto_maml(2, RATE), norm_statistics=NormStatistics(statistics, per_step=True),
        norm_affine=PerStepAffine(),
    )  # fmt: skip
    learner = MetaLearner(module, algorithm, case.loss)
    for _ in range(3):
        learner.step(batch)
    for steps in (0, 2):
        outputs = learner.predict(batch, 3, num_steps=steps)[:, -1]
        for task, (x, y) in enumerate(zip(batch.x_support, batch.y_support, strict=True)):
            adapted = learner.adapt(x, y, num_steps=steps)
            torch.testing.assert_close(adapted(batch.x_query[task]), outputs[task])


def test_a_start_leaves_no_trace_in_module_and_buffers():
    case = MODELS["batch norm"]
    module, batch = case.build(), case.batch()
    learner = MetaLearner(module, fewstep.proto_maml(2, RATE), case.loss)
    plain = MetaLearner(copy.deepcopy(module), fewstep.maml(2, RATE), case.loss)
    for each in (learner, plain):
        each.step(batch)
    assert not module[8]._forward_pre_hooks
    first = "1.num_batches_tracked"  # two steps and a query set in both
    assert torch.equal(learner.buffers[first], plain.buffers[first])


def test_the_head_is_the_module_s_last_layer_whatever_is_frozen_or_learned_beside_it():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, y):
            return self.scale * F.cross_entropy(outputs, y)

    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    module[0].weight.requires_grad_(False)
    outputs = [
        MetaLearner(
            module, fewstep.proto_maml(2, RATE, head=head), case.loss, support_loss=Beside()
        ).predict(batch, 3)
        for head in (None, "2")
    ]
    assert torch.equal(*outputs)
    module[2].weight.requires_grad_(False)
    frozen = MetaLearner(module, fewstep.prototypical_networks(), case.loss)
    assert torch.equal(frozen.predict(batch, 3)[:, 0], outputs[0][:, 0])


def test_examples_without_a_class_count_for_none_and_a_class_without_examples_is_at_zero():
    x, module = torch.randn(1, 4, 5), nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    y = torch.tensor([[0, -100, 1, 1]])
    batch = TaskBatch(x, y, x, y)
    learner = MetaLearner(module, fewstep.prototypical_networks(), F.cross_entropy)
    f = module[0](x[0])
    means = torch.stack([f[0], f[2:].mean(0), torch.zeros(6)])
    expected = -(torch.cdist(f, means) ** 2)
    found = learner.predict(batch, 1)[0, 0]
    torch.testing.assert_close(found.log_softmax(-1), expected.detach().log_softmax(-1))


def test_numbers_stay_small_where_features_have_much_in_common():
    f = 1000 + torch.randn(6, 20, dtype=torch.float32)
    y = torch.tensor([0, 1, 2, 0, 1, 2])[None]
    learner = MetaLearner(
        nn.Linear(20, 3, dtype=torch.float32), fewstep.prototypical_networks(), F.cross_entropy
    )
    found = learner.predict(TaskBatch(f[None], y, f[None], y), 1)[0, 0]
    means = means_of(f.double(), y[0])
    expected = (-((f.double()[:, None] - means) ** 2).sum(-1)).log_softmax(-1)
    torch.testing.assert_close(found.log_softmax(-1).double(), expected, rtol=0, atol=0.02)


def test_a_part_that_works_in_place_was_given_what_came_before():
    class First(InnerStart):
        def __call__(self, phi, support, table):
            f = support.inputs_of("1")
            return {"2.bias": phi["2.bias"] + f.mean(1)[:, :2]}

    x, y = torch.randn(2, 3, 4), torch.randint(2, (2, 3))
    found = []
    for part in (nn.ReLU(inplace=True), nn.ReLU()):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), part, nn.Linear(5, 2))
        learner = MetaLearner(
            module, replace(fewstep.maml(1), inner_start=First()), F.cross_entropy
        )
        found.append(learner.meta_gradient(TaskBatch(x, y, x, y))[0])
    assert relative_error(*found) < 1e-12


def test_a_start_meets_the_same_parameters_when_it_is_made_and_called():
    class Shifted(InnerStart):
        def table(self, phi):
            return {n: torch.zeros_like(p) for n, p in phi.items()}

        def __call__(self, phi, support, table):
            return {n: p + table[n] for n, p in phi.items()}

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, y):
            return self.scale * F.cross_entropy(outputs, y)

    case = MODELS["batch norm"]
    module, batch = case.build(), case.batch()
    module[0].bias.requires_grad_(False)
    algorithm = replace(fewstep.maml(2, RATE), inner_start=Shifted(), norm_affine=PerStepAffine())
    learner = MetaLearner(module, algorithm, case.loss, support_loss=Scaled())
    gradient, _ = learner.meta_gradient(batch)
    for name, _ in module.named_parameters():
        if name in gradient:
            torch.testing.assert_close(gradient[f"inner_start.{name}"], gradient[name])
    assert gradient["inner_start.0.bias"].any()  # what is frozen may be shifted


class Returning(InnerStart):
    """Returns what it is told."""

    def __init__(self, result):
        self.result = result

    def __call__(self, phi, support, table):
        return self.result(phi, support)


def in_place(phi, support):
    with torch.no_grad():
        phi["0.weight"].mul_(2)
    return {}


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (Returning(in_place), "inner_start, Returning, changed a tensor that it was given"),
        (Returning(lambda phi, s: None), "inner_start gave a NoneType where a dict of tensors"),
        (Returning(lambda phi, s: {"0.bias": phi["0.bias"][0]}), r"gave \(4,\) for `0.bias` where"),
        (Returning(lambda phi, s: {"more": phi["0.bias"]}), "for `more` where nothing belongs"),
        (Returning(lambda phi, s: {"x": s.inputs_of("0.x")}), "unknown part '0.x'"),
        (Returning(lambda phi, s: {"x": s.inputs_of("1.0")}), "not call its part '1.0'"),
        (PrototypeStart("0"), "needs the number of a class for each support example"),
        (PrototypeStart("1.0"), "does not call its part '1.0' with a tensor; name one that it"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(start, message):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.Linear(3, 4))
            self.add_module("1", nn.Sequential(nn.Linear(3, 4)))

        def forward(self, x):
            return self.get_submodule("0")(x)

    x, y = torch.randn(1, 6, 2, 3), torch.arange(4).repeat(3)[None]
    batch = TaskBatch(x, y.view(1, 6, 2), x, y.view(1, 6, 2))
    learner = MetaLearner(
        Unused(),
        replace(fewstep.maml(0), inner_start=start),
        lambda outputs, y: F.cross_entropy(outputs.flatten(0, 1), y.flatten()),
    )
    with pytest.raises(InputError, match=message):
        learner.adapt(batch.x_support[0], batch.y_support[0])
    if isinstance(start, PrototypeStart) or start.result is not in_place:
        with pytest.raises(InputError, match=message):
            learner.meta_gradient(batch)


@pytest.mark.parametrize(
    ("module", "head"),
    [
        (nn.Linear(3, 2), "head"), (nn.Linear(3, 2, bias=False), None),
        (nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), None),
    ],
)  # fmt: skip
def test_a_learner_is_not_made_with_a_head_that_is_none(module, head):
    with pytest.raises(InputError, match=r"needs a linear layer with a bias, .*name one by head="):
        MetaLearner(module, fewstep.prototypical_networks(head=head), F.cross_entropy)


def test_a_head_of_tokens_is_refused():
    class OfTokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x).mean(1)

    x, y = torch.randn(1, 4, 4, 3), torch.tensor([[0, 1, 0, 1]])
    learner = MetaLearner(OfTokens(), fewstep.prototypical_networks(), F.cross_entropy)
    with pytest.raises(InputError, match=r"where 'head' is given \(4, 4, 3\)"):
        learner.meta_gradient(TaskBatch(x, y, x, y))


def test_targets_of_a_prototype_are_classes():
    learner = MetaLearner(nn.Linear(1, 1), fewstep.prototypical_networks(), F.mse_loss)
    x = torch.randn(2, 3, 1)
    with pytest.raises(InputError, match=r"targets are torch.float64, \(3, 1\) a task.*leave it"):
        learner.meta_gradient(TaskBatch(x, x, x, x))
