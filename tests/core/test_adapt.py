"""Adapted modules, and which parameters the inner loop may change."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fewstep import AdaptedParameters, InputError, MetaLearner, anil, cavia, fomaml, maml
from fewstep.models import Context
from tests.core.reference import MODELS, WAYS, Case, plain_meta_gradient, relative_error

RECIPES = {"maml": maml, "fomaml": fomaml}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
every_model = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)

pytestmark = pytest.mark.usefixtures("float64")


def plain_descent(module: nn.Module, loss, x: Tensor, y: Tensor, steps: int, lr: float):
    """Return theta[steps] and the buffers that plain training by SGD arrives at."""
    theta = {name: p.detach().clone() for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    module.train()
    for _ in range(steps):
        theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
        support = loss(functional_call(module, (theta, buffers), (x,)), y)
        gradient = torch.autograd.grad(support, list(theta.values()))
        theta = {n: p - lr * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
    return {name: p.detach() for name, p in theta.items()}, buffers


@every_model
@every_recipe
@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_adapted_module_is_that_of_plain_descent(case, recipe, vectorize):
    module, batch = case.build(), case.batch(tasks=1)
    x, y = batch.x_support[0], batch.y_support[0]
    adapted = MetaLearner(module, recipe(3, 0.3), case.loss, vectorize=vectorize).adapt(x, y)
    theta, buffers = plain_descent(module, case.loss, x, y, 3, 0.3)
    assert type(adapted) is type(module)
    assert relative_error({n: p.detach() for n, p in adapted.named_parameters()}, theta) < 1e-12
    for name, buffer in adapted.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-12, atol=1e-14)


@every_model
def test_evaluation_scores_the_adapted_module(case):
    batch = case.batch()
    learner = MetaLearner(case.build(), maml(2, 0.3), case.loss)
    scores = learner.evaluate(batch, 3)
    for task, (x, y, x_query, y_query) in enumerate(zip(*batch.tensors(), strict=True)):
        for steps in range(3):
            outputs = learner.adapt(x, y, num_steps=steps)(x_query)
            loss = case.loss(outputs, y_query)
            torch.testing.assert_close(scores.loss[task, steps], loss, rtol=1e-12, atol=0)
            if not y_query.is_floating_point():
                right = (outputs.argmax(-1) == y_query).double().mean()
                torch.testing.assert_close(scores.metric[task, steps], right)


def test_adapted_module_drops_nothing_and_uses_batch_statistics():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, WAYS))
    case = Case(lambda: module, (4,))
    batch = case.batch(tasks=1)
    x, y = 5 + batch.x_support[0], batch.y_support[0]
    adapted = MetaLearner(module, maml(2), case.loss).adapt(x, y)
    norm, _, linear = adapted
    normalised = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(adapted(x), linear(normalised))
    assert torch.equal(adapted(x), adapted(x))


def test_adapted_module_and_learner_share_nothing():
    case = MODELS["batch norm"]
    learner, batch = MetaLearner(case.build(), maml(2), case.loss), case.batch()
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    mine = {n: t.clone() for n, t in learner.module.state_dict().items()}
    theirs = {n: t.clone() for n, t in adapted.state_dict().items()}

    for tensor in adapted.state_dict().values():
        tensor.add_(1)
    assert all(torch.equal(t, mine[n]) for n, t in learner.module.state_dict().items())

    adapted.load_state_dict(theirs)
    learner.step(batch)
    assert all(torch.equal(t, theirs[n]) for n, t in adapted.state_dict().items())


class Remembering(nn.Linear):
    """Keeps what it saw last in an attribute."""

    last: Tensor | None = None

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_adapted_module_is_without_what_training_left_behind(vectorize):
    case = Case(lambda: nn.Sequential(Remembering(4, 8), nn.Tanh(), nn.Linear(8, WAYS)), (4,))
    module, batch = case.build(), case.batch()
    learner = MetaLearner(module, maml(2, 0.1), case.loss, vectorize=vectorize)
    learner.step(batch)
    assert (module[0].last is None) == vectorize  # under vmap it would be a tensor nothing reads
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    assert adapted[0].last is None
    adapted(batch.x_query[0])
    assert adapted[0].last.shape == (len(batch.x_query[0]), 8)


def test_adapted_module_can_be_trained_further():
    case = MODELS["mlp"]
    batch = case.batch()
    adapted = MetaLearner(case.build(), maml(1), case.loss).adapt(
        batch.x_support[0], batch.y_support[0]
    )
    case.loss(adapted(batch.x_query[0]), batch.y_query[0]).backward()
    assert all(p.is_leaf and p.grad is not None for p in adapted.parameters())


@every_recipe
def test_frozen_parameters_stay(recipe):
    case = MODELS["batch norm"]
    module, batch, algorithm = case.build(), case.batch(), recipe(2, 0.3)
    module[0].requires_grad_(False)
    frozen = module[0].weight.clone()
    learner = MetaLearner(module, algorithm, case.loss)

    gradient, _ = learner.meta_gradient(batch)
    expected, *_ = plain_meta_gradient(module, algorithm, case.loss, batch)
    assert relative_error(gradient, expected) < 1e-9
    assert not gradient.keys() & {"0.weight", "0.bias"}

    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    learner.step(batch)
    assert torch.equal(adapted[0].weight, frozen)
    assert torch.equal(module[0].weight, frozen)
    assert not adapted[0].weight.requires_grad


class Tied(nn.Module):
    """Two layers with one weight; the same function of it, if `is_tied` is false, without ties."""

    def __init__(self, weight: Tensor, is_tied: bool) -> None:
        super().__init__()
        self.is_tied = is_tied
        self.first = nn.Linear(4, 4, bias=False)
        self.first.weight = nn.Parameter(weight.clone())
        if is_tied:
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.second(hidden) if self.is_tied else F.linear(hidden, self.first.weight)


@every_recipe
@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_tied_weights_are_one_parameter(recipe, vectorize):
    weight, algorithm = torch.randn(4, 4), recipe(3, 0.3)
    case = Case(lambda: Tied(weight, is_tied=True), (4,))
    module, batch = case.build(), case.batch()
    learner = MetaLearner(module, algorithm, case.loss, vectorize=vectorize)

    gradient, _ = learner.meta_gradient(batch)
    untied = Tied(weight, is_tied=False)
    expected, *_ = plain_meta_gradient(untied, algorithm, case.loss, batch)
    assert relative_error(gradient, expected) < 1e-9

    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    x, y = batch.x_support[0], batch.y_support[0]
    theta, _ = plain_descent(untied, case.loss, x, y, 3, 0.3)
    assert adapted.first.weight is adapted.second.weight
    torch.testing.assert_close(
        adapted.first.weight.detach(), theta["first.weight"], rtol=1e-12, atol=0
    )


CHOICES = {
    "all": (AdaptedParameters(), {"0.weight", "0.bias", "2.weight", "2.bias"}),
    "head only": (AdaptedParameters(include=("2.*",)), {"2.weight", "2.bias"}),
    "body only": (AdaptedParameters(exclude=("2.*",)), {"0.weight", "0.bias"}),
    "both": (AdaptedParameters(include=("*.weight",), exclude=("0.*",)), {"2.weight"}),
    "by name": (AdaptedParameters(include=("0.bias", "2.bias")), {"0.bias", "2.bias"}),
}
every_choice = pytest.mark.parametrize(("chosen", "names"), CHOICES.values(), ids=CHOICES)


@every_choice
@every_recipe
def test_unadapted_parameters_keep_their_values(chosen, names, recipe):
    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    learner = MetaLearner(module, recipe(2, 0.3, adapted=chosen), case.loss)
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    before = dict(module.named_parameters())
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert changed == names


@every_choice
@every_recipe
def test_unadapted_parameters_still_get_meta_gradients(chosen, names, recipe):
    case = MODELS["mlp"]
    module, batch, algorithm = case.build(), case.batch(), recipe(2, 0.3, adapted=chosen)
    gradient, _ = MetaLearner(module, algorithm, case.loss).meta_gradient(batch)
    expected, *_ = plain_meta_gradient(module, algorithm, case.loss, batch, sorted(names))
    assert relative_error(gradient, expected) < 1e-9
    assert all(g.abs().max() > 0 for g in gradient.values())


def test_anil_is_maml_whose_body_is_excluded():
    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    recipes = {
        "anil": anil(3, 0.3, head="2.*"),
        "without body": maml(3, 0.3, adapted=AdaptedParameters(exclude=("0.*",))),
        "maml": maml(3, 0.3),
    }
    found = {
        name: MetaLearner(module, algorithm, case.loss).meta_gradient(batch)[0]
        for name, algorithm in recipes.items()
    }
    assert relative_error(found["anil"], found["without body"]) == 0
    assert relative_error(found["anil"], found["maml"]) > 1e-2


class WithContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.context = Context(2)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, WAYS))

    def forward(self, x):
        return self.body(self.context(x))


@pytest.mark.parametrize("checkpoint_every", [None, 1])
def test_cavia_adapts_a_context_from_zeros_and_trains_the_rest(checkpoint_every):
    case = MODELS["mlp"]
    module, batch = WithContext(), case.batch()
    learner = MetaLearner(module, cavia(3, 0.7), case.loss, checkpoint_every=checkpoint_every)
    gradient, metrics = learner.meta_gradient(batch)
    expected, meta_loss, _ = plain_meta_gradient(
        module, maml(3, 0.7), case.loss, batch, ["context.vector"]
    )
    assert expected.pop("context.vector").abs().max() > 0
    assert relative_error(gradient, expected) < 1e-12
    torch.testing.assert_close(metrics.loss, meta_loss)
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
    torch.testing.assert_close(metrics.gradient_norm, norm)

    before = learner.state_tensors()
    for _ in range(3):
        learner.step(batch)
    assert module.context.vector.eq(0).all()
    assert not torch.equal(module.body[0].weight, before["model.body.0.weight"])
    assert learner.adapt(batch.x_support[0], batch.y_support[0]).context.vector.abs().max() > 0
    with torch.no_grad():
        module.context.vector.fill_(0.5)
    learner.load_state_tensors(before)
    assert module.context.vector.eq(0).all()


def test_starts_that_are_fixed_are_of_what_is_adapted_and_leave_something_to_learn():
    def learner(**patterns):
        algorithm = maml(1, adapted=AdaptedParameters(**patterns))
        return MetaLearner(WithContext(), algorithm, F.cross_entropy)

    with pytest.raises(InputError, match=r"'body\.\*' matches no parameter; .* context\.vector$"):
        learner(include=("context.*",), fixed_start=("body.*",))
    with pytest.raises(InputError, match="leaves nothing to the outer optimiser; fix fewer"):
        learner(fixed_start=("*",))
    with pytest.raises(InputError, match=r"fixed_start='body' is a string; give a tuple"):
        learner(fixed_start="body")


def test_a_name_matches_itself_whatever_it_holds():
    names = ["body.w", "p.a[0]", "p.a[1]", "p.a0"]
    assert AdaptedParameters(("p.a[0]",)).choose(names) == ("p.a[0]", "p.a0")
    assert AdaptedParameters(exclude=("p.a[1]",)).choose(names) == ("body.w", "p.a[0]", "p.a0")
    with pytest.raises(InputError, match=r"'p\.a\[2\]' matches no"):
        AdaptedParameters(("p.a[2]",)).choose(names)
