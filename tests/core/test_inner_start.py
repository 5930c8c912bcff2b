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
        (PrototypeStart("1.0"), "does not call its part '1.0' once, but 0 times; name another"),
        (Returning(lambda phi, s: {"0.bias": phi["0.bias"] * 1j}), "gave complex numbers for `0.b"),
        (Returning(lambda phi, s: [s.x.zero_(), {}][1]), "changed a tensor that it was given"),
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
    with pytest.raises(
        InputError, match=r"needs a linear layer with a bias, among .*name it, with"
    ):
        MetaLearner(module, fewstep.prototypical_networks(head=head), F.cross_entropy)


def test_a_head_of_tokens_is_refused():
    class OfTokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x).mean(1)

    x, y = torch.randn(1, 4, 4, 3), torch.tensor([[0, 1, 0, 1]])
    algorithm = fewstep.prototypical_networks(head="head")
    learner = MetaLearner(OfTokens(), algorithm, F.cross_entropy)
    with pytest.raises(InputError, match=r"where 'head' is given \(4, 4, 3\)"):
        learner.meta_gradient(TaskBatch(x, y, x, y))


def test_targets_of_a_prototype_are_classes():
    learner = MetaLearner(nn.Linear(1, 1), fewstep.prototypical_networks(), F.mse_loss)
    x = torch.randn(2, 3, 1)
    for y, shape in ((x, r"\(3, 1\)"), (x[..., 0], r"\(3,\)")):
        with pytest.raises(
            InputError, match=f"targets are torch.float64, {shape} a task.*leave it"
        ):
            learner.meta_gradient(TaskBatch(x, y, x, y))


def of_mlp(start, *, order=2, steps=STEPS, module=None, **options):
    algorithm = replace(
        fewstep.maml(steps, RATE), inner_start=start, derivative_order=FixedOrder(order)
    )
    module = MODELS["mlp"].build() if module is None else module
    return MetaLearner(module, algorithm, F.cross_entropy, **options)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_start_may_give_constants(route, order):
    zeros = Returning(lambda phi, s: {n: 0 * phi[n].detach() for n in ("2.weight", "2.bias")})
    module, batch = MODELS["mlp"].build(), MODELS["mlp"].batch()
    phi, losses = dict(module.named_parameters()), []
    for x, y, x_query, y_query in zip(*batch.tensors(), strict=True):
        theta = phi | {n: torch.zeros_like(phi[n]).requires_grad_() for n in ("2.weight", "2.bias")}
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(module, theta, (x,)), y)
            gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=order == 2)
            theta = {n: p - RATE * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
        losses.append(F.cross_entropy(functional_call(module, theta, (x_query,)), y_query))
    body = [phi["0.weight"], phi["0.bias"]]
    expected = torch.autograd.grad(torch.stack(losses).mean(), body)
    gradient, _ = of_mlp(zeros, order=order, module=module, **route).meta_gradient(batch)
    found = {n: gradient[n] for n in ("0.weight", "0.bias")}
    assert relative_error(found, dict(zip(found, expected, strict=True))) < 1e-12
    assert not gradient["2.weight"].any()


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_network_that_a_start_forgot_to_give_is_told(route):
    class Forgot(InnerStart):
        def __init__(self):
            self.network = nn.Linear(8, 3)

        def __call__(self, phi, support, table):
            return {"2.bias": self.network(support.inputs_of("2")).mean(1)}

    with pytest.raises(InputError, match=r"reads a parameter of shape .* that nothing would learn"):
        of_mlp(Forgot(), **route).meta_gradient(MODELS["mlp"].batch())


def test_a_table_is_not_a_start_s_to_change():
    class Shifts(InnerStart):
        def __init__(self, change):
            self.change = change

        def table(self, phi):
            return {"by": torch.ones(3)}

        def __call__(self, phi, support, table):
            self.change(table)
            return {"2.bias": phi["2.bias"] * table["by"]}

    def replaced(table):
        table["by"] = table["by"] + 1

    def written(table):
        with torch.no_grad():
            table["by"].add_(1)

    batch = MODELS["mlp"].batch()
    with pytest.raises(TypeError, match="does not support item assignment"):
        of_mlp(Shifts(replaced)).meta_gradient(batch)
    with pytest.raises(InputError, match="inner_start, Shifts, changed a tensor that it was given"):
        of_mlp(Shifts(written)).meta_gradient(batch)


@pytest.mark.parametrize(
    "table", [None, [torch.ones(1)], {"k": 0.1}, {"k": torch.tensor(3)}, {3: torch.ones(1)}]
)
def test_a_table_is_of_tensors_that_can_be_learned(table):
    class Given(InnerStart):
        def table(self, phi):
            return table

        def __call__(self, phi, support, table):
            return {}

    with pytest.raises(InputError, match="the table of inner_start must be a dict of floating-poi"):
        of_mlp(Given())


def test_a_frozen_body_under_prototypes_learns_nothing_and_is_told():
    module = MODELS["mlp"].build()
    module[0].requires_grad_(False)
    for algorithm in (
        fewstep.prototypical_networks(),
        replace(fewstep.proto_maml(2), derivative_order=FixedOrder(1)),
    ):
        learner = MetaLearner(module, algorithm, F.cross_entropy)
        with pytest.raises(InputError, match="nothing that is learned takes part in the meta-loss"):
            learner.meta_gradient(MODELS["mlp"].batch())


def test_the_head_gives_the_outputs():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)
            self.body = nn.Linear(4, 6)
            self.again = self.body

        def forward(self, x):
            return self.head(input=self.again(x).tanh())

    batch, module = MODELS["mlp"].batch(), HeadFirst()
    unnamed = MetaLearner(module, fewstep.prototypical_networks(), F.cross_entropy)
    with pytest.raises(InputError, match="does not return what its part 'body' gives"):
        unnamed.meta_gradient(batch)
    named = MetaLearner(module, fewstep.prototypical_networks(head="head"), F.cross_entropy)
    gradient, _ = named.meta_gradient(batch)
    assert gradient["body.weight"].any()
    assert not gradient["head.weight"].any()

    seen = []
    start = Returning(lambda phi, s: seen.append(s.inputs_of("again")) or {})
    of_mlp(start, module=module).adapt(batch.x_support[0], batch.y_support[0])
    assert torch.equal(seen[0][0], batch.x_support[0])


def test_a_part_that_is_called_twice_has_no_one_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(self.layer(x)))

    look = Returning(lambda phi, s: {"head.bias": s.inputs_of("layer")[:, 0, :3]})
    with pytest.raises(InputError, match="does not call its part 'layer' once, but 2 times; name"):
        of_mlp(look, module=Twice()).meta_gradient(MODELS["mlp"].batch())


class Modulated(InnerStart):
    """Features of a modulated body, then prototypes of them (CNAPs), or a start by the gradient."""

    def __init__(self, kind):
        self.kind, self.modes = kind, []

    def __call__(self, phi, support, table):
        self.modes.append(support.is_training)
        if self.kind == "gradient":
            gradient = support.gradient()
            return {n: p * torch.sigmoid(gradient[n]) for n, p in phi.items()}
        scale = 1 + support.inputs_of("2").mean((1, 2))
        body = {"0.weight": phi["0.weight"] * scale[:, None, None]}
        return body | {"2.bias": support.inputs_of("2", body).mean(1)[:, :3]}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("kind", ["gradient", "features"])
def test_a_start_sees_gradients_and_features_of_what_it_makes(kind, route, order):
    module, batch = MODELS["mlp"].build(), MODELS["mlp"].batch()
    phi, losses = dict(module.named_parameters()), []
    for x, y, x_query, y_query in zip(*batch.tensors(), strict=True):
        if kind == "gradient":
            loss = F.cross_entropy(functional_call(module, phi, (x,)), y)
            gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=order == 2)
            pairs = zip(phi.items(), gradient, strict=True)
            theta = {n: p * torch.sigmoid(g) for (n, p), g in pairs}
        else:
            scale = 1 + features_of(module, "2", phi, x).mean()
            theta = phi | {"0.weight": phi["0.weight"] * scale}
            theta["2.bias"] = features_of(module, "2", theta, x).mean(0)[:3]
        for _ in range(STEPS):
            theta = {n: p.clone() for n, p in theta.items()}
            loss = F.cross_entropy(functional_call(module, theta, (x,)), y)
            gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=order == 2)
            theta = {n: p - RATE * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
        losses.append(F.cross_entropy(functional_call(module, theta, (x_query,)), y_query))
    gradient = torch.autograd.grad(
        torch.stack(losses).mean(), list(phi.values()), materialize_grads=True, allow_unused=True
    )
    start = Modulated(kind)
    learner = of_mlp(start, order=order, module=module, **route)
    found, _ = learner.meta_gradient(batch)
    assert relative_error(found, dict(zip(phi, gradient, strict=True))) < 1e-12
    learner.predict(batch, 3)
    assert (start.modes[0], start.modes[-1]) == (True, False)


def test_attention_in_a_start_has_both_derivatives():
    class Attends(InnerStart):
        def __init__(self):
            self.network = nn.MultiheadAttention(8, 2, batch_first=True)

        def table(self, phi):
            return dict(self.network.named_parameters())

        def __call__(self, phi, support, table):
            f = support.inputs_of("2")
            mixed, _ = functional_call(
                self.network, dict(table), (f, f, f), {"need_weights": False}
            )
            return {"2.bias": phi["2.bias"] + mixed.mean(1)[:, :3]}

    start, batch, module = Attends(), MODELS["mlp"].batch(), MODELS["mlp"].build()
    found = [
        of_mlp(start, module=module, **route).meta_gradient(batch)[0]
        for route in ({}, {"checkpoint_every": 1, "replay": True})
    ]
    assert relative_error(*found) < 1e-12


def test_a_start_s_own_generator_draws_the_same_by_segments():
    class Noisy(InnerStart):
        def __init__(self):
            self.generator = torch.Generator().manual_seed(3)

        def __call__(self, phi, support, table):
            noise = torch.randn(3, 3, generator=self.generator)
            return {"2.bias": phi["2.bias"] + noise}

    batch, module = MODELS["mlp"].batch(), MODELS["mlp"].build()
    found = [
        of_mlp(Noisy(), module=module, **route).meta_gradient(batch)[0]
        for route in ({}, {"checkpoint_every": 1})
    ]
    assert relative_error(*found) < 1e-12
