"""Outer optimisers of one's own: groups of parameters, rates, states."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewstep import (
    SGD,
    Adam,
    ClipByNorm,
    InputError,
    LayerStepRates,
    MetaLearner,
    alpha_maml,
    maml,
    maml_plus_plus,
)
from fewstep.core.hypergradient import HypergradientAdam, HypergradientSGD
from tests.core.reference import MODELS

pytestmark = pytest.mark.usefixtures("float64")

CASE = MODELS["mlp"]


@dataclass(frozen=True)
class InGroups:
    """Adam whose groups have the parameters in another order than the module."""

    owns_rate = False

    def __call__(self, parameters):
        first, *rest = parameters
        groups = [{"params": rest, "lr": 0.01}, {"params": [first], "lr": 0.1}]
        return torch.optim.Adam(groups)


def linear(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(depth)))


def test_a_state_comes_back_to_parameters_in_groups():
    algorithm = replace(maml(1, 0.1), outer=InGroups())
    batch = CASE.batch()
    learners = [MetaLearner(linear(3), algorithm, F.cross_entropy) for _ in range(2)]
    one, other = learners
    for _ in range(3):
        one.step(batch)
    other.load_state_tensors(one.state_tensors())
    one.load_state_tensors(one.state_tensors())
    for each in learners:
        each.step(batch)
    states = [each.state_tensors() for each in learners]
    assert all(torch.equal(states[1][name], t) for name, t in states[0].items())
    untouched = MetaLearner(linear(3), algorithm, F.cross_entropy)
    untouched.load_state_tensors(states[0])
    for each in (one, untouched):
        each.evaluate_ensemble([each.state_tensors()], batch, 2)
        each.step(batch)
    assert all(torch.equal(p, q) for p, q in zip(
        one.module.parameters(), untouched.module.parameters(), strict=True
    ))  # fmt: skip


def test_groups_keep_their_rates_under_a_schedule():
    algorithm = replace(
        maml(1, 0.1),
        outer=InGroups(),
        outer_schedule=lambda epoch: 1 / (1 + epoch),
        iterations_per_epoch=1,
    )
    learner = MetaLearner(linear(2), algorithm, F.cross_entropy)
    for _ in range(3):
        learner.step(CASE.batch())
    rates = [group["lr"] for group in learner.optimiser.param_groups]
    assert rates == pytest.approx([0.01 / 3, 0.1 / 3])


def test_a_schedule_may_go_down_to_nothing():
    algorithm = replace(maml(1, 0.1), outer_schedule=lambda epoch: max(0.0, 1 - epoch))
    learner = MetaLearner(linear(2), replace(algorithm, iterations_per_epoch=1), F.cross_entropy)
    states = [learner.state_tensors()]
    for _ in range(2):
        learner.step(CASE.batch())
        states.append(learner.state_tensors())
    start, first, second = (state["model.0.weight"] for state in states)
    assert not torch.equal(first, start)
    assert torch.equal(second, first)


def test_a_rate_set_from_outside_is_refused():
    learner = MetaLearner(CASE.build(), maml(1, 0.1), CASE.loss)
    scheduler = torch.optim.lr_scheduler.StepLR(learner.optimiser, 1, 0.1)
    learner.step(CASE.batch())
    scheduler.step()
    before = [p.clone() for p in learner.module.parameters()]
    with pytest.raises(InputError, match=r"outer rate was set to 0\.0001.*outer_schedule"):
        learner.step(CASE.batch())
    now = learner.module.parameters()
    assert all(torch.equal(p, q) for p, q in zip(now, before, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda state: {n: t for n, t in state.items() if n != "iteration"}, "has no 'iteration'"),
        (lambda state: state | {"optimiser.2.bia.exp_avg": torch.ones(3)}, "`2.bia.exp_avg`"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(changed, message):
    learners = [
        MetaLearner(CASE.build(), replace(maml(1), outer=outer), CASE.loss)
        for outer in (Adam(0.1), SGD(0.1))
    ]
    learners[0].step(CASE.batch())
    before = learners[1].state_tensors()
    with pytest.raises(InputError, match=message):
        learners[1].load_state_tensors(changed(learners[0].state_tensors()))
    after = learners[1].state_tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_an_update_by_the_meta_gradient_is_a_step():
    batch, start = CASE.batch(), CASE.build().state_dict()
    algorithm = replace(
        maml(2, 0.1),
        inner_rate=LayerStepRates(0.1),
        outer_clipping=ClipByNorm(0.01),
        outer=Adam(0.01),
    )
    ends = []
    for by_hand in (False, True):
        module = CASE.build()
        module.load_state_dict(start)
        learner = MetaLearner(module, algorithm, CASE.loss)
        for _ in range(3):
            if by_hand:
                learner.update(learner.meta_gradient(batch)[0])
            else:
                learner.step(batch)
        ends.append(learner.state_tensors())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())
    assert ends[1]["iteration"] == 3


def test_an_update_by_the_worst_task_alone():
    """phi - beta * grad of the largest loss: an outer objective of one's own."""
    module, batch = CASE.build(), CASE.batch()
    learner = MetaLearner(module, replace(maml(2, 0.1), outer=SGD(0.5)), CASE.loss)
    _, metrics = learner.meta_gradient(batch)
    worst = int(metrics.task_loss.argmax())
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    gradient, _ = learner.meta_gradient(batch.batch(worst, 1))
    learner.update(gradient)
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] - 0.5 * gradient[n])
    assert learner.meta_gradient(batch)[1].task_loss[worst] < metrics.task_loss[worst]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: {}, InputError, r"update got nothing for `0.weight` where \(8, 4\) belongs"),
        (lambda g: g | {"0.weight": g["0.weight"][0]}, InputError, r"update got \(4,\) for `0"),
        (lambda g: g | {"x": g["0.weight"]}, InputError, r"update got \(8, 4\) for `x` where no"),
        (lambda g: g | {"2.bias": g["2.bias"] / 0}, FloatingPointError, "given to update is not"),
    ],
)
def test_an_update_by_something_else_is_refused(change, error, message):
    module = CASE.build()
    learner = MetaLearner(module, maml(1, 0.1), CASE.loss)
    gradient, _ = learner.meta_gradient(CASE.batch())
    before = learner.state_tensors()
    with pytest.raises(error, match=message):
        learner.update(change(gradient))
    assert all(torch.equal(t, before[n]) for n, t in learner.state_tensors().items())


def test_an_update_keeps_nothing_of_the_caller_s():
    rates = []
    for reused in (False, True):
        torch.manual_seed(0)
        learner = MetaLearner(linear(2), alpha_maml(1, 0.1, 0.1), F.cross_entropy)
        kept = None
        for _ in range(3):
            gradient, _ = learner.meta_gradient(CASE.batch())
            if reused and kept is not None:
                for n, g in gradient.items():
                    kept[n].copy_(g)
                gradient = kept
            kept = gradient
            learner.update(gradient)
        rates.append(learner.hypergradient_rates()["outer_lr"])
    assert rates[0] == rates[1]


def test_an_update_may_be_of_another_type():
    learner = MetaLearner(linear(1), maml(1, 0.1), F.cross_entropy)
    gradient, _ = learner.meta_gradient(CASE.batch())
    learner.update({n: g.float() for n, g in gradient.items()})
    assert next(learner.module.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("clipped", "message"),
    [
        (lambda g: {}, r"clipping gave nothing for `0.weight` where \(1, 4, 4\) belongs"),
        (lambda g: {n: t[0] for n, t in g.items()}, r"clipping gave \(4, 4\) for `0.weight` where"),
        (lambda g: None, "clipping gave a NoneType where a dict of tensors belongs"),
    ],
)
def test_an_outer_clipping_gives_back_what_it_got(clipped, message):
    learner = MetaLearner(linear(1), replace(maml(1), outer_clipping=clipped), F.cross_entropy)
    with pytest.raises(InputError, match=message):
        learner.step(CASE.batch())


def test_a_copy_of_a_learner_with_rows_goes_on():
    case = MODELS["batch norm"]
    learner = MetaLearner(case.build(), maml_plus_plus(2), case.loss)
    batch = case.batch()
    with torch.no_grad():
        learner.module[1].weight.mul_(1)  # the version of what has copies is not 0
    learner = MetaLearner(learner.module, maml_plus_plus(2), case.loss)
    learner.step(batch)
    twin = copy.deepcopy(learner)
    for each in (learner, twin):
        each.step(batch)
    ours, theirs = learner.state_tensors(), twin.state_tensors()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


KINDS = {
    "Adam": Adam(),
    "AdamW": Adam(weight_decay=0.1),
    "SGD": SGD(0.1),
    "momentum": SGD(0.1, momentum=0.9),
    "HypergradientAdam": HypergradientAdam(0.1, 0.01),
    "HypergradientSGD": HypergradientSGD(0.1, 0.01),
}
SAME = {("Adam", "AdamW"), ("AdamW", "Adam")}


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("here", KINDS)
def test_a_state_of_another_optimiser_is_refused_and_changes_nothing(here, there):
    case = MODELS["mlp"]
    one, other = (
        MetaLearner(case.build(), replace(maml(1), outer=KINDS[kind]), case.loss)
        for kind in (there, here)
    )
    other.load_state_tensors(one.state_tensors())  # before a step there is nothing of it
    for _ in range(2):
        one.step(case.batch())
    state, before = one.state_tensors(), other.state_tensors()
    if here == there or (here, there) in SAME:
        other.load_state_tensors(state)
        other.step(case.batch())
        other.hypergradient_rates()
        return
    if there == "SGD":  # which keeps nothing, so that nothing tells
        return
    with pytest.raises(InputError, match=r"^the saved state is another outer optimiser's"):
        other.load_state_tensors(state)
    after = other.state_tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_a_state_that_is_not_whole_is_refused():
    case = MODELS["mlp"]
    learner = MetaLearner(case.build(), maml(1), case.loss)
    learner.step(case.batch())
    state = {n: t for n, t in learner.state_tensors().items() if not n.endswith("exp_avg_sq")}
    with pytest.raises(InputError, match=r"not whole: 'exp_avg_sq' is missing, and this one keeps"):
        learner.load_state_tensors(state)


class OfMatrices:
    """Momentum for matrices in a group of their own, before the rest, as Muon's users write it."""

    owns_rate = False

    class Optimiser(torch.optim.Optimizer):
        def __init__(self, parameters):
            matrices = [p for p in parameters if p.ndim == 2]
            rest = [p for p in parameters if p.ndim < 2]
            groups = [{"params": matrices, "estimate": 1e-3}, {"params": rest, "estimate": 1.0}]
            super().__init__(groups, {"lr": 0.1, "count": 0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] += 1
                group["estimate"] *= 1.5  # as Prodigy and others estimate their rates
                for p in group["params"]:
                    state, key = self.state[p], "m" if p.ndim == 2 else "v"
                    state[key] = p.grad + 0.9 * state.get(key, 0)
                    p.sub_(group["lr"] * group["estimate"] * state[key])

    def __call__(self, parameters):
        return self.Optimiser(parameters)


def test_groups_of_ones_own_and_their_numbers_come_back():
    def learner():
        return MetaLearner(CASE.build(), replace(maml(1, 0.1), outer=OfMatrices()), CASE.loss)

    first, second, batch = learner(), learner(), CASE.batch()
    for _ in range(3):
        first.step(batch)
    state = first.state_tensors()
    second.load_state_tensors(state)
    for each in (first, second):
        each.step(batch)
    for name, p in first.parameters.items():
        assert torch.equal(p, second.parameters[name]), name
    second.load_state_tensors(learner().state_tensors())  # and back to the start
    assert [g["count"] for g in second.optimiser.param_groups] == [0, 0]


@pytest.mark.parametrize(
    ("algorithm", "is_refused"),
    [(maml(1, 0.1), False), (replace(maml(1, 0.1), inner_rate=LayerStepRates(0.1)), True)],
)
def test_a_module_moved_away_from_its_rates_is_refused(algorithm, is_refused):
    learner, batch = MetaLearner(CASE.build().float(), algorithm, F.cross_entropy), CASE.batch()
    learner.module.double()
    if is_refused:
        with pytest.raises(InputError, match=r"was torch.float32 on cpu when the learner was made"):
            learner.meta_gradient(batch)
    else:
        learner.meta_gradient(batch)
