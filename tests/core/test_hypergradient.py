"""Alpha MAML's derivatives against differences, and its collapse to MAML."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewstep import (
    SGD,
    Adam,
    Algorithm,
    ClipByNorm,
    ConstantRate,
    CosineAnnealing,
    DerivativeAnnealing,
    ElementRates,
    FixedOrder,
    Guards,
    HypergradientAdam,
    HypergradientRates,
    HypergradientSGD,
    InputError,
    LayerStepRates,
    LearnedRate,
    MetaLearner,
    MultiStepLoss,
    PerStepAffine,
    StepRates,
    TaskBatch,
    alpha_maml,
    auto,
    maml_plus_plus,
    meta_sgd,
)
from fewstep.core.hypergradient import SAFE
from tests.core.reference import MODELS, Case

pytestmark = pytest.mark.usefixtures("float64")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


CASE = Case(net, (4,))
REDUCTIONS = ("mean", "sum")


def learner_of(algorithm: Algorithm, **options) -> MetaLearner:
    torch.manual_seed(1)
    return MetaLearner(net(), algorithm, F.cross_entropy, **options)


def plain(num_steps: int = 1, **parts) -> Algorithm:
    """SGD-MAML whose inner rate is one more parameter."""
    algorithm = Algorithm(num_steps, LearnedRate(0.3), outer=SGD(0.1), task_reduction="sum")
    return replace(algorithm, **parts)


def reduced(learner: MetaLearner, batch) -> torch.Tensor:
    losses = learner.meta_gradient(batch)[1].task_loss
    return losses.sum() if learner.algorithm.task_reduction == "sum" else losses.mean()


def difference(learner: MetaLearner, tensor: torch.Tensor, batch, h: float = 1e-5) -> torch.Tensor:
    values = []
    for shift in (h, -2 * h):
        with torch.no_grad():
            tensor += shift
        values.append(reduced(learner, batch))
    with torch.no_grad():
        tensor += h
    return (values[0] - values[1]) / (2 * h)


# alpha


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_derivative_in_alpha(num_steps, tasks, reduction):
    learner, batch = learner_of(plain(num_steps, task_reduction=reduction)), CASE.batch(tasks)
    gradient = learner.meta_gradient(batch)[0]["inner_lr.all"]
    expected = difference(learner, learner.parameters["inner_lr.all"], batch)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_without_a_step_no_rate_moves(exact):
    learner = learner_of(plain(0, rate_update=HypergradientRates(0.01, exact=exact)))
    learner.step(CASE.batch(3))
    assert learner.parameters["inner_lr.all"] == 0.3


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_alpha_follows_the_products_of_query_and_support_gradients(num_steps, chunk_size):
    """lambda and q, written plainly; for one step the exact form is the cheap one."""
    eta, batch = 0.01, CASE.batch(3)
    exact = learner_of(plain(num_steps, rate_update=HypergradientRates(eta)), chunk_size=chunk_size)
    cheap = learner_of(
        plain(num_steps, rate_update=HypergradientRates(eta, exact=False)), chunk_size=chunk_size
    )
    sums = {"exact": 0.0, "cheap": 0.0}
    module = exact.module.train()
    for x_s, y_s, x_q, y_q in zip(*batch.tensors(), strict=True):
        theta = dict(module.named_parameters())
        points, steps = [list(theta.values())], []
        for _ in range(num_steps):
            loss = F.cross_entropy(torch.func.functional_call(module, theta, (x_s,)), y_s)
            s = torch.autograd.grad(loss, points[-1], create_graph=True)
            theta = {n: p - 0.3 * g for (n, p), g in zip(theta.items(), s, strict=True)}
            points.append(list(theta.values()))
            steps.append(s)
        query = F.cross_entropy(torch.func.functional_call(module, theta, (x_q,)), y_q)
        q = torch.autograd.grad(query, points[-1], retain_graph=True)
        for k, s in enumerate(steps):
            lam = torch.autograd.grad(query, points[k + 1], retain_graph=True)
            sums["exact"] += sum((a * b).sum() for a, b in zip(lam, s, strict=True))
            sums["cheap"] += sum((a * b).sum() for a, b in zip(q, s, strict=True))
    for name, learner in (("exact", exact), ("cheap", cheap)):
        learner.step(batch)
        alpha = learner.parameters["inner_lr.all"].detach()
        torch.testing.assert_close(alpha, 0.3 + eta * sums[name].detach(), rtol=1e-10, atol=0)
    if num_steps > 1:
        assert abs(sums["exact"] - sums["cheap"]) > 1e-3 * abs(sums["exact"])


def test_a_whole_table_follows_its_hypergradient():
    """Our extension: every rate of layer and step, with the multi-step loss and per-step norms."""
    eta, batch = 0.01, CASE.batch(3)
    learner = learner_of(
        plain(
            3,
            inner_rate=LayerStepRates(0.3),
            rate_update=HypergradientRates(eta),
            query_weights=MultiStepLoss(),
            norm_affine=PerStepAffine(),
            derivative_order=DerivativeAnnealing(0),
        )
    )
    names = [n for n in learner.parameters if n.startswith("inner_lr.")]
    expected = {}
    for name in names:
        rates = learner.parameters[name]
        differences = [difference(learner, rates[k], batch) for k in range(3)]
        expected[name] = rates.detach() - eta * torch.stack(differences)
    learner.step(batch)
    for name in names:
        torch.testing.assert_close(
            learner.parameters[name].detach(), expected[name], rtol=1e-8, atol=1e-10
        )


# beta


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("optimiser", [HypergradientSGD, HypergradientAdam])
def test_derivative_in_beta(optimiser, num_steps, tasks, reduction):
    """-d L[t](theta[t-2] - beta u[t-1]) / d beta, by differences in beta."""
    algorithm = plain(num_steps, task_reduction=reduction, outer=optimiser(0.05, 1e-4))
    learner = learner_of(algorithm)
    first, second = CASE.batch(tasks), CASE.batch(tasks)
    learner.step(first)
    before = {n: p.detach().clone() for n, p in learner.parameters.items()}
    learner.step(first)  # beta has moved once; u[t-1] is not a first step's
    moved = {n: (p.detach() - before[n]) for n, p in learner.parameters.items()}
    state = learner.state_tensors()
    beta = state["optimiser.0.weight.beta"]
    values = []
    for shift in (1e-6, -1e-6):
        with torch.no_grad():
            for name, p in learner.parameters.items():
                p.copy_(before[name] + moved[name] * (beta + shift) / beta)
        values.append(reduced(learner, second))
    learner.load_state_tensors(state)
    learner.step(second)
    after = learner.state_tensors()
    expected = -(values[0] - values[1]) / 2e-6
    torch.testing.assert_close(after["optimiser.0.weight.h"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(after["optimiser.0.weight.beta"], beta + 1e-4 * expected)


def test_beta_is_used_at_once_and_the_first_update_leaves_it():
    learner, batch = learner_of(plain(outer=HypergradientSGD(0.05, 0.01))), CASE.batch()
    for _ in range(3):
        before = learner.parameters["0.weight"].detach().clone()
        gradient = learner.meta_gradient(batch)[0]["0.weight"]
        was_first = learner.iteration == 0
        learner.step(batch)
        beta = learner.state_tensors()["optimiser.0.weight.beta"]
        assert (beta == 0.05) == was_first
        torch.testing.assert_close(learner.parameters["0.weight"], before - beta * gradient)


def test_the_direction_of_adam_is_pytorch_s():
    batches = [CASE.batch() for _ in range(4)]
    ours = learner_of(plain(outer=HypergradientAdam(0.01, 0.0)))
    theirs = learner_of(plain(outer=Adam(0.01)))
    for batch in batches:
        ours.step(batch)
        theirs.step(batch)
    for name, p in ours.parameters.items():
        torch.testing.assert_close(p, theirs.parameters[name])


# The whole


def test_zero_hyper_rates_are_sgd_maml_bit_for_bit():
    alpha = learner_of(alpha_maml(2, 0.3, 0.1, inner_hyper_lr=0.0, outer_hyper_lr=0.0))
    maml = learner_of(Algorithm(2, ConstantRate(0.3), outer=SGD(0.1), task_reduction="sum"))
    for _ in range(5):
        batch = CASE.batch()
        alpha.step(batch)
        maml.step(batch)
    for name, p in maml.parameters.items():
        assert torch.equal(p, alpha.parameters[name])
    assert alpha.parameters["inner_lr.all"] == 0.3


def test_sum_and_mean_are_one_method():
    """beta' = B beta, eta_alpha' = B eta_alpha, eta_beta' = B^3 eta_beta."""
    b, batches = 3, [CASE.batch(3) for _ in range(4)]
    of_sum = learner_of(alpha_maml(2, 0.3, 0.01, inner_hyper_lr=0.001, outer_hyper_lr=1e-5))
    of_mean = learner_of(
        alpha_maml(
            2, 0.3, b * 0.01, inner_hyper_lr=b * 0.001, outer_hyper_lr=b**3 * 1e-5,
            task_reduction="mean",
        )
    )  # fmt: skip
    for batch in batches:
        of_sum.step(batch)
        of_mean.step(batch)
    for name, p in of_sum.parameters.items():
        torch.testing.assert_close(p, of_mean.parameters[name], rtol=1e-10, atol=1e-12)
    betas = [x.state_tensors()["optimiser.0.weight.beta"] for x in (of_mean, of_sum)]
    torch.testing.assert_close(betas[0], b * betas[1])
    assert betas[1] != 0.01


def test_sum_and_mean_are_one_method_by_adam_too():
    """beta' = beta, eta_beta' = B eta_beta, as Adam's direction has no scale."""
    b, batches = 3, [CASE.batch(3) for _ in range(4)]
    of_sum, of_mean = (
        learner_of(
            Algorithm(
                2,
                ConstantRate(0.3),
                outer=HypergradientAdam(0.01, factor * 1e-3),
                task_reduction=reduction,
            )
        )
        for reduction, factor in (("sum", 1), ("mean", b))
    )
    for batch in batches:
        of_sum.step(batch)
        of_mean.step(batch)
    betas = [x.state_tensors()["optimiser.0.weight.beta"] for x in (of_mean, of_sum)]
    torch.testing.assert_close(betas[0], betas[1], rtol=1e-5, atol=0)  # but for Adam's epsilon
    assert abs(betas[1] - 0.01) > 1e-3


@pytest.mark.parametrize("exact", [True, False])
def test_no_extra_backward_pass_and_one_copy_of_the_gradient(monkeypatch, exact):
    grad, calls = torch.autograd.grad, []

    def counted(*arguments, **options):
        calls.append(1)
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    counts = []
    fast = alpha_maml(3, 0.3, 0.01)
    fast = replace(fast, rate_update=HypergradientRates(1e-3, exact=exact))
    for algorithm in (Algorithm(3, ConstantRate(0.3), outer=SGD(0.1)), fast):
        learner = learner_of(algorithm)
        calls.clear()
        learner.step(CASE.batch())
        counts.append(len(calls))
        held = sum(t.numel() for t in learner.state_tensors().values())
        counts.append(held)
    parameters = sum(p.numel() for p in net().parameters())
    assert counts[2] == counts[0] == 4
    assert counts[3] - counts[1] == parameters + 4  # alpha, beta, their h


def test_the_state_holds_the_rates():
    one, two = (learner_of(alpha_maml(2, 0.3, 0.01)) for _ in range(2))
    batches = [CASE.batch() for _ in range(4)]
    for batch in batches[:2]:
        one.step(batch)
    two.load_state_tensors(one.state_tensors())
    for batch in batches[2:]:
        one.step(batch)
        two.step(batch)
    state = two.state_tensors()
    assert all(torch.equal(t, state[n]) for n, t in one.state_tensors().items())
    assert state["model.inner_lr.all"] != 0.3


def test_the_rates_are_there_to_be_logged():
    learner, batch = learner_of(alpha_maml(2, 0.3, 0.01)), CASE.batch()
    learner.step(batch)
    gradient = learner.meta_gradient(batch)[0]["inner_lr.all"]
    learner.step(batch)
    rates = learner.hypergradient_rates()
    assert rates["inner_lr"] == learner.parameters["inner_lr.all"]
    assert rates["inner_lr_hypergradient"] == -gradient
    assert rates["outer_lr"] == learner.state_tensors()["optimiser.0.weight.beta"]
    assert rates["outer_lr_hypergradient"] == learner.state_tensors()["optimiser.0.weight.h"]
    assert learner_of(plain()).hypergradient_rates() == {}


def test_of_rates_of_each_step_the_mean_is_logged_and_the_slope_of_all_together():
    algorithm = Algorithm(2, LayerStepRates(0.3), rate_update=HypergradientRates(0.1))
    learner, batch = learner_of(algorithm), CASE.batch()
    gradient = learner.meta_gradient(batch)[0]["inner_lr.0.weight"]
    learner.step(batch)
    logged = learner.hypergradient_rates()
    rates = learner.parameters["inner_lr.0.weight"]
    assert rates[0] != rates[1]
    torch.testing.assert_close(logged["inner_lr.0.weight"], (rates[0] + rates[1]) / 2)
    slope = -(gradient[0] + gradient[1])
    torch.testing.assert_close(logged["inner_lr.0.weight_hypergradient"], slope)


def test_bad_initial_rates_are_mended():
    """From rates a hundred times too small, Alpha MAML gets further than MAML."""
    case = MODELS["mlp"]
    losses = []
    for hyper_lr in (0.0, 0.05):
        torch.manual_seed(0)
        learner = MetaLearner(
            case.build(),
            alpha_maml(
                1, 0.01, 0.01, inner_hyper_lr=hyper_lr, outer_hyper_lr=hyper_lr,
                task_reduction="mean",
            ),
            case.loss,
        )  # fmt: skip
        batch = case.batch(tasks=4)
        for _ in range(200):
            metrics = learner.step(batch)
        losses.append(metrics.loss)
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("guards", "h", "expected"),
    [
        (Guards(), 2.0, 0.7),
        (Guards(upper=0.6), 2.0, 0.6),
        (Guards(lower=0.2), -9.0, 0.2),
        (Guards(clip=0.5), 2.0, 0.55),
        (Guards(clip=0.5), -2.0, 0.45),
        (Guards(step="multiplicative"), 2.0, 0.5 * math.exp(0.1)),
        (Guards(step="sign"), 2.0, 0.5 * math.exp(0.1)),
        (Guards(step="sign"), -9.0, 0.5 * math.exp(-0.1)),
        (Guards(step="sign"), 0.0, 0.5),
        (Guards(lower=0.6, upper=0.6), 2.0, 0.6),
    ],
)
def test_guards(guards, h, expected):
    rate = guards(torch.tensor(0.5), torch.tensor(h), 0.1)
    torch.testing.assert_close(rate, torch.tensor(expected))


def test_multiplicative_updates_are_steps_in_the_logarithm():
    rate, eta = torch.tensor(0.5), 1e-6
    h = torch.tensor(3.0)  # -d loss / d rate, so -d loss / d log rate = rate h
    moved = Guards(step="multiplicative")(rate, h, eta)
    torch.testing.assert_close((moved.log() - rate.log()) / eta, rate * h, rtol=1e-5, atol=0)


def test_auto_finds_rates_from_far_off():
    """From rates a hundred times too small, within a training that MAML++ gets nowhere in."""
    case = MODELS["mlp"]
    losses = []
    for recipe in (maml_plus_plus, auto):
        torch.manual_seed(0)
        learner = MetaLearner(case.build(), recipe(2, 1e-3, 1e-5), case.loss, replay=True)
        batch = case.batch(tasks=4)
        for _ in range(600):
            metrics = learner.step(batch)
        losses.append(metrics.loss)
    assert losses[1] < 0.7 * losses[0]


def test_meta_sgd_starts_as_maml_and_learns_every_element():
    batch = CASE.batch()
    maml = learner_of(Algorithm(2, ConstantRate(0.3)))
    learner = learner_of(meta_sgd(2, 0.3))
    expected = maml.meta_gradient(batch)[0]
    gradient = learner.meta_gradient(batch)[0]
    for name, g in expected.items():
        torch.testing.assert_close(gradient[name], g)
        assert gradient[f"inner_lr.{name}"].shape == g.shape
    rates = learner.parameters["inner_lr.3.bias"]
    for i in range(3):
        torch.testing.assert_close(
            gradient["inner_lr.3.bias"][i], difference(learner, rates[i], batch) / 1.0,
            rtol=1e-6, atol=1e-9,
        )  # fmt: skip


@pytest.mark.parametrize(
    "rate",
    [LearnedRate(0.1), LayerStepRates(0.1), ElementRates(0.1)],
    ids=["one", "by step", "by element"],
)
@pytest.mark.parametrize("order", [1, 2])
def test_rates_of_half_precision_move_by_small_steps(rate, order):
    """0.1 and 0.1001 are the same bfloat16."""
    half = torch.bfloat16
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(half)
    algorithm = Algorithm(2, rate, derivative_order=FixedOrder(order), outer=Adam(1e-4))
    learner = MetaLearner(module, algorithm, F.cross_entropy)
    batch = TaskBatch(*(t.to(half) if t.is_floating_point() else t for t in CASE.batch().tensors()))
    learner.step(batch)
    for name, found in learner.parameters.items():
        assert found.dtype == (torch.float32 if name.startswith("inner_lr.") else half)
        if name.startswith("inner_lr."):
            moved = (found - 0.1).abs()  # by as much, but where there is no gradient
            moved = moved[moved > 1e-8]
            assert len(moved.flatten()) > 0
            torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=0.02, atol=0)
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    assert {p.dtype for p in adapted.parameters()} == {half}


def test_a_rate_of_half_precision_follows_its_hypergradient():
    for exact in (True, False):
        module = nn.Linear(4, 3).bfloat16()
        update = HypergradientRates(1e-4, exact=exact, guards=Guards(step="sign"))
        algorithm = plain(2, rate_update=update, inner_rate=LearnedRate(0.1))
        learner = MetaLearner(module, algorithm, F.cross_entropy)
        x, y, *_ = CASE.batch().tensors()
        learner.step(TaskBatch(x.bfloat16(), y, x.bfloat16(), y))
        assert abs(learner.parameters["inner_lr.all"] / 0.1 - 1).item() == pytest.approx(1e-4, 0.01)


def test_the_outer_rate_of_a_module_of_half_precision_moves_and_is_kept():
    guards = Guards(step="sign")
    outer = HypergradientSGD(0.1, 1e-4, guards)
    x, y, *_ = CASE.batch().tensors()
    batch = TaskBatch(x.bfloat16(), y, x.bfloat16(), y)

    def learner():
        return MetaLearner(nn.Linear(4, 3).bfloat16(), plain(2, outer=outer), F.cross_entropy)

    first, second = learner(), learner()
    for _ in range(3):
        first.step(batch)
    beta = first.hypergradient_rates()["outer_lr"]
    assert beta.dtype == torch.float32
    assert abs(beta / 0.1 - 1).item() == pytest.approx(2e-4, 0.01)
    second.load_state_tensors(first.state_tensors())
    assert second.hypergradient_rates()["outer_lr"].dtype == torch.float32
    for each in (first, second):
        each.step(batch)
    assert torch.equal(
        first.hypergradient_rates()["outer_lr"], second.hypergradient_rates()["outer_lr"]
    )
    assert torch.equal(first.module.weight, second.module.weight)


def test_an_optimiser_s_step_takes_no_closure():
    optimiser = HypergradientSGD(0.1, 0.01)([torch.ones(2, requires_grad=True)])
    with pytest.raises(InputError, match="takes no closure"):
        optimiser.step(lambda: 0.0)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("would both set", lambda: replace(alpha_maml(), outer_schedule=CosineAnnealing(5))),
        ("no rate to update", lambda: replace(alpha_maml(), inner_rate=ConstantRate(0.1))),
        (
            r"no rate to update under StepRates\(inner_lrs=\(0.1,\)\)",
            lambda: replace(alpha_maml(), inner_rate=StepRates((0.1,))),
        ),
        ("do not go together", lambda: replace(alpha_maml(), outer_clipping=ClipByNorm(1.0))),
        (
            "needs LearnedRate, not LayerStepRates",
            lambda: Algorithm(
                1, LayerStepRates(), rate_update=HypergradientRates(0.1, exact=False)
            ),
        ),
        ("hyper_lr=-1", lambda: HypergradientRates(-1)),
        ("hyper_lr=inf", lambda: HypergradientSGD(0.1, float("inf"))),
        ("outer_lr=0", lambda: HypergradientAdam(0, 0.1)),
        (r"lower=2, upper=1\) are", lambda: Guards(2, 1)),
        ("clip=0", lambda: Guards(clip=0)),
        ("step 'additve'", lambda: Guards(step="additve")),
        ("task_reduction 'men'", lambda: replace(alpha_maml(), task_reduction="men")),
    ],
)
def test_bad_input(message, make):
    with pytest.raises(InputError, match=message):
        make()


def test_safe_guards_both_rates():
    safe, plain = alpha_maml(safe=True), alpha_maml()
    assert safe.rate_update.guards == safe.outer.guards == SAFE
    assert plain.rate_update.guards == plain.outer.guards == Guards()
    assert (SAFE.lower, SAFE.upper, SAFE.clip, SAFE.step) == (1e-5, 10.0, 1.0, "multiplicative")


def test_the_metric_of_an_iteration_is_that_after_the_last_step_that_counts():
    algorithm = Algorithm(3, ConstantRate(0.3), query_weights=MultiStepLoss(num_epochs=10))
    learner, batch = learner_of(algorithm), CASE.batch()
    metrics = learner.step(batch)
    evaluated = learner_of(algorithm).evaluate(batch, len(batch.x_support))
    assert float(metrics.metric) == pytest.approx(evaluated.mean)
