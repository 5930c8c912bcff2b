"""Clipping, of each task's support gradient and of the meta-gradient."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewstep import (
    SGD,
    ClipByNorm,
    ClipByValue,
    HypergradientRates,
    InputError,
    LearnedRate,
    MetaLearner,
    NoClipping,
    TaskBatch,
    fomaml,
    maml,
)
from tests.core.reference import MODELS, plain_meta_gradient, relative_error

pytestmark = pytest.mark.usefixtures("float64")

CASES = {name: MODELS[name] for name in ("mlp", "batch norm", "Conv4")}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _norms(module, batch, loss):
    """Return the norm of each task's support gradient at the start."""
    module.train()
    found = []
    for x, y in zip(batch.x_support, batch.y_support, strict=True):
        gradient = torch.autograd.grad(loss(module(x), y), list(module.parameters()))
        found.append(torch.sqrt(sum(g.square().sum() for g in gradient)))
    return torch.stack(found)


def _middle(module, batch, loss):
    """Return a limit above some tasks' norms and below others'."""
    norms = _norms(module, batch, loss).sort().values
    return float(norms[:2].mean())


@every_case
@pytest.mark.parametrize("recipe", [maml, fomaml])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_inner_clipping_is_that_of_a_plain_loop(case, recipe, vectorize):
    module, batch = case.build(), case.batch()
    limit = _middle(module, batch, case.loss)
    unclipped = recipe(num_steps=2, inner_lr=0.3)
    algorithm = replace(unclipped, inner_clipping=ClipByNorm(limit))
    expected, *_ = plain_meta_gradient(module, algorithm, case.loss, batch)
    otherwise, *_ = plain_meta_gradient(module, unclipped, case.loss, batch)
    found, _ = MetaLearner(module, algorithm, case.loss, vectorize=vectorize).meta_gradient(batch)
    assert relative_error(found, expected) < 1e-9
    assert relative_error(expected, otherwise) > 1e-3
    for modes in ({"chunk_size": 1}, {"checkpoint_every": 1}, {"replay": True}):
        again, _ = MetaLearner(module, algorithm, case.loss, **modes).meta_gradient(batch)
        assert relative_error(again, expected) < 1e-9


@every_case
def test_a_step_is_no_longer_than_the_limit(case):
    module, batch = case.build(), case.batch()
    limit = _middle(module, batch, case.loss)
    norms = _norms(module, batch, case.loss)
    clipped = maml(1, 0.5), replace(maml(1, 0.5), inner_clipping=ClipByNorm(limit))
    for algorithm in clipped:
        learner = MetaLearner(module, algorithm, case.loss)
        for task, norm in enumerate(norms):
            adapted = learner.adapt(batch.x_support[task], batch.y_support[task])
            pairs = zip(adapted.parameters(), module.parameters(), strict=True)
            length = torch.sqrt(sum((a - b).square().sum() for a, b in pairs))
            expected = norm if algorithm is clipped[0] else min(norm, limit)
            torch.testing.assert_close(length, 0.5 * torch.as_tensor(expected))


def test_a_gradient_of_zero_stays_zero_and_has_derivatives():
    module = nn.Linear(2, 1)
    x, y = torch.zeros(1, 3, 2), torch.zeros(1, 3, 1)
    with torch.no_grad():
        module.bias.zero_()
    algorithm = replace(maml(2, 0.3), inner_clipping=ClipByNorm(1.0))
    learner = MetaLearner(module, algorithm, F.mse_loss)
    gradient, metrics = learner.meta_gradient(TaskBatch(x, y, torch.ones(1, 3, 2), y + 1))
    assert metrics.support_loss.abs().max() == 0
    assert all(g.isfinite().all() for g in gradient.values())


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_the_meta_gradient_is_clipped_as_torch_clips(limit):
    case = CASES["mlp"]
    module, batch = case.build(), case.batch()
    algorithm = replace(
        maml(2, 0.3), outer=SGD(1.0), outer_clipping=ClipByNorm(limit), inner_rate=LearnedRate(0.3)
    )
    learner = MetaLearner(module, algorithm, case.loss)
    gradient, _ = learner.meta_gradient(batch)
    before = {n: p.detach().clone() for n, p in learner.parameters.items()}
    learner.step(batch)
    copies = [nn.Parameter(p) for n, p in before.items() if n in dict(module.named_parameters())]
    for copy, (name, _) in zip(copies, module.named_parameters(), strict=True):
        copy.grad = gradient[name].clone()
    nn.utils.clip_grad_norm_(copies, limit)
    for copy, (name, p) in zip(copies, module.named_parameters(), strict=True):
        torch.testing.assert_close(before[name] - p, copy.grad, rtol=1e-4, atol=1e-12)
    rate = learner.parameters["inner_lr.all"]
    torch.testing.assert_close(before["inner_lr.all"] - rate, gradient["inner_lr.all"])


def test_the_hypergradient_is_that_of_the_clipped_step():
    case = CASES["mlp"]
    module, batch = case.build(), case.batch()
    found = []
    for exact in (True, False):
        algorithm = replace(
            maml(1, 0.3),
            inner_rate=LearnedRate(0.3),
            rate_update=HypergradientRates(0.1, exact=exact),
            inner_clipping=ClipByNorm(_middle(module, batch, case.loss)),
        )
        gradient, _ = MetaLearner(module, algorithm, case.loss).meta_gradient(batch)
        found.append(gradient["inner_lr.all"])
    torch.testing.assert_close(*found)
    algorithm = replace(algorithm, inner_clipping=NoClipping())
    gradient, _ = MetaLearner(module, algorithm, case.loss).meta_gradient(batch)
    assert (gradient["inner_lr.all"] - found[0]).abs() > 1e-3 * found[0].abs()


def test_clipping_keeps_a_rate_that_is_too_large_finite():
    """Three steps at a rate of 1e4 on squared errors overflow float32, clipped ones do not."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)).float()
    x, y = torch.randn(2, 2, 6, 4).float(), torch.randn(2, 2, 6, 1).float()
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    with pytest.raises(FloatingPointError):
        MetaLearner(module, maml(5, 1e4), F.mse_loss).step(batch)
    algorithm = replace(maml(5, 1e4), inner_clipping=ClipByNorm(1e-4))
    assert MetaLearner(module, algorithm, F.mse_loss).step(batch).loss.isfinite()


def _plainly(flat, limit, sizes):
    """Return the concatenated gradients of two parameters, clipped by the formula."""
    norms = torch.stack([torch.linalg.vector_norm(part) for part in flat.split(sizes)])
    return flat * limit / torch.linalg.vector_norm(norms).clamp(min=limit)


@pytest.mark.parametrize("limit", [0.5, 1e3], ids=["clipped", "not clipped"])
def test_two_derivatives_go_through_the_norm(limit):
    flat, weights, direction = torch.randn(3, 9, requires_grad=True)

    def derivatives(clipped):
        value = (weights * clipped).sum()
        (first,) = torch.autograd.grad(value, flat, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), flat)
        return clipped, first, second

    w, b = flat.split([6, 3])
    found = ClipByNorm(limit)({"w": w.view(1, 2, 3), "b": b.view(1, 3)})
    found = torch.cat([found["w"].flatten(), found["b"].flatten()])
    torch.testing.assert_close(
        derivatives(found), derivatives(_plainly(flat, limit, [6, 3])), rtol=1e-12, atol=1e-14
    )


def test_a_parameter_whose_gradient_is_zero_has_second_derivatives_too():
    """At a = 0, d^2 (w . a limit / |(a, b)|) / da db = -w limit b / |b|^3."""
    a, b, w = torch.zeros(1, 2, requires_grad=True), torch.tensor([[3.0, 4.0]]), torch.ones(2)
    b.requires_grad_()
    clipped = ClipByNorm(1.0)({"a": a, "b": b})["a"]
    (first,) = torch.autograd.grad((w * clipped).sum(), a, create_graph=True)
    torch.testing.assert_close(first, torch.full((1, 2), 1 / 5))
    by_a, by_b = torch.autograd.grad(first.sum(), (a, b))
    torch.testing.assert_close(by_a, torch.zeros(1, 2))
    torch.testing.assert_close(by_b, -2 * b.detach() / 125)


def test_a_norm_whose_square_is_no_float32_is_clipped():
    gradients = {"w": torch.full((1, 2, 2), 1e30), "b": torch.zeros(1, 2)}
    gradients = {n: g.float().requires_grad_() for n, g in gradients.items()}
    clipped = ClipByNorm(1.0)(gradients)
    torch.testing.assert_close(clipped["w"], torch.full((1, 2, 2), 0.5).float())
    for found in torch.autograd.grad(clipped["w"][0, 0, 0], list(gradients.values())):
        assert found.isfinite().all()


@pytest.mark.parametrize("slot", ["inner_clipping", "outer_clipping"])
def test_parameters_keep_their_kinds(slot):
    half = torch.bfloat16

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8).to(half), nn.Linear(8, 3).float()
            self.scale = nn.Parameter(torch.ones(()).float())

        def forward(self, x):
            return self.scale * self.head(torch.tanh(self.body(x.to(half))).float())

    module, batch = Mixed(), CASES["mlp"].batch()
    kinds = [p.dtype for p in module.parameters()]
    algorithm = replace(maml(2, 0.1), **{slot: ClipByNorm(0.01)})
    MetaLearner(module, algorithm, F.cross_entropy).step(batch)
    assert [p.dtype for p in module.parameters()] == kinds


@pytest.mark.parametrize("part", [ClipByNorm, ClipByValue])
@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_is_positive(part, limit):
    with pytest.raises(
        InputError, match=rf"^{part.__name__}\(limit={limit}\) must have a positive"
    ):
        part(limit)
