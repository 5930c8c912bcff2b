"""The policy learner against plain loops, finite differences and a bandit with a closed form."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fewstep import (
    AdaptedParameters,
    ConstantRate,
    InputError,
    LayerStepRates,
    LearnedRate,
    MomentumStep,
    StepRates,
)
from fewstep.rl import (
    CategoricalPolicy,
    Gaussian,
    GaussianPolicy,
    NavigationTasks,
    PolicyLearner,
    TrustRegion,
)
from fewstep.rl import learner as learner_module
from fewstep.rl.environments import Outcome
from fewstep.rl.experience import Experience
from fewstep.rl.trust_region import hessian_product

pytestmark = pytest.mark.usefixtures("float64")

RATES = (0.3, 0.2, 0.1)
mean_and_log_std = Gaussian().mean_and_log_std


def navigation(**kwargs):
    return NavigationTasks("train", horizon=6, dtype=torch.float64, **kwargs)


def learner(num_steps=2, inner_rate=None, kind=GaussianPolicy, **kwargs):
    policy = kind(2, 2, hidden=(8,))
    return PolicyLearner(policy, num_steps, inner_rate or StepRates(RATES), episodes=3, **kwargs)


def gather(of, tasks, numbers, num_steps):
    """Return rollouts after each number of steps, and what they teach."""
    rollouts = of.roll_out(tasks, numbers, num_steps=num_steps)
    return rollouts, [Experience.of(r, discount=0.99, trace=1.0) for r in rollouts]


def seen(of, of_steps, *, differentiable=True):
    """Return outer loss and divergence, of all tasks."""
    parts = list(of._objective(of_steps, differentiable=differentiable))
    return sum(part.loss for part in parts), sum(part.divergence for part in parts)


def by_hand(of, of_steps, task, order, ratio=False, momentum=0.0):
    """Return outer loss, divergence and adapted parameters of one task, by a plain loop."""
    policy, says = of.policy, of.distribution
    theta = dict(policy.named_parameters())
    m = dict.fromkeys(theta, 0.0)
    for alpha, e in zip(RATES, of_steps[:-1], strict=False):
        outputs = functional_call(policy, theta, (e.observations[task],))
        a = (e.weights * e.advantages)[task]
        log_probability = says.log_probability(outputs, e.actions[task])
        if ratio:
            log_probability = (log_probability - log_probability.detach()).exp()
        loss = -(log_probability * a).mean()
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=order == 2)
        m = {n: momentum * m[n] + g for n, g in zip(m, gradients, strict=True)}
        theta = {n: p - alpha * m[n] for n, p in theta.items()}
    e = of_steps[-1]
    outputs = functional_call(policy, theta, (e.observations[task],))
    old = e.outputs[task]
    ratio = (
        says.log_probability(outputs, e.actions[task]) - says.log_probability(old, e.actions[task])
    ).exp()
    loss = -(e.weights[task] * ratio * e.advantages[task]).mean()
    return loss, (e.weights[task] * says.kl_divergence(old, outputs)).mean(), theta


def moved(policy):
    """Move a policy away from the one that gathered, where ratio and divergence are trivial."""
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("at_once", [10**6, 55])  # 18 examples a task: of all four, or of three
@pytest.mark.parametrize("kind", [GaussianPolicy, CategoricalPolicy])
def test_objective_and_gradient_are_those_of_a_plain_loop(
    num_steps, order, at_once, kind, monkeypatch
):
    monkeypatch.setattr(learner_module, "_EXAMPLES_AT_ONCE", at_once)
    of = learner(num_steps, derivative_order=order, kind=kind)
    _, of_steps = gather(of, navigation(), slice(0, 4), num_steps)
    moved(of.policy)
    parameters = list(of.policy.parameters())
    found = seen(of, of_steps)
    each = [by_hand(of, of_steps, task, order)[:2] for task in range(4)]
    expected = [torch.stack(terms).mean() for terms in zip(*each, strict=True)]
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(
            torch.autograd.grad(ours, parameters, retain_graph=True),
            torch.autograd.grad(plain, parameters, retain_graph=True),
        )
    assert found[1] > 1e-4  # else nothing would have moved


@pytest.mark.parametrize("order", [1, 2])
def test_momentum_goes_from_step_to_step(order):
    of = learner(2, derivative_order=order, inner_step=MomentumStep(0.7))
    _, of_steps = gather(of, navigation(), slice(0, 3), 2)
    moved(of.policy)
    parameters = list(of.policy.parameters())
    each = [by_hand(of, of_steps, task, order, momentum=0.7)[0] for task in range(3)]
    ours, plain = seen(of, of_steps)[0], torch.stack(each).mean()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(plain, parameters)
    )
    of.step(navigation(), 0, 3)


class Shared(nn.Module):
    """A layer under two names, as when a part is kept in a list besides."""

    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Linear(2, 2)
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        mean = self.again(self.first(x))
        return torch.cat([mean, self.log_std.expand_as(mean)], -1)


class Attentive(nn.Module):
    """Attention, whose default kernel has no second derivative, over an observation's numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.read, self.head = nn.Linear(1, 4), nn.Linear(8, 4)

    def forward(self, x):
        of_all = self.layer(self.read(x[..., None].flatten(0, -3)))
        return self.head(of_all.flatten(1)).view(*x.shape[:-1], 4)


@pytest.mark.parametrize("policy", [Shared, Attentive])
@pytest.mark.parametrize("vectorize", [True, False])
def test_any_policy_may_be_trained(policy, vectorize):
    """Whatever `MetaLearner` takes."""
    of = PolicyLearner(policy(), 1, episodes=3, vectorize=vectorize)
    before = [p.clone() for p in of.policy.parameters()]
    for iteration in range(2):
        metrics = of.step(navigation(), 4 * iteration, 4)
    assert metrics.update.shrinks is not None
    assert not any(torch.equal(a, b) for a, b in zip(before, of.policy.parameters(), strict=True))


def test_the_policy_that_is_judged_is_the_one_that_acted():
    """Dropout, which would make another policy of each call, is off; then it is as without."""

    def update_of(*between):
        torch.manual_seed(0)
        of = PolicyLearner(nn.Sequential(nn.Linear(2, 8), *between, nn.Linear(8, 4)))
        update = of.step(navigation(), 0, 4).update
        assert of.policy.training
        return update

    found = update_of(nn.Dropout(0.5))
    assert found == update_of()
    assert found.loss_before == pytest.approx(0, abs=1e-12)
    assert found.shrinks is not None


def test_looping_over_the_tasks_changes_no_result():
    of, plain = learner(), learner(vectorize=False)
    plain.policy.load_state_dict(of.policy.state_dict())
    found, expected = (each.step(navigation(), 0, 4) for each in (of, plain))
    torch.testing.assert_close(found.returns.of_tasks, expected.returns.of_tasks)
    assert found.update.loss == pytest.approx(expected.update.loss)


def test_ratios_have_the_same_steps_and_other_second_derivatives():
    plain = learner(support_loss="log probability")
    of = learner(support_loss="ratio")
    of.policy.load_state_dict(plain.policy.state_dict())
    _, of_steps = gather(of, navigation(), slice(0, 4), 2)
    _, the_same = gather(plain, navigation(), slice(0, 4), 2)
    torch.testing.assert_close(of_steps[2].outputs, the_same[2].outputs)
    parameters = list(of.policy.parameters())
    found = torch.autograd.grad(seen(of, of_steps)[0], parameters)
    losses = [by_hand(of, of_steps, task, 2, ratio=True)[0] for task in range(4)]
    torch.testing.assert_close(found, torch.autograd.grad(sum(losses) / 4, parameters))
    without = torch.autograd.grad(seen(plain, of_steps)[0], list(plain.policy.parameters()))
    assert not torch.isclose(found[0], without[0]).all()


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_are_slopes(which):
    of = learner()
    _, of_steps = gather(of, navigation(), slice(0, 3), 2)
    moved(of.policy)
    parameters = list(of.policy.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(seen(of, of_steps)[which], parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))

    def at(epsilon):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(epsilon * d)
            found = seen(of, of_steps, differentiable=False)[which]
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(epsilon * d)
        return found

    assert slope.item() == pytest.approx((at(1e-6) - at(-1e-6)).item() / 2e-6, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("at_once", [10**6, 40])  # 18 examples a task: of all three, or of two
@pytest.mark.parametrize("kind", [GaussianPolicy, CategoricalPolicy])
def test_the_divergence_curves_as_its_second_derivative_says(order, at_once, kind, monkeypatch):
    monkeypatch.setattr(learner_module, "_EXAMPLES_AT_ONCE", at_once)
    of = learner(derivative_order=order, kind=kind)
    _, of_steps = gather(of, navigation(), slice(0, 3), 2)
    parameters = list(of.policy.parameters())
    parts = list(of._objective(of_steps, differentiable=True))
    assert len(parts) == (1 if at_once > 40 else 2)
    product = hessian_product(parts, parameters, damping=0.1)
    divergence = seen(of, of_steps)[1]
    slope = torch.autograd.grad(divergence, parameters, create_graph=True)
    v = [torch.randn_like(p) for p in parameters]
    along = sum((g * each).sum() for g, each in zip(slope, v, strict=True))
    expected = torch.autograd.grad(along, parameters, retain_graph=True)
    flat_v, flat = (torch.cat([t.flatten() for t in ts]) for ts in (v, expected))
    torch.testing.assert_close(product(flat_v), flat + 0.1 * flat_v)


def test_discount_and_trace_are_those_asked_for():
    of, tasks = learner(1, discount=0.5, trace=0.3), navigation()
    before, after = of.roll_out(tasks, slice(0, 2))
    taught = Experience.of(before, discount=0.5, trace=0.3)
    for task in range(2):
        *_, theta = by_hand(of, [taught, taught], task, order=1)
        outputs = functional_call(of.policy, theta, (after.observations[task],))
        on = after.running[task, ..., None]
        torch.testing.assert_close(after.outputs[task], outputs * on)


def test_episodes_after_k_steps_are_of_the_policy_after_k_steps():
    of, tasks = learner(), navigation()
    rollouts, of_steps = gather(of, tasks, slice(5, 8), 2)
    for step, found in enumerate(rollouts):
        noise = tasks.noise(5, 3, 3, step)
        for task in range(3):
            *_, theta = by_hand(of, of_steps[: step + 1], task, order=1)
            outputs = functional_call(of.policy, theta, (found.observations[task],))
            mean, log_std = mean_and_log_std(outputs)
            on = found.running[task, ..., None]
            torch.testing.assert_close(found.outputs[task], outputs * on)
            acted = mean + log_std.exp() * noise[:, task].transpose(0, 1)
            torch.testing.assert_close(found.actions[task], acted * on)


class Bandit:
    """One time step; the reward of task j is -|action - j|^2."""

    observation_size, action_size, horizon = 1, 1, 1

    def environments(self, start, count, episodes):
        targets = torch.arange(start, start + count).double()[:, None, None]
        return _Arms(targets.expand(count, episodes, 1))

    def noise(self, start, count, episodes, step):
        return torch.randn(1, count, episodes, 1)


class _Arms:
    def __init__(self, targets):
        self.targets = targets

    def reset(self):
        return torch.ones_like(self.targets)

    def close(self):
        pass

    def step(self, actions):
        rewards = -(actions - self.targets).square().sum(-1)
        return Outcome(self.targets, rewards, torch.ones_like(rewards, dtype=torch.bool))


class _Constant(nn.Module):
    """Mean mu and deviation sigma, whatever is seen."""

    def __init__(self):
        super().__init__()
        self.mu, self.log_sigma = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, x):
        return torch.cat([self.mu.expand(len(x), 1), self.log_sigma.expand(len(x), 1)], -1)


def test_an_inner_step_goes_along_the_gradient_of_the_expected_reward():
    """J = -(mu - j)^2 - sigma^2, so dJ/dmu = -2 (mu - j) and dJ/dlog sigma = -2 sigma^2.

    Advantages are rewards less their mean, over their deviation s, s^2 = 4 sigma^2 (mu - j)^2 +
    2 sigma^4.
    """
    policy, alpha = _Constant(), 0.1
    of = PolicyLearner(policy, 1, ConstantRate(alpha), episodes=400_000)
    rollouts = of.roll_out(Bandit(), slice(0, 3))
    sigma = math.exp(-0.4)
    for j in range(3):
        s = math.sqrt(4 * sigma**2 * (0.5 - j) ** 2 + 2 * sigma**4)
        mu, log_sigma = rollouts[1].outputs[j, 0, 0].tolist()
        assert mu == pytest.approx(0.5 - alpha * 2 * (0.5 - j) / s, abs=2e-3)
        assert log_sigma == pytest.approx(-0.4 - alpha * 2 * sigma**2 / s, abs=2e-3)
        assert rollouts[0].returns[j].item() == pytest.approx(
            -((0.5 - j) ** 2) - sigma**2, abs=0.02
        )


@pytest.mark.parametrize("support_loss", ["log probability", "ratio"])
def test_the_ratio_alone_knows_the_curvature_of_the_expected_reward(support_loss):
    """d mu[1]/d mu[0] = 1 - 2 alpha/s, as J = -(mu - j)^2 / s; and 1, if chances stay as they are.

    With advantages of mean 0 the derivative of grad log pi has none, as it is -1/sigma^2.
    """
    policy, alpha = _Constant(), 0.1
    of = PolicyLearner(policy, 1, ConstantRate(alpha), episodes=400_000, support_loss=support_loss)
    _, of_steps = gather(of, Bandit(), slice(0, 3), 1)
    point = of._loop.start(3)
    after = learner_module._descend(of._loop, point, of_steps[0], order=2)
    sigma = math.exp(-0.4)
    for j in range(3):
        s = math.sqrt(4 * sigma**2 * (0.5 - j) ** 2 + 2 * sigma**4)
        expected = 1 - 2 * alpha / s if support_loss == "ratio" else 1
        (slope,) = torch.autograd.grad(after.theta["mu"][j], policy.mu, retain_graph=True)
        assert slope.item() == pytest.approx(expected, abs=3e-3)


def test_without_a_rate_the_steps_change_nothing():
    of, plain = learner(2, ConstantRate(0.0)), learner(0)
    plain.policy.load_state_dict(of.policy.state_dict())
    _, of_steps = gather(of, navigation(), slice(0, 3), 2)
    for policy in (of.policy, plain.policy):
        torch.manual_seed(1)
        moved(policy)
    torch.testing.assert_close(seen(of, of_steps), seen(plain, of_steps[-1:]))


def test_returns_do_not_depend_on_the_other_tasks():
    of, tasks = learner(), navigation()
    whole = of.evaluate(tasks, 5).of_tasks
    torch.testing.assert_close(of.evaluate(tasks, 5, chunk_size=2).of_tasks, whole)
    alone = of.roll_out(tasks, slice(3, 4))
    torch.testing.assert_close(torch.stack([r.returns for r in alone], 1), whole[3:4])


def test_a_test_may_begin_beyond_the_tasks_of_training():
    of, tasks = learner(), navigation()
    whole = of.evaluate(tasks, 7).of_tasks
    torch.testing.assert_close(of.evaluate(tasks, 3, start=4, chunk_size=2).of_tasks, whole[4:])


def test_a_test_changes_nothing_and_takes_rates_of_its_own():
    of, tasks = learner(), navigation()
    before = of.state_tensors()
    of.evaluate(tasks, 3, num_steps=4)
    still = of.evaluate(tasks, 3, inner_rate=StepRates((0.0,)))
    assert before.keys() == of.state_tensors().keys()
    assert all(torch.equal(t, before[n]) for n, t in of.state_tensors().items())
    zero = learner(2, ConstantRate(0.0))
    zero.policy.load_state_dict(of.policy.state_dict())
    assert torch.equal(still.of_tasks, zero.evaluate(tasks, 3).of_tasks)


def test_training_goes_on_from_a_saved_state_to_the_bit():
    tasks = navigation()
    straight, first, second = learner(), learner(), learner()
    first.policy.load_state_dict(straight.policy.state_dict())
    for i in range(4):
        straight.step(tasks, 4 * i, 4)
    for i in range(2):
        first.step(tasks, 4 * i, 4)
    second.load_state_tensors(first.state_tensors())
    assert second.iteration == 2
    for i in range(2, 4):
        second.step(tasks, 4 * i, 4)
    for name, tensor in straight.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[name])


def test_a_state_stays_as_it_was_while_training_goes_on():
    of, tasks = learner(2, LearnedRate(0.1)), navigation()
    state = of.state_tensors()
    before = {n: p.detach().clone() for n, p in of.parameters.items()}
    of.step(tasks, 0, 4)
    of.load_state_tensors(state)
    assert of.iteration == 0
    assert all(torch.equal(of.parameters[n], b) for n, b in before.items())
    assert not any(t.requires_grad for t in state.values())


def test_an_iteration_moves_phi_down_the_outer_loss_within_the_bound():
    of = learner()
    before = [p.detach().clone() for p in of.policy.parameters()]
    metrics = of.step(navigation(), 0, 8)
    assert metrics.returns.of_tasks.shape == (8, 3)
    assert metrics.update.loss < metrics.update.loss_before
    assert 0 < metrics.update.divergence <= of.outer.max_divergence
    assert of.iteration == 1
    assert all(not torch.equal(p, b) for p, b in zip(of.policy.parameters(), before, strict=True))


def test_learned_rates_are_trained_along():
    of = learner(2, LayerStepRates(0.1))
    before = {n: p.detach().clone() for n, p in of.parameters.items() if n.startswith("inner_lr")}
    assert before
    of.step(navigation(), 0, 4)
    assert all(not torch.equal(of.parameters[n], b) for n, b in before.items())
    with pytest.raises(InputError, match="more than the 2"):
        of.evaluate(navigation(), 2, num_steps=3)


def test_the_inner_loop_changes_what_is_adapted_alone():
    of = learner(1, LearnedRate(0.5), adapted=AdaptedParameters(include=("log_std",)))
    before, after = of.roll_out(navigation(), slice(0, 2))
    start = [mean_and_log_std(r.outputs[:, :, 0]) for r in (before, after)]
    torch.testing.assert_close(start[0][0], start[1][0])  # all begin at the origin
    assert not torch.isclose(start[0][1], start[1][1]).any()


def test_training_teaches_to_walk_to_goals():
    """In ten iterations the return after a step becomes better, and better than before it."""
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 2, hidden=(16,))
    of = PolicyLearner(policy, 1, ConstantRate(0.5), outer=TrustRegion(0.05), episodes=10)
    tasks = NavigationTasks("train", horizon=15, dtype=torch.float64)
    test = NavigationTasks("test", horizon=15, dtype=torch.float64)
    before = of.evaluate(test, 40)
    for i in range(15):
        of.step(tasks, 10 * i, 10)
    after = of.evaluate(test, 40)
    assert after.curve[1] - after.curve_ci95[1] > before.curve[1] + before.curve_ci95[1]
    assert after.curve[1] > after.curve[0] + 0.5
    assert str(after).startswith(f"return {after.curve[0]:.2f} ± ")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"derivative_order": 3}, r"FixedOrder\(3\) must be"),
        ({"discount": 1.5}, "discount=1.5 must be between 0 and 1"),
        ({"trace": -0.1}, "trace=-0.1"),
        ({"num_steps": -1}, "num_steps=-1"),
        ({"inner_rate": 0.0}, r"inner_rate=0.0 of type float does not fit; give .* ConstantRate\("),
        ({"support_loss": "rato"}, "unknown support_loss 'rato'; did you mean 'ratio'"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, told):
    with pytest.raises(InputError, match=told):
        PolicyLearner(GaussianPolicy(2, 2), **wrong)


def test_no_episodes_no_interval_and_buffers_are_refused():
    with pytest.raises(InputError, match="episodes=0"):
        PolicyLearner(GaussianPolicy(2, 2), episodes=0)
    with pytest.raises(InputError, match="num_tasks=1 must be at least 2"):
        learner().evaluate(navigation(), 1)
    with pytest.raises(InputError, match="0 tasks of 3 episodes: give at least one of each"):
        learner().step(navigation(), 0, 0)
    with pytest.raises(InputError, match="4 tasks of 0 episodes: give at least one of each"):
        learner().evaluate(navigation(), 4, episodes=0)
    with pytest.raises(InputError, match="chunk_size=0 must be at least 1"):
        learner().evaluate(navigation(), 2, chunk_size=0)
    with pytest.raises(InputError, match=r"LearnedRate\(inner_lr=0\.1\) is learned; give"):
        learner().evaluate(navigation(), 2, inner_rate=LearnedRate(0.1))
    with pytest.raises(InputError, match=r"inner_rate=0\.1 of type float .* ConstantRate"):
        learner().evaluate(navigation(), 2, inner_rate=0.1)
    with pytest.raises(InputError, match="Sequential has buffers"):
        PolicyLearner(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)))


def test_a_state_without_its_iteration_is_refused_and_nothing_taken_over():
    of, other = learner(), learner()
    before = of.state_tensors()
    with pytest.raises(InputError, match=r"has no `iteration`; give what state_tensors\(\)"):
        of.load_state_tensors(other.policy.state_dict())
    assert all(torch.equal(t, before[n]) for n, t in of.state_tensors().items())


@pytest.mark.parametrize("vectorize", [True, False])
def test_observations_of_another_dtype_are_refused(vectorize):
    tasks = NavigationTasks("train", horizon=6)
    of = learner(vectorize=vectorize)
    told = (
        r"the environments give torch\.float32 and the policy is of torch\.float64 \(.*\); give "
        r"environments with dtype=torch\.float64, or policy\.to\(torch\.float32\)"
    )
    for call in (of.step, lambda *_: of.evaluate(tasks, 2)):
        with pytest.raises(InputError, match=told):
            call(tasks, 0, 4)


class Converting(nn.Module):
    """A policy that takes observations of any dtype."""

    def __init__(self):
        super().__init__()
        self.policy = GaussianPolicy(2, 2, hidden=(8,))

    def forward(self, x):
        return self.policy(x.double())


def test_a_policy_may_convert_its_observations():
    of = PolicyLearner(Converting(), 1, episodes=3)
    assert of.step(NavigationTasks("train", horizon=6), 0, 4).update.shrinks is not None
