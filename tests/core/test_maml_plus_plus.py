"""MAML++ against a plain loop, and each of its parts against what it must and must not change."""

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep import (
    SGD,
    Adam,
    Algorithm,
    ClipByNorm,
    ClipByValue,
    ConstantRate,
    CosineAnnealing,
    DerivativeAnnealing,
    FinalStep,
    FixedOrder,
    InputError,
    LayerStepRates,
    MetaLearner,
    MultiStepLoss,
    NormStatistics,
    PerStepAffine,
    TaskBatch,
    fomaml,
    maml,
    maml_plus_plus,
)
from tests.core.reference import MODELS, WAYS, Case, relative_error

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 3
NORMS = {
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()),
    "BatchNorm2d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ),
    "BatchNorm3d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 2, 2)), nn.Conv3d(1, 6, 1), nn.BatchNorm3d(6), nn.Tanh(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(),
    ),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh()),
    "GroupNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh()),
}  # fmt: skip
every_norm = pytest.mark.parametrize("norm", NORMS)


def net(norm: str = "BatchNorm1d") -> nn.Module:
    """A small net; its norm's scale and shift are not the trivial ones."""
    module = nn.Sequential(*NORMS[norm](), nn.Linear(6, WAYS))
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
        if type(part).__name__ in NORMS:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias)
    return module


def norm_name(module: nn.Module) -> str:
    return next(n for n, m in module.named_modules() if type(m).__name__ in NORMS)


CASE = Case(net, (4,))


def learner_of(algorithm: Algorithm, module: nn.Module | None = None, **options) -> MetaLearner:
    return MetaLearner(module or net(), algorithm, F.cross_entropy, **options)


def twin(learner: MetaLearner, **parts) -> MetaLearner:
    """The same module under another algorithm."""
    algorithm = replace(learner.algorithm, **parts)
    return MetaLearner(learner.module, algorithm, F.cross_entropy)


PLAIN = maml(STEPS, 0.3)


# The whole against a plain loop


def plain_forward(theta: dict[str, Tensor], row: int, x: Tensor) -> Tensor:
    z = F.linear(x, theta["0.weight"], theta["0.bias"])
    z = F.batch_norm(z, None, None, theta["1.weight"][row], theta["1.bias"][row], training=True)
    return F.linear(torch.tanh(z), theta["3.weight"], theta["3.bias"])


@pytest.mark.parametrize("order", [1, 2])
def test_all_parts_against_a_plain_loop(order):
    algorithm = Algorithm(
        STEPS,
        LayerStepRates(0.3),
        MultiStepLoss(10),
        FixedOrder(order),
        norm_affine=PerStepAffine(),
        norm_statistics=NormStatistics(per_step=True),
        iterations_per_epoch=2,
    )
    learner, batch = learner_of(algorithm), CASE.batch()
    learner.iteration = 7  # epoch 3.5
    with torch.no_grad():
        for tensor in learner.parameters.values():
            tensor.add_(torch.rand_like(tensor) / 5)
    actual, _ = learner.meta_gradient(batch)

    phi = {n: p.detach().clone().requires_grad_() for n, p in learner.parameters.items()}
    adapted = ["0.weight", "0.bias", "3.weight", "3.bias"]
    weights = [1 / 3 - 3 / 30, 1 / 3 - 3 / 30, 1 / 3 + 3 * 2 / 30]
    total = torch.zeros(())
    for x_support, y_support, x_query, y_query in zip(*batch.tensors(), strict=True):
        theta = dict(phi)
        for k in range(STEPS):
            loss = F.cross_entropy(plain_forward(theta, k, x_support), y_support)
            inputs = [theta[n] for n in adapted]
            gradients = torch.autograd.grad(loss, inputs, create_graph=True)
            for name, g in zip(adapted, gradients, strict=True):
                rate = phi[f"inner_lr.{name}"][k]
                theta[name] = theta[name] - rate * (g if order == 2 else g.detach())
            query = F.cross_entropy(plain_forward(theta, k, x_query), y_query)
            total = total + weights[k] * query / len(batch)
    expected = torch.autograd.grad(total, list(phi.values()), materialize_grads=True)
    assert relative_error(actual, dict(zip(phi, expected, strict=True))) < 1e-9


# Collapse: parts that are neutral leave MAML


class OneHot:
    def __call__(self, num_steps: int, epoch: float) -> tuple[float, ...]:
        return tuple(float(k == num_steps) for k in range(num_steps + 1))


NEUTRAL = {
    "rates per tensor": {"inner_rate": LayerStepRates(0.3, per="tensor")},
    "rates per layer": {"inner_rate": LayerStepRates(0.3, per="layer")},
    "one-hot weights": {"query_weights": OneHot()},
    "multi-step loss after its epochs": {"query_weights": MultiStepLoss(1)},
    "derivative annealing after its epochs": {"derivative_order": DerivativeAnnealing(1)},
    "rows of statistics that are not used": {"norm_statistics": NormStatistics(per_step=True)},
    "clipping beyond reach": {
        "outer_clipping": ClipByValue(1e9),
        "inner_clipping": ClipByNorm(1e9),
    },
}
NEUTRAL["all of these"] = {slot: part for parts in NEUTRAL.values() for slot, part in parts.items()}


@every_norm
@pytest.mark.parametrize("parts", NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_parts_leave_maml(norm, parts):
    plain, batch = learner_of(PLAIN, net(norm)), CASE.batch()
    other = twin(plain, iterations_per_epoch=1, **parts)
    other.iteration = 1
    gradient, metrics = other.meta_gradient(batch)
    expected, expected_metrics = plain.meta_gradient(batch)
    own = {n: g for n, g in gradient.items() if not n.startswith("inner_lr.")}
    assert relative_error(own, expected) < 1e-12
    torch.testing.assert_close(metrics.task_loss, expected_metrics.task_loss)


@every_norm
def test_rows_of_equal_affine_share_the_gradient_of_one(norm):
    """Equal rows act as one scale and shift; their gradients add up to its gradient."""
    module, batch = net(norm), CASE.batch()
    for algorithm in (PLAIN, replace(PLAIN, query_weights=MultiStepLoss())):
        adapted = replace(algorithm.adapted, exclude=(f"{norm_name(module)}.*",))
        shared = MetaLearner(module, replace(algorithm, adapted=adapted), F.cross_entropy)
        rows = MetaLearner(module, replace(algorithm, norm_affine=PerStepAffine()), F.cross_entropy)
        gradient = dict(rows.meta_gradient(batch)[0])
        for name in (f"{norm_name(module)}.weight", f"{norm_name(module)}.bias"):
            assert gradient[name].shape == (STEPS, *module.get_parameter(name).shape)
            gradient[name] = gradient[name].sum(0)
        assert relative_error(gradient, shared.meta_gradient(batch)[0]) < 1e-12


def test_the_steps_of_one_loop_can_be_told_apart():
    """Neutrality above is no accident: parts that are not neutral change the gradient."""
    plain, batch = learner_of(PLAIN), CASE.batch()
    expected, _ = plain.meta_gradient(batch)
    for parts in (
        {"query_weights": MultiStepLoss()},
        {"derivative_order": DerivativeAnnealing(1)},
        {"norm_statistics": NormStatistics("support")},
        {"norm_statistics": NormStatistics("running")},
    ):
        assert relative_error(twin(plain, **parts).meta_gradient(batch)[0], expected) > 1e-3


# Step k touches row k


def curve(learner: MetaLearner, batch: TaskBatch) -> Tensor:
    return learner.evaluate(batch, len(batch)).loss.mean(0)


@pytest.mark.parametrize("row", range(STEPS))
@pytest.mark.parametrize("name", ["inner_lr.0.weight", "inner_lr.3.bias", "1.weight", "1.bias"])
def test_a_row_changes_its_step_and_those_after(row, name):
    algorithm = replace(PLAIN, inner_rate=LayerStepRates(0.3), norm_affine=PerStepAffine())
    learner, batch = learner_of(algorithm), CASE.batch()
    before = curve(learner, batch)
    with torch.no_grad():
        learner.parameters[name][row] += 0.1
    changed = (curve(learner, batch) - before).abs() > 1e-9
    # The query set before any step is seen through the first row of the affine parameters.
    from_start = row == 0 and name.startswith("1.")
    assert changed.tolist() == [from_start, *[k >= row for k in range(STEPS)]]


def test_adapted_rows_change_at_their_own_step_alone():
    algorithm = replace(PLAIN, norm_affine=PerStepAffine(adapted=True))
    learner, batch = learner_of(algorithm), CASE.batch()
    before = learner.parameters["1.weight"].detach().clone()
    points = list(learner._loop.trajectory(batch, STEPS, derivative_order=1))
    for k, (at, after) in enumerate(itertools.pairwise(points)):
        moved = (after.theta["1.weight"] != at.theta["1.weight"]).flatten(2).any(2).any(0)
        assert moved.tolist() == [row == k for row in range(STEPS)]
    assert torch.equal(before, learner.parameters["1.weight"])


@pytest.mark.parametrize("per", ["tensor", "layer"])
def test_learned_rates_against_finite_differences(per):
    algorithm = replace(PLAIN, inner_rate=LayerStepRates(0.3, per))
    learner, batch = learner_of(algorithm), CASE.batch()
    gradient, _ = learner.meta_gradient(batch)
    names = [n for n in learner.parameters if n.startswith("inner_lr.")]
    assert len(names) == {"tensor": 6, "layer": 3}[per]
    for name in names:
        for k in range(STEPS):
            losses = []
            for shift in (1e-5, -2e-5):
                with torch.no_grad():
                    learner.parameters[name][k] += shift
                losses.append(learner.meta_gradient(batch)[1].loss)
            with torch.no_grad():
                learner.parameters[name][k] += 1e-5
            difference = (losses[0] - losses[1]) / 2e-5
            torch.testing.assert_close(gradient[name][k], difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("per", ["tensor", "layer"])
@pytest.mark.parametrize("head_lr", [None, 0.0, 7.0])
def test_the_initial_rates_are_honoured(per, head_lr):
    learner = learner_of(replace(PLAIN, inner_rate=LayerStepRates(0.07, per, head_lr)))
    *_, head = (name.rpartition(".")[0] for name, _ in learner.module.named_parameters())
    rates = {n: t for n, t in learner.parameters.items() if n.startswith("inner_lr.")}
    of_head = {name for name in rates if name.startswith(f"inner_lr.{head}")}
    assert len(of_head) == {"tensor": 2, "layer": 1}[per]
    for name, found in rates.items():
        initial = head_lr if name in of_head and head_lr is not None else 0.07
        assert torch.equal(found, torch.full((STEPS,), initial)), name


@pytest.mark.parametrize("per", ["tensor", "layer"])
def test_a_head_with_a_weight_norm_is_one_layer(per):
    head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    algorithm = replace(PLAIN, inner_rate=LayerStepRates(0.07, per, 7.0))
    learner = MetaLearner(nn.Sequential(nn.Linear(4, 6), head), algorithm, F.cross_entropy)
    rates = {n: t[0].item() for n, t in learner.parameters.items() if n.startswith("inner_lr.1")}
    assert len(rates) == {"tensor": 3, "layer": 1}[per]
    assert set(rates.values()) == {7.0}


# Schedules


def test_weights_of_the_published_example():
    weights = MultiStepLoss(10)
    assert weights(5, 0) == pytest.approx((0, 0.2, 0.2, 0.2, 0.2, 0.2))
    assert weights(5, 9.9) == pytest.approx((0, 0.02, 0.02, 0.02, 0.02, 0.92))
    assert weights(5, 10) == (0, 0, 0, 0, 0, 1)


def test_weights_are_not_rounded_with_the_parameters():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(WAYS, dtype=torch.bfloat16))
            self.head = nn.Linear(4, WAYS, dtype=torch.float32)

        def forward(self, x):
            return self.head(x.float()) + self.shift.float()

    learner = learner_of(
        replace(maml(5, 0.1), query_weights=MultiStepLoss(10), iterations_per_epoch=1), Mixed()
    )
    learner.iteration = 9
    _, metrics = learner.meta_gradient(CASE.batch())
    v = torch.tensor(MultiStepLoss(10)(5, 9)[1:], dtype=torch.float32)
    assert next(iter(learner.parameters.values())).dtype == torch.bfloat16
    torch.testing.assert_close(metrics.task_loss, metrics.query_loss @ v, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("floor", [0.0, 0.03, 0.5, 1.0])
def test_weights_are_shares(num_steps, floor):
    part = MultiStepLoss(40, floor)
    for epoch in range(45):
        v = part(num_steps, epoch)
        assert len(v) == num_steps + 1
        assert min(v) >= 0
        assert sum(v) == pytest.approx(1, abs=1e-12)
        assert epoch >= 40 or num_steps < 2 or min(v[1:]) >= floor / num_steps - 1e-12


def test_derivative_annealing_is_fomaml_first_and_maml_then():
    annealed = replace(PLAIN, derivative_order=DerivativeAnnealing(2), iterations_per_epoch=3)
    learner, batch = learner_of(annealed), CASE.batch()
    first = twin(learner, derivative_order=fomaml().derivative_order).meta_gradient(batch)[0]
    second = twin(learner, derivative_order=FixedOrder(2)).meta_gradient(batch)[0]
    for iteration, expected in ((0, first), (5, first), (6, second), (7, second)):
        learner.iteration = iteration
        assert relative_error(learner.meta_gradient(batch)[0], expected) == 0
    assert relative_error(first, second) > 1e-3


def test_rates_learn_in_the_first_order_phase():
    """With one step no second derivative enters d L_query / d alpha = -s . q."""
    algorithm = replace(maml(1, 0.3), inner_rate=LayerStepRates(0.3))
    second, batch = learner_of(algorithm), CASE.batch()
    first = twin(second, derivative_order=DerivativeAnnealing(1))
    actual, expected = first.meta_gradient(batch)[0], second.meta_gradient(batch)[0]
    rates = [n for n in actual if n.startswith("inner_lr.")]
    assert relative_error({n: actual[n] for n in rates}, {n: expected[n] for n in rates}) < 1e-12
    assert all(actual[n].abs().min() > 0 for n in rates)


def test_epochs_pass_with_the_steps():
    algorithm = replace(
        PLAIN, outer=SGD(1.0), outer_schedule=CosineAnnealing(2, final=0.1), iterations_per_epoch=2
    )
    learner, batch = learner_of(algorithm), CASE.batch()
    factors = [1, 0.1 + 0.9 * (1 + 2**-0.5) / 2, 0.55, 0.1 + 0.9 * (1 - 2**-0.5) / 2, 0.1, 0.1]
    for iteration, factor in enumerate(factors):
        assert learner.epoch == iteration / 2
        before = learner.parameters["0.weight"].detach().clone()
        gradient = learner.meta_gradient(batch)[0]["0.weight"]
        learner.step(batch)
        torch.testing.assert_close(learner.parameters["0.weight"], before - factor * gradient)
    other = learner_of(algorithm)
    other.load_state_tensors(learner.state_tensors())
    assert other.epoch == 3


def test_a_cosine_ends_at_nothing_if_nothing_else_is_said():
    assert [CosineAnnealing(2)(epoch) for epoch in (0, 1, 2, 3)] == pytest.approx([1, 0.5, 0, 0])


class Scaled(nn.Module):
    """A layer with a parameter of its own and another layer within."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(self.scale * x)


def test_a_layer_whose_name_begins_another_s_keeps_its_own_moments():
    """`inner_lr.block` and `inner_lr.block.inner`."""
    algorithm = replace(PLAIN, inner_rate=LayerStepRates(0.3, per="layer"), outer=Adam(0.1))
    module = nn.Sequential()
    module.add_module("block", Scaled())
    straight, batch = MetaLearner(module, algorithm, F.cross_entropy), MODELS["mlp"].batch()
    resumed = MetaLearner(deepcopy(module), algorithm, F.cross_entropy)
    for _ in range(2):
        resumed.step(batch)
        resumed.load_state_tensors(resumed.state_tensors())
        straight.step(batch)
    found, expected = resumed.state_tensors(), straight.state_tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_clipping_leaves_the_rates_alone():
    limit = 1e-3
    algorithm = replace(
        PLAIN, inner_rate=LayerStepRates(0.3), outer=SGD(1.0), outer_clipping=ClipByValue(limit)
    )
    learner, batch = learner_of(algorithm), CASE.batch()
    gradient, _ = learner.meta_gradient(batch)
    before = {n: p.detach().clone() for n, p in learner.parameters.items()}
    learner.step(batch)
    for name, p in learner.parameters.items():
        expected = gradient[name]
        if not name.startswith("inner_lr."):
            expected = expected.clamp(-limit, limit)
        torch.testing.assert_close(before[name] - p, expected)
    assert max(g.abs().max() for g in gradient.values()) > limit


# Normalisation statistics


def outputs(learner: MetaLearner, batch: TaskBatch, use: str) -> Tensor:
    return learner.predict(batch, len(batch), statistics=use)


def queries_of(batch: TaskBatch, which: slice) -> TaskBatch:
    return TaskBatch(
        batch.x_support, batch.y_support, batch.x_query[:, which], batch.y_query[:, which]
    )


@pytest.mark.parametrize("case", ["batch norm", "Conv4", "fully connected"])
@pytest.mark.parametrize("use", ["batch", "support", "running"])
def test_who_sees_whom(case, use):
    """Tasks never see each other; query examples see each other only by batch statistics."""
    learner = MetaLearner(MODELS[case].build(), maml(2, 0.3), F.cross_entropy)
    batch = MODELS[case].batch(tasks=4)
    whole = outputs(learner, batch, use)
    order = [2, 0, 3, 1]
    permuted = TaskBatch(*(t[order] for t in batch.tensors()))
    torch.testing.assert_close(outputs(learner, permuted, use), whole[order])
    alone = torch.cat([outputs(learner, task, use) for task in batch.split(1)])
    torch.testing.assert_close(alone, whole)
    few = outputs(learner, queries_of(batch, slice(2)), use)
    sees_each_other = not torch.allclose(few, whole[:, :, :2], atol=1e-9)
    assert sees_each_other == (use == "batch")


def test_support_statistics_against_a_plain_pass():
    module = net()
    learner = learner_of(maml(1, 0.3), module)
    task = CASE.batch(tasks=1)
    x, y = task.x_support[0], task.y_support[0]
    theta = dict(module.named_parameters())

    def forward(theta, x, reference):
        z, r = (F.linear(t, theta["0.weight"], theta["0.bias"]) for t in (x, reference))
        z = (z - r.mean(0)) / (r.var(0, correction=0) + 1e-5).sqrt()
        z = torch.tanh(z * theta["1.weight"] + theta["1.bias"])
        return F.linear(z, theta["3.weight"], theta["3.bias"])

    loss = F.cross_entropy(forward(theta, x, x), y)
    gradient = torch.autograd.grad(loss, list(theta.values()))
    theta = {n: p - 0.3 * g for (n, p), g in zip(theta.items(), gradient, strict=True)}
    expected = forward(theta, task.x_query[0], x)
    torch.testing.assert_close(outputs(learner, task, "support")[0, 1], expected)
    support = twin(learner, norm_statistics=NormStatistics("support"))
    torch.testing.assert_close(support.adapt(x, y)(task.x_query[0]), expected)


def test_running_statistics_are_those_of_evaluation_mode():
    module, task = net(), CASE.batch(tasks=1)
    learner = learner_of(replace(PLAIN, norm_statistics=NormStatistics("running")), module)
    before = {n: b.clone() for n, b in module.named_buffers()}
    actual = learner.predict(task, 1)[0, 0]
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    module.eval()
    torch.testing.assert_close(actual, module(task.x_query[0]))
    adapted = learner.adapt(task.x_support[0], task.y_support[0])
    assert not adapted.training
    torch.testing.assert_close(adapted(task.x_query[0]), learner.predict(task, 1)[0, -1])


@pytest.mark.parametrize("case", ["batch norm", "Conv4"])
@pytest.mark.parametrize("use", ["support", "running"])
def test_an_adapted_module_gives_what_was_predicted(case, use):
    algorithm = replace(maml(2, 0.3), norm_statistics=NormStatistics(use))
    learner = MetaLearner(MODELS[case].build(), algorithm, F.cross_entropy)
    task = MODELS[case].batch(tasks=1)
    adapted = learner.adapt(task.x_support[0], task.y_support[0])
    expected = outputs(learner, task, use)[0, -1]
    torch.testing.assert_close(adapted(task.x_query[0]), expected)


@pytest.mark.parametrize("per_step", [False, True])
def test_training_uses_the_running_statistics_of_before(per_step):
    """The batch at hand enters the averages, but not its own normalisation."""
    module, batch = net(), CASE.batch()
    statistics = NormStatistics("running", per_step)
    learner = learner_of(Algorithm(0, ConstantRate(0.3), norm_statistics=statistics), module)
    losses = learner.meta_gradient(batch)[1].task_loss
    module.eval()
    expected = [
        F.cross_entropy(module(x), y) for x, y in zip(batch.x_query, batch.y_query, strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(expected).detach())


def test_an_example_alone_has_a_mean_and_no_variance():
    module, batch = net(), queries_of(CASE.batch(), slice(1))
    before, z = module[1].running_var.clone(), module[0](batch.x_query[:, 0]).detach()
    mean = 0.9 * module[1].running_mean + 0.1 * z.mean(0)
    algorithm = Algorithm(0, ConstantRate(0.3), norm_statistics=NormStatistics("running"))
    learner_of(algorithm, module).step(batch)
    torch.testing.assert_close(module[1].running_mean, mean)
    torch.testing.assert_close(module[1].running_var, 0.9 * before)


@pytest.mark.parametrize("use", ["batch", "support"])
def test_running_statistics_are_collected_for_each_point(use):
    """Row 0 sees the support set under theta[0], the last row the query set under theta[K].

    Or the support set again, where the query set is normalised by its statistics.
    """
    module, batch = net(), CASE.batch()
    per_step = NormStatistics(use, per_step=True)
    algorithm = replace(maml(1, 0.3), norm_statistics=per_step, outer=SGD(1e-9))
    learner = learner_of(algorithm, module)
    assert learner.buffers["1.running_mean"].shape == (2, 6)
    means, variances = [], []
    last = {"batch": batch.x_query, "support": batch.x_support}[use]
    for j in range(len(batch)):
        theta = {n: p.detach() for n, p in module.named_parameters()}
        adapted = learner.adapt(batch.x_support[j], batch.y_support[j])
        means.append(
            (
                F.linear(batch.x_support[j], theta["0.weight"], theta["0.bias"]).mean(0),
                F.linear(last[j], adapted[0].weight, adapted[0].bias).mean(0),
            )
        )
        variances.append(F.linear(last[j], adapted[0].weight, adapted[0].bias).var(0))
    mean = torch.stack([torch.stack(pair) for pair in means]).mean(0)
    expected = 0.9 * module[1].running_mean + 0.1 * mean
    last_variance = 0.9 * module[1].running_var + 0.1 * torch.stack(variances).mean(0)
    learner.step(batch)
    torch.testing.assert_close(learner.buffers["1.running_mean"], expected)
    torch.testing.assert_close(learner.buffers["1.running_var"][-1], last_variance)


@pytest.mark.parametrize("use", ["batch", "support", "running"])
@pytest.mark.parametrize("weights", [FinalStep(), MultiStepLoss()])
@pytest.mark.parametrize("segment", [None, 1])
def test_statistics_of_every_point_are_collected(use, weights, segment):
    algorithm = replace(
        PLAIN, norm_statistics=NormStatistics(use, per_step=True), query_weights=weights
    )
    module, batch = MODELS["Conv4"].build(), MODELS["Conv4"].batch()
    learner = MetaLearner(module, algorithm, F.cross_entropy, checkpoint_every=segment)
    rows = {n: b.clone() for n, b in learner.buffers.items() if "num" not in n}
    learner.step(batch)
    for name, before in rows.items():
        moved = (learner.buffers[name] != before).any(1)
        assert moved.tolist() == [True] * (STEPS + 1), name


def test_support_statistics_need_no_running_ones():
    module, batch = net(), CASE.batch()
    module[1] = nn.BatchNorm1d(6, track_running_stats=False)
    algorithm = replace(PLAIN, norm_statistics=NormStatistics("support"))
    metrics = MetaLearner(module, algorithm, F.cross_entropy).step(batch)
    assert metrics.loss.isfinite()


def test_what_is_printed():
    learner, batch = learner_of(maml_plus_plus(2), net()), CASE.batch()
    assert "running averages of each step" in str(learner.evaluate(batch, 3))
    assert "support set" in str(learner.evaluate(batch, 3, statistics="support"))
    assert "batch (transductive)" in str(learner.evaluate(batch, 3, statistics="batch"))
    assert "none (no batch norm)" in str(learner_of(PLAIN, net("LayerNorm")).evaluate(batch, 3))


# More steps than trained


PER_STEP = {
    "LayerStepRates": {"inner_rate": LayerStepRates(0.3)},
    "PerStepAffine": {"norm_affine": PerStepAffine()},
    "NormStatistics": {"norm_statistics": NormStatistics("running", per_step=True)},
}


@pytest.mark.parametrize("name", PER_STEP)
def test_more_steps_than_trained(name):
    algorithm, batch = replace(PLAIN, **PER_STEP[name]), CASE.batch()
    with pytest.raises(InputError, match=f"num_steps=4 is more than the 3 that {name} learned"):
        learner_of(algorithm).evaluate(batch, 3, num_steps=4)
    learner = learner_of(replace(algorithm, extra_steps="repeat"))
    assert torch.equal(
        learner.evaluate(batch, 3, num_steps=6).loss[:, : STEPS + 1],
        learner.evaluate(batch, 3).loss,
    )


@pytest.mark.parametrize("name", PER_STEP)
def test_what_is_repeated_is_the_last_row(name):
    """The losses are those of a learner of more steps that has the last row again and again."""
    algorithm, batch, module = replace(PLAIN, **PER_STEP[name]), CASE.batch(), net()
    few = learner_of(replace(algorithm, extra_steps="repeat"), module)
    many = learner_of(replace(algorithm, num_steps=7), module)
    there = few.parameters | few.buffers
    with torch.no_grad():
        for key, rows in (many.parameters | many.buffers).items():
            if rows.is_floating_point() and rows.shape != there[key].shape:
                there[key].mul_(1 + torch.rand(len(there[key])).view(-1, *[1] * (rows.ndim - 1)))
                rows.copy_(there[key][torch.arange(len(rows)).clamp(max=len(there[key]) - 1)])
    torch.testing.assert_close(
        few.evaluate(batch, 3, num_steps=7).loss, many.evaluate(batch, 3).loss
    )


# State, recipes


def test_the_state_holds_every_part():
    batch, other_batch = CASE.batch(), CASE.batch()
    one, two = (learner_of(maml_plus_plus(2, iterations_per_epoch=1)) for _ in range(2))
    one.step(batch)
    two.load_state_tensors(one.state_tensors())
    one.step(other_batch)
    two.step(other_batch)
    state = two.state_tensors()
    assert state.keys() == one.state_tensors().keys()
    assert all(torch.equal(t, state[n]) for n, t in one.state_tensors().items())


@pytest.mark.parametrize(("num_steps", "row"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_the_adapted_module_has_the_row_of_its_last_step(num_steps, row):
    learner = learner_of(replace(PLAIN, norm_affine=PerStepAffine()))
    with torch.no_grad():
        learner.parameters["1.bias"].add_(torch.arange(STEPS)[:, None])
    task = CASE.batch(tasks=1)
    module = learner.adapt(task.x_support[0], task.y_support[0], num_steps=num_steps)
    assert torch.equal(module[1].bias, learner.parameters["1.bias"][row])
    predicted = learner.predict(task, 1, num_steps=num_steps)[0, -1]
    torch.testing.assert_close(module(task.x_query[0]), predicted)


def test_the_recipe_learns():
    case = MODELS["mlp"]
    batch = case.batch(tasks=8)
    learner = MetaLearner(
        nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, WAYS)),
        maml_plus_plus(3, 0.1, 1e-2, num_epochs=10, iterations_per_epoch=10),
        F.cross_entropy,
    )
    first = learner.step(batch).loss
    for _ in range(99):
        last = learner.step(batch).loss
    assert last < 0.5 * first


def test_parameters_loaded_after_their_rows_were_made_are_refused():
    """The rows would go on from what was there before, the other layers from what was loaded."""
    module, case = net("LayerNorm"), MODELS["mlp"]
    learner = MetaLearner(module, maml_plus_plus(STEPS, 0.1), case.loss)
    loaded = {name: t + 1 for name, t in module.state_dict().items()}
    learner.load_state_tensors(learner.state_tensors())  # the learner's own way changes no copy
    learner.step(case.batch())
    module.load_state_dict(loaded)
    with pytest.raises(InputError, match=r"`1\.weight` was changed after the learner was made"):
        learner.step(case.batch())
    MetaLearner(module, maml_plus_plus(STEPS, 0.1), case.loss).step(case.batch())
