"""Steps that remember, or learn, against plain loops and PyTorch's own optimisers."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fewstep
from fewstep import (
    AdamStep,
    GradientStep,
    HypergradientRates,
    InnerStep,
    InputError,
    LayerStepRates,
    LearnedRate,
    MetaLearner,
    MomentumStep,
    MultiStepLoss,
    TaskBatch,
)
from tests.core.reference import MODELS, ROUTES, relative_error

pytestmark = pytest.mark.usefixtures("float64")

STEPS, RATE = 4, 0.05


class Proximal(InnerStep):
    """Gradient descent on the support loss + |theta - theta[0]|^2, as iMAML's inner problem."""

    def start(self, theta):
        return dict(theta)

    def __call__(self, theta, gradient, alpha, state, table, step):
        after = {n: p - alpha[n] * (gradient[n] + 2 * (p - state[n])) for n, p in theta.items()}
        return after, state


class Generated(InnerStep):
    """Factors of gradient and parameters from their means, by a learned layer, as ALFA's."""

    def table(self, adapted, num_steps):
        size = 2 * len(adapted)
        generator = torch.Generator().manual_seed(3)
        return {
            "weight": torch.randn(size, size, generator=generator) / 10,
            "bias": torch.cat([torch.ones(len(adapted)), torch.full((len(adapted),), RATE)]),
        }

    def __call__(self, theta, gradient, alpha, state, table, step):
        means = [t.flatten(1).mean(1) for of in (theta, gradient) for t in of.values()]
        factors = F.linear(torch.stack(means, 1), table["weight"], table["bias"])
        keep, rate = factors.chunk(2, dim=1)
        after = {
            n: _each(keep[:, i], p) * p - _each(rate[:, i], p) * gradient[n]
            for i, (n, p) in enumerate(theta.items())
        }
        return after, {"last": factors, "count": torch.tensor([step])}


class Chained(InnerStep):
    """Gradient descent, and a share of the mean of where the parameter before went."""

    def __call__(self, theta, gradient, alpha, state, table, step):
        after, last = {}, torch.zeros(())
        for n, p in theta.items():
            after[n] = p - alpha[n] * gradient[n] + _each(last, p)
            last = 0.3 * after[n].flatten(1).mean(1)
        return after, {}


def _each(of_tasks, like):
    return of_tasks.view(-1, *[1] * (like.ndim - 1))


@dataclass
class Plainly:
    """The same steps of one task, written on lists."""

    kind: str
    table: dict

    def __call__(self, theta, gradient, k):
        if k == 0:
            self.first, self.m = theta, [torch.zeros_like(g) for g in gradient]
            self.v = [torch.zeros_like(g) for g in gradient]
        if self.kind == "momentum":
            self.m = [0.9 * m + g for m, g in zip(self.m, gradient, strict=True)]
            return [p - RATE * m for p, m in zip(theta, self.m, strict=True)]
        if self.kind == "adam":
            self.m = [0.5 * m + 0.5 * g for m, g in zip(self.m, gradient, strict=True)]
            self.v = [0.9 * v + 0.1 * g**2 for v, g in zip(self.v, gradient, strict=True)]
            roots = [(v / (1 - 0.9 ** (k + 1))).sqrt() + 0.01 for v in self.v]
            moves = [m / (1 - 0.5 ** (k + 1)) / r for m, r in zip(self.m, roots, strict=True)]
            return [p - RATE * move for p, move in zip(theta, moves, strict=True)]
        if self.kind == "proximal":
            zipped = zip(theta, gradient, self.first, strict=True)
            return [p - RATE * (g + 2 * (p - first)) for p, g, first in zipped]
        if self.kind == "chained":
            after, last = [], 0.0
            for p, g in zip(theta, gradient, strict=True):
                after.append(p - RATE * g + last)
                last = 0.3 * after[-1].mean()
            return [p.clone() for p in after]  # each is differentiated by as it is
        means = torch.stack([t.mean() for t in (*theta, *gradient)])
        factors = self.table["weight"] @ means + self.table["bias"]
        half = len(theta)
        zipped = zip(factors[:half], factors[half:], theta, gradient, strict=True)
        return [keep * p - rate * g for keep, rate, p, g in zipped]


KINDS = {
    "momentum": MomentumStep(0.9),
    "adam": AdamStep((0.5, 0.9), eps=0.01),
    "proximal": Proximal(),
    "generated": Generated(),
    "chained": Chained(),
}


def plain_gradient(module, case, batch, kind, order, weights):
    phi = dict(module.named_parameters())
    part = KINDS[kind]
    table = {n: t.requires_grad_() for n, t in part.table(phi, STEPS).items()}
    losses = []
    for x, y, x_query, y_query in zip(*batch.tensors(), strict=True):
        step, theta = Plainly(kind, table), dict(phi)
        for k in range(STEPS + 1):
            query = case.loss(functional_call(module, theta, (x_query,)), y_query)
            losses.append(weights[k] * query)
            if k < STEPS:
                loss = case.loss(functional_call(module, theta, (x,)), y)
                gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
                if order == 1:
                    gradient = [g.detach() for g in gradient]
                after = step(list(theta.values()), gradient, k)
                theta = dict(zip(theta, after, strict=True))
    leaves = phi | {f"inner_step.{n}": t for n, t in table.items()}
    total = torch.stack(losses).sum() / len(batch)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_that_of_a_plain_loop(kind, route):
    case = MODELS["layer norm"]
    module, batch = case.build(), case.batch()
    algorithm = replace(
        fewstep.maml(STEPS, RATE), inner_step=KINDS[kind], query_weights=MultiStepLoss(10)
    )
    learner = MetaLearner(module, algorithm, case.loss, **route)
    for _ in range(3):  # a replay is recorded, played, and played again
        gradient, _ = learner.meta_gradient(batch)
    weights = algorithm.weights_at(0.0)
    expected = plain_gradient(module, case, batch, kind, 2, weights)
    assert relative_error(gradient, expected) < 1e-12


@pytest.mark.parametrize("route", [{}, {"checkpoint_every": 1}], ids=["at once", "a step's graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_order_takes_gradients_as_constants_and_nothing_else(kind, route):
    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    algorithm = replace(
        fewstep.fomaml(STEPS, RATE), inner_step=KINDS[kind], query_weights=MultiStepLoss(10)
    )
    gradient, _ = MetaLearner(module, algorithm, case.loss, **route).meta_gradient(batch)
    weights = algorithm.weights_at(0.0)
    expected = plain_gradient(module, case, batch, kind, 1, weights)
    assert relative_error(gradient, expected) < 1e-12


OPTIMISERS = {
    "gradient": (GradientStep(), lambda p: torch.optim.SGD(p, RATE)),
    "momentum": (MomentumStep(0.7), lambda p: torch.optim.SGD(p, RATE, momentum=0.7)),
    "adam": (AdamStep(), lambda p: torch.optim.Adam(p, RATE)),
    "reptile's": (AdamStep((0.0, 0.99)), lambda p: torch.optim.Adam(p, RATE, (0.0, 0.99))),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("model", ["mlp", "GRU cell", "sinusoid MLP"])
def test_tasks_end_where_pytorch_s_optimiser_ends(name, model):
    case = MODELS[model]
    module, batch = case.build(), case.batch()
    part, optimiser_of = OPTIMISERS[name]
    learner = MetaLearner(module, replace(fewstep.maml(5, RATE), inner_step=part), case.loss)
    for x, y in zip(batch.x_support, batch.y_support, strict=True):
        theirs = copy.deepcopy(module)
        optimiser = optimiser_of(theirs.parameters())
        for _ in range(5):
            optimiser.zero_grad()
            case.loss(theirs(x), y).backward()
            optimiser.step()
        ours = learner.adapt(x, y)
        for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


def test_momentum_of_nothing_is_gradient_descent():
    case = MODELS["batch norm"]
    module, batch = case.build(), case.batch()
    found = [
        MetaLearner(
            module, replace(fewstep.maml(3, 0.2), inner_step=part), case.loss
        ).meta_gradient(batch)[0]
        for part in (GradientStep(), MomentumStep(0.0))
    ]
    assert relative_error(*found) < 1e-14


def test_rates_of_each_step_go_with_momentum():
    """d L / d alpha[k] by finite differences, and m[k] is what alpha[k] counts for."""
    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    algorithm = replace(
        fewstep.maml(3), inner_rate=LayerStepRates(0.3), inner_step=MomentumStep(0.8)
    )
    learner = MetaLearner(module, algorithm, case.loss)
    gradient, _ = learner.meta_gradient(batch)
    rates = learner.parameters["inner_lr.0.weight"]
    for k in range(3):
        losses = []
        for change in (1e-5, -2e-5, 1e-5):  # the last puts it back
            with torch.no_grad():
                rates[k] += change
            losses.append(learner.meta_gradient(batch)[1].loss)
        slope = (losses[0] - losses[1]) / 2e-5
        torch.testing.assert_close(gradient["inner_lr.0.weight"][k], slope, rtol=1e-6, atol=1e-9)


def test_adam_has_a_derivative_where_units_are_dead():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        module[0].bias[0] = -100.0  # the first unit never fires: its gradients are 0
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 1)
    algorithm = replace(fewstep.maml(2, 0.01), inner_step=AdamStep())
    gradient, _ = MetaLearner(module, algorithm, F.mse_loss).meta_gradient(TaskBatch(x, y, x, y))
    assert all(g.isfinite().all() for g in gradient.values())
    assert gradient["0.weight"][0].eq(0).all()
    assert gradient["0.weight"][1:].abs().sum() > 0


def test_what_a_step_learns_is_learned_kept_and_put_back():
    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    algorithm = replace(fewstep.maml(2, RATE), inner_step=Generated())
    learner = MetaLearner(module, algorithm, case.loss)
    before = learner.state_tensors()
    first = learner.step(batch).loss
    weight = learner.parameters["inner_step.weight"]
    assert not torch.equal(weight, before["model.inner_step.weight"])
    for _ in range(30):
        last = learner.step(batch).loss
    assert last < first
    learner.load_state_tensors(before)
    assert torch.equal(weight, before["model.inner_step.weight"])
    assert learner.step(batch).loss == first
    assert learner.evaluate(batch, 3).mean == learner.evaluate(batch, 3).mean


def test_a_hypergradient_updates_the_rate_and_the_outer_optimiser_the_step_s_table():
    class Scaled(InnerStep):
        def table(self, adapted, num_steps):
            return {"scale": torch.ones(())}

        def __call__(self, theta, gradient, alpha, state, table, step):
            after = {n: p - alpha[n] * table["scale"] * gradient[n] for n, p in theta.items()}
            return after, {}

    case = MODELS["mlp"]
    algorithm = replace(
        fewstep.maml(2),
        inner_rate=LearnedRate(0.3),
        inner_step=Scaled(),
        rate_update=HypergradientRates(0.1),
        outer=fewstep.SGD(0.5),
    )
    learner = MetaLearner(case.build(), algorithm, case.loss)
    batch = case.batch()
    gradient, _ = learner.meta_gradient(batch)
    # The step goes by the product of both, which begins at 0.3 * 1.
    torch.testing.assert_close(gradient["inner_step.scale"], 0.3 * gradient["inner_lr.all"])
    learner.step(batch)
    rate, scale = (learner.parameters[n].detach() for n in ("inner_lr.all", "inner_step.scale"))
    torch.testing.assert_close(rate, 0.3 - 0.1 * gradient["inner_lr.all"])
    torch.testing.assert_close(scale, 1 - 0.5 * gradient["inner_step.scale"])


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_training_is_training(kind):
    case = MODELS["mlp"]
    module, batches = case.build(), [case.batch() for _ in range(4)]
    algorithm = replace(fewstep.maml(2, RATE), inner_step=KINDS[kind], outer=fewstep.SGD(0.3))
    ends = []
    for replay in (False, True):
        learner = MetaLearner(copy.deepcopy(module), algorithm, case.loss, replay=replay)
        for batch in batches:
            learner.step(batch)
        ends.append(learner.state_tensors() | {"test": learner.evaluate(batch, 3).loss})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


@pytest.mark.parametrize("kind", ["momentum", "adam", "proximal"])
def test_a_module_of_bfloat16_stays_one(kind):
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    x, y = torch.randn(2, 6, 4, dtype=torch.bfloat16), torch.randint(3, (2, 6))
    algorithm = replace(
        fewstep.maml(2), inner_step=KINDS[kind], inner_rate=fewstep.ElementRates(0.1)
    )
    learner = MetaLearner(module, algorithm, F.cross_entropy)
    assert learner.step(TaskBatch(x, y, x, y)).loss.isfinite()
    assert learner.adapt(x[0], y[0])[0].weight.dtype == torch.bfloat16


class TaskRates:
    """A rate for each of five tasks, without the dimensions of the parameter."""

    is_learned = per_step = False

    def __init__(self, *shape):
        self.shape = shape

    def table(self, adapted, num_steps):
        return {}

    def __call__(self, table, name, step):
        return torch.linspace(0.1, 0.5, 5).view(self.shape)


def test_a_rate_for_each_task_needs_the_parameter_s_dimensions():
    """With as many tasks as examples a wrong shape went through, and mixed the tasks."""
    module = nn.Linear(3, 2, bias=False)
    x, y = torch.randn(5, 5, 3), torch.randn(5, 5, 2)
    batch = TaskBatch(x, y, x, y)
    algorithm = replace(fewstep.maml(1), inner_rate=TaskRates(5, 1, 1))
    MetaLearner(module, algorithm, F.mse_loss).meta_gradient(batch)
    algorithm = replace(fewstep.maml(1), inner_rate=TaskRates(5, 1, 1, 1))
    with pytest.raises(InputError, match=r"inner_step.* gave \(5, 5, 2, 3\) for `weight` where"):
        MetaLearner(module, algorithm, F.mse_loss).meta_gradient(batch)


@pytest.mark.parametrize(
    ("clipped", "message"),
    [
        (lambda g: {"weight": g["weight"]}, r"gave nothing for `bias` where \(3, 2\)"),
        (lambda g: {n: t[0] for n, t in g.items()}, r"inner_clipping gave \(2.*where \(3, 2"),
        (lambda g: g | {"more": g["bias"]}, r"gave \(3, 2\) for `more` where nothing"),
    ],
)
def test_a_clipping_gives_back_what_it_got(clipped, message):
    x, y = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    algorithm = replace(fewstep.maml(1), inner_clipping=clipped)
    with pytest.raises(InputError, match=message):
        MetaLearner(nn.Linear(5, 2), algorithm, F.mse_loss).meta_gradient(TaskBatch(x, y, x, y))


class Returning(InnerStep):
    """Returns what it is told."""

    def __init__(self, result, start=None, per_step=False):
        self.result, self.first, self.rows = result, start or {}, per_step

    @property
    def per_step(self):
        return self.rows

    def start(self, theta):
        return self.first

    def __call__(self, theta, gradient, alpha, state, table, step):
        return self.result(theta, state)


def in_place(theta, state):
    with torch.no_grad():
        for p in theta.values():
            p.sub_(0.1)
    return theta, {}


def count_in_place(theta, state):
    state["t"] += 1
    return {n: p - 0.1 for n, p in theta.items()}, state


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Returning(in_place), "Returning, changed a tensor that it was given"),
        (Returning(count_in_place, {"t": torch.tensor(0)}), "changed a tensor that it was given"),
        (Returning(lambda theta, state: theta), "Returning, returned a dict; .* two dicts"),
        (Returning(lambda theta, state: (theta, None)), "state of inner_step must be a dict of"),
        (Returning(lambda theta, state: (theta, {"k": 0.5})), r"a number becomes .* torch\.tensor"),
        (Returning(lambda t, s: (t, {"c": torch.ones(2) * 1j})), "must be a dict of real tensors"),
        (Returning(lambda t, s: (t, s), {"c": None}), "must be a dict of real tensors"),
        (Returning(lambda t, s: (None, s)), "by its rates, gave a NoneType where a dict of"),
        (Returning(lambda t, s: (t | {"weight": 0.5}, s)), r"gave a float for `weight` where \("),
    ],
)
def test_a_step_gives_new_tensors_and_a_state(step, message):
    x, y = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    learner = MetaLearner(nn.Linear(5, 2), replace(fewstep.maml(2), inner_step=step), F.mse_loss)
    with pytest.raises(InputError, match=message):
        learner.adapt(x[0], y[0])
    if step.result is not in_place:  # which PyTorch refuses for tasks that share memory
        with pytest.raises(InputError, match=message):
            learner.meta_gradient(TaskBatch(x, y, x, y))


def test_a_state_may_be_written_into_its_dict():
    class Momentum(MomentumStep):
        def __call__(self, theta, gradient, alpha, state, table, step):
            for n, g in gradient.items():
                state[n] = 0.9 * state[n] + g
                theta[n] = theta[n] - alpha[n] * state[n]
            return theta, state

    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    found = [
        MetaLearner(
            module, replace(fewstep.maml(4, 0.1), inner_step=part), case.loss, checkpoint_every=1
        ).meta_gradient(batch)[0]
        for part in (MomentumStep(0.9), Momentum())
    ]
    assert relative_error(*found) < 1e-14


def test_more_steps_than_a_step_has_rows_for_are_refused():
    step = Returning(lambda theta, state: (theta, state), per_step=True)
    learner = MetaLearner(nn.Linear(5, 2), replace(fewstep.maml(2), inner_step=step), F.mse_loss)
    with pytest.raises(InputError, match="num_steps=3 is more than the 2 that Returning learned"):
        learner.adapt(torch.randn(4, 5), torch.randn(4, 2), num_steps=3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"betas=0\.9 must be two numbers", lambda: AdamStep(0.9)),
        (r"betas=\(0\.9,\) must be two numbers", lambda: AdamStep((0.9,))),
        (r"momentum=1\.0 must be 0 or more, and below 1", lambda: MomentumStep(1.0)),
        (r"betas=-0\.1 must be 0 or more, and below 1", lambda: AdamStep((-0.1, 0.9))),
        (r"AdamStep\(eps=0\.0\) must be positive", lambda: AdamStep(eps=0.0)),
        (
            "needs GradientStep, not MomentumStep",
            lambda: replace(
                fewstep.alpha_maml(),
                rate_update=HypergradientRates(0.1, exact=False),
                inner_step=MomentumStep(),
            ),
        ),
        (
            r"inner_step=<.*MomentumStep'> of type .* does not fit; give .* GradientStep\(\)",
            lambda: replace(fewstep.maml(), inner_step=MomentumStep),
        ),
        (
            "part named 'inner_step', the name of what",
            lambda: MetaLearner(
                nn.ModuleDict({"inner_step": nn.Linear(2, 2)}), fewstep.maml(), F.mse_loss
            ),
        ),
    ],
)
def test_what_does_not_fit_is_refused(message, call):
    with pytest.raises(InputError, match=message):
        call()
