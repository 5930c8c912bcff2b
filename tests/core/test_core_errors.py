"""Mistakes are refused in one line that quotes what was given; nothing is left half done."""

import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fewstep import (
    SGD,
    Adam,
    AdaptedParameters,
    Algorithm,
    ClipByNorm,
    CosineAnnealing,
    FinalStep,
    FixedOrder,
    HypergradientRates,
    InputError,
    MetaLearner,
    MultiStepLoss,
    PerStepAffine,
    StepRates,
    TaskBatch,
    auto,
    fomaml,
    maml,
)
from tests.core.reference import MODELS, Case

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # PyTorch loops over the tasks inside vmap for renorm, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

CASE = MODELS["mlp"]
LOSSES = nn.CrossEntropyLoss(reduction="none")


def learner(algorithm: Algorithm | None = None, module=None, loss=CASE.loss, **options):
    return MetaLearner(module or CASE.build(), algorithm or maml(2), loss, **options)


def with_part(**part) -> Algorithm:
    return replace(maml(2), **part)


def gives(*v: float):
    return lambda num_steps, epoch: v


def only(pattern: str, recipe=maml) -> Algorithm:
    return recipe(2, adapted=AdaptedParameters(include=(pattern,)))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is old, and still met
        return torch.jit.script(CASE.build())


class Spare(nn.Module):
    """Has a parameter that takes no part in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


def unused(algorithm: Algorithm) -> None:
    learner(algorithm, Spare()).meta_gradient(CASE.batch())


class Renormalised(nn.Module):
    """Changes its parameter when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x):
        rows = (4 + x).long().clamp(0, 8)
        return self.head(F.embedding(rows, self.table.weight, max_norm=0.1).mean(1))


class Deciding(nn.Linear):
    """Decides by a number, which is another in each task."""

    def forward(self, x):
        return super().forward(x if x.mean().item() > 0 else -x)


class Several(nn.Linear):
    """Returns two tensors."""

    def forward(self, x):
        return super().forward(x), x


class Recomputed(nn.Linear):
    """Keeps nothing for the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Flat(nn.Linear):
    """Returns a number for each example."""

    def __init__(self) -> None:
        super().__init__(4, 1)

    def forward(self, x):
        return super().forward(x).squeeze(-1)


def centred(outputs, targets):
    return (outputs - targets).square().mean()


def one_logit() -> None:
    """A binary classifier whose one output would always be its largest."""

    def loss(outputs, targets):
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.double())

    called(nn.Linear(4, 1), loss=loss)


def penalised() -> None:
    """A penalty on the module's own parameters, where each task has others."""
    module = CASE.build()

    def loss(outputs, targets):
        return CASE.loss(outputs, targets) + sum(p.square().sum() for p in module.parameters())

    called(module, loss=loss)


class Tempered(nn.Module):
    """A loss that would like to be learned, too."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return CASE.loss(self.temperature * outputs, targets)


class Growing(nn.Linear):
    """Has a buffer that grows with every call."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen = torch.cat([self.seen, x.new_zeros(1)])
        return super().forward(x)


def called(module: nn.Module, **options) -> None:
    learner(module=module, **options).meta_gradient(CASE.batch())


class Later:
    """A part that gives something else from the second epoch on."""

    def __init__(self, first, then) -> None:
        self.first, self.then = first, then

    def __call__(self, *args):
        return self.first if args[-1] < 1 else self.then


def later(**part):
    """Return a training of two epochs."""

    def train() -> None:
        one = learner(replace(maml(2), iterations_per_epoch=1, **part))
        for _ in range(2):
            one.step(CASE.batch())

    return train


def norms_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    adapted = AdaptedParameters(("1.*", "2.*"))
    learner(replace(maml(2), adapted=adapted, norm_affine=PerStepAffine()), module)


class Source:
    """Gives what it likes, or query sets that grow from task to task."""

    def __init__(self, given=None) -> None:
        self.given = given

    def batch(self, start, count):
        if self.given is not None:
            return self.given
        x, y = CASE.batch(count).tensors()[:2]
        return TaskBatch(x, y, x[:, : start + 1], y[:, : start + 1])


def batch_of(*shapes: tuple[int, ...]) -> TaskBatch:
    return TaskBatch(*(torch.zeros(shape) for shape in shapes))


MISTAKES = [
    ("num_steps=-1 ", lambda: maml(num_steps=-1)),
    ("FixedOrder(3) ", lambda: FixedOrder(3)),
    ("inner_lr=nan ", lambda: maml(inner_lr=float("nan"))),
    ("inner_lr=-0.1 ", lambda: maml(inner_lr=-0.1)),
    ("inner_lrs=-0.1 ", lambda: StepRates((0.1, -0.1))),
    ("inner_lr='0.1' ", lambda: maml(inner_lr="0.1")),
    ("inner_lr=tensor(", lambda: maml(inner_lr=torch.tensor(0.1))),
    ("inner_lrs=0.1 must be a tuple", lambda: StepRates(0.1)),
    ("inner_rate=0.1 of type float does not fit; give a part", lambda: Algorithm(1, 0.1)),
    ("MultiStepLoss(num_epochs=0.5) must be at least 1", lambda: MultiStepLoss(0.5)),
    ("MultiStepLoss(floor=1.01) must be between", lambda: MultiStepLoss(10, 1.01)),
    ("MultiStepLoss(floor=-0.01) must be between", lambda: MultiStepLoss(10, -0.01)),
    ("CosineAnnealing(num_epochs=0) must be positive", lambda: CosineAnnealing(0)),
    ("CosineAnnealing(final=1.01) must be between", lambda: CosineAnnealing(2, 1.01)),
    ("CosineAnnealing(final=-0.01) must be between", lambda: CosineAnnealing(2, -0.01)),
    ("such as ConstantRate(0.1)", lambda: Algorithm(1, torch.eye(9))),
    ("of type float32 does not fit", lambda: Algorithm(1, np.float32(0.1))),
    ("query_weights=<class ", lambda: with_part(query_weights=FinalStep)),
    ("derivative_order=2 of type int", lambda: with_part(derivative_order=2)),
    ("adapted='head.*' of type str", lambda: with_part(adapted="head.*")),
    ("norm_affine='shared' of type str", lambda: with_part(norm_affine="shared")),
    ("such as NormStatistics('batch')", lambda: with_part(norm_statistics="running")),
    ("inner_clipping=1.0 of type float", lambda: with_part(inner_clipping=1.0)),
    ("outer_clipping=10.0 of type float", lambda: with_part(outer_clipping=10.0)),
    ("rate_update=0.1 of type float", lambda: with_part(rate_update=0.1)),
    ("outer=<class 'torch.optim.adam.Adam'> ", lambda: with_part(outer=torch.optim.Adam)),
    ("a callable with an attribute owns_rate", lambda: with_part(outer=lambda p: None)),
    ("outer=0.1 of type float", lambda: with_part(outer=0.1)),
    ("outer_schedule=0.5 of type float", lambda: with_part(outer_schedule=0.5)),
    ("query weights (1.0,) at epoch 0.0; give 3", lambda: with_part(query_weights=gives(1.0))),
    ("query weights (0, 1, 5, 7) at", lambda: with_part(query_weights=gives(0, 1, 5, 7))),
    ("query weights (0, 0, 0) at", lambda: with_part(query_weights=gives(0, 0, 0))),
    ("query weights (0, nan, 1) at", lambda: with_part(query_weights=gives(0, math.nan, 1))),
    ("derivative order 3 at epoch 0.0", lambda: with_part(derivative_order=lambda epoch: 3)),
    ("derivative order '2' at", lambda: with_part(derivative_order=lambda epoch: "2")),
    ("derivative order None at", lambda: with_part(derivative_order=lambda epoch: None)),
    ("iterations_per_epoch=0 must be positive", lambda: with_part(iterations_per_epoch=0)),
    ("the factor nan on the outer rate", lambda: with_part(outer_schedule=lambda e: math.nan)),
    ("the factor -1 on the outer rate", lambda: with_part(outer_schedule=lambda e: -1)),
    ("num_steps=2.0 must be a whole number", lambda: maml(num_steps=2.0)),
    ("num_steps=1.5 ", lambda: learner().evaluate(CASE.batch(), 3, num_steps=1.5)),
    ("outer_lr='0.1' ", lambda: SGD("0.1")),
    ("hyper_lr='0.1' ", lambda: HypergradientRates("0.1")),
    ("ClipByNorm(limit='1') must have", lambda: ClipByNorm("1")),
    ("ClipByNorm(limit=inf) must have", lambda: ClipByNorm(math.inf)),
    ("inner_lr=inf ", lambda: fomaml(inner_lr=float("inf"))),
    ("inner_lrs=inf ", lambda: StepRates((0.1, float("inf")))),
    ("inner_lrs is empty", lambda: StepRates(())),
    ("outer_lr=0.0 ", lambda: Adam(0.0)),
    ("outer_lr=-0.1 ", lambda: SGD(-0.1)),
    ("betas=1.0 must be 0 or more, and below 1", lambda: Adam(betas=(0.9, 1.0))),
    ("betas=(0.9,) must be two numbers", lambda: Adam(betas=(0.9,))),
    ("betas=0.9 must be two numbers", lambda: Adam(betas=0.9)),
    ("Adam(weight_decay=-0.1) ", lambda: Adam(weight_decay=-0.1)),
    ("momentum=1.0 must be 0 or more", lambda: SGD(0.1, 1.0)),
    ("SGD(weight_decay=-0.1) ", lambda: SGD(0.1, weight_decay=-0.1)),
    ("SGD(weight_decay=nan) ", lambda: SGD(0.1, weight_decay=float("nan"))),
    ("outer_lr=nan ", lambda: maml(outer_lr=float("nan"))),
    ("chunk_size=0 ", lambda: learner(chunk_size=0)),
    ("unknown precision 'fp16'; ", lambda: learner(precision="fp16")),
    ("Linear has no", lambda: learner(module=nn.Linear(4, 3).requires_grad_(False))),
    ("'heads.*' matches no parameter; the names are 0.weight", lambda: learner(only("heads.*"))),
    ("'tail' matches no", lambda: learner(maml(adapted=AdaptedParameters(exclude=("tail",))))),
    (
        "exclude=('*',), fixed_start=()) leaves",
        lambda: learner(maml(adapted=AdaptedParameters(exclude=("*",)))),
    ),
    ("give a tuple of patterns, ('head.*',)", lambda: AdaptedParameters("head.*")),
    ("exclude='0.bias' is a string", lambda: AdaptedParameters(exclude="0.bias")),
    ("num_tasks=1 ", lambda: learner().evaluate(CASE.batch(), 1)),
    ("num_tasks=0 ", lambda: learner().predict(CASE.batch(), 0)),
    ("num_steps=-2 ", lambda: learner().evaluate(CASE.batch(), 3, num_steps=-2)),
    ("num_steps=-3 ", lambda: learner().adapt(torch.ones(2, 4), torch.ones(2), num_steps=-3)),
    ("3 tasks from 2 on were asked of a batch of 3", lambda: CASE.batch(3).batch(2, 3)),
    ("2 tasks from -1 on were asked of a batch of 3", lambda: CASE.batch(3).batch(-1, 2)),
    ("-2 tasks from 0 on were asked of a batch of 3", lambda: CASE.batch(3).batch(0, -2)),
    ("4 tasks from 0 on were asked of a batch of 3", lambda: learner().evaluate(CASE.batch(3), 4)),
    ("x_support (5, 4) and y_support (5,)", lambda: batch_of((5, 4), (5,), (5, 4), (5,))),
    ("x_query (2, 6) and y_query (2, 5)", lambda: batch_of((2, 3), (2, 3), (2, 6), (2, 5))),
    ("x_support holds 2 tasks and x_query 3", lambda: batch_of((2, 3), (2, 3), (3, 3), (3, 3))),
    ("x_support (0, 3) holds 0 tasks", lambda: batch_of((0, 3), (0, 3), (0, 3), (0, 3))),
    ("x_query (2, 0) holds 2 tasks of 0", lambda: batch_of((2, 3), (2, 3), (2, 0), (2, 0))),
    ("y_support is a ndarray; ", lambda: learner().adapt(torch.ones(2, 4), np.ones(2))),
    ("the loss returned shape (6,)", lambda: learner(loss=LOSSES).meta_gradient(CASE.batch())),
    ("the loss returned dict for", lambda: learner(loss=lambda *_: {}).meta_gradient(CASE.batch())),
    ("loss=MSELoss must be a function", lambda: learner(loss=nn.MSELoss)),
    ("metric=accuracy must be a function", lambda: learner(metric="accuracy")),
    ("the support loss reads `0.weight` past", penalised),
    (
        "the support loss reads `temperature` of Tempered past",
        lambda: called(CASE.build(), loss=Tempered()),
    ),
    (
        "buffer `seen` of Growing went from shape (1,)",
        lambda: learner(module=Growing()).step(CASE.batch()),
    ),
    ("1e-8 is 0 in float16", lambda: learner(module=nn.Linear(4, 3, dtype=torch.half))),
    ("Adam's 1e-8", lambda: learner(auto(), module=nn.Linear(4, 3, dtype=torch.half))),
    ("algorithm=<function maml", lambda: MetaLearner(CASE.build(), maml, CASE.loss)),
    ("gave the query weights (1.0,) at epoch 1", later(query_weights=Later((0, 0, 1), (1.0,)))),
    ("gave the derivative order 3 at epoch 1", later(derivative_order=Later(2, 3))),
    ("gave the factor nan on the outer rate at", later(outer_schedule=Later(1.0, float("nan")))),
    ("pattern '1.*' names what PerStepAffine", norms_alone),
    ("count=3) gave 2 tasks", lambda: learner().evaluate(Source(CASE.batch(2)), 3)),
    ("count=3) gave tuple", lambda: learner().predict(Source((1, 2)), 3)),
    (
        "gave 2 tasks",
        lambda: learner().evaluate_ensemble([learner().state_tensors()], Source(CASE.batch(2)), 3),
    ),
    ("are of several sizes", lambda: learner(chunk_size=1).predict(Source(), 3)),
    ("Recomputed has saved-tensor hooks", lambda: called(Recomputed(4, 3))),
    ("as those of torch.utils.checkpoint", lambda: called(Recomputed(4, 3), vectorize=False)),
    ("Deciding, or its loss or metric, cannot be vectorised", lambda: called(Deciding(4, 3))),
    ("Renormalised changes its parameter `table.weight`", lambda: called(Renormalised())),
    ("its parameter `table.weight`", lambda: called(Renormalised(), vectorize=False)),
    ("outputs (6,) do not give each of the targets (6,)", lambda: called(Flat(), loss=centred)),
    ("outputs (6, 1) do not give each of the targets (6,)", one_logit),
    ("Several returned a tuple", lambda: called(Several(4, 3))),
    ("`0.weight` of Sequential has no", lambda: learner(module=nn.Sequential(nn.LazyLinear(3)))),
    ("`weight` of Linear is complex", lambda: learner(module=nn.Linear(4, 3, dtype=torch.cdouble))),
    ("RecursiveScriptModule is scripted", lambda: learner(module=scripted())),
    ("Sequential is scripted", lambda: learner(module=nn.Sequential(scripted()))),
    ("pass its .module", lambda: learner(module=nn.DataParallel(CASE.build()))),
    ("`spare.weight`, `spare.bias` received", lambda: unused(maml(2))),
    ("`spare.weight`, `spare.bias` received", lambda: unused(fomaml(2))),
    ("`spare.bias` received", lambda: unused(only("spare.bias"))),
    ("`spare.bias` received", lambda: unused(only("spare.bias", fomaml))),
    (
        "`0.bias`",
        lambda: learner(module=nn.Linear(2, 2)).load_state_tensors(learner().state_tensors()),
    ),
]


@pytest.mark.parametrize(("quoted", "mistake"), MISTAKES, ids=[quoted for quoted, _ in MISTAKES])
def test_message_is_one_line_that_quotes_the_mistake(quoted, mistake):
    with pytest.raises(InputError, match=re.escape(quoted)) as caught:
        mistake()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_other_errors_of_a_module_come_through(vectorize):
    with pytest.raises(RuntimeError, match=r"7\b"):
        learner(vectorize=vectorize).meta_gradient(Case(CASE.build, (7,)).batch())


def to_the_bit(learner: MetaLearner) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in learner.state_tensors().items()}


def huge(batch: TaskBatch, which: str, task: int) -> TaskBatch:
    getattr(batch, which)[task] = 1e200
    return batch


def squares(outputs, targets):
    return (outputs - targets[:, None]).square().mean()


@pytest.mark.parametrize("chunk_size", [1, 8])
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("x_support", "the support loss of task 1 at step 0 is inf"),
        ("x_query", "the query loss of task 1 after the inner steps is inf"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_step(which, message, chunk_size):
    learner_ = learner(module=nn.Linear(4, 3), loss=squares, chunk_size=chunk_size)
    learner_.step(CASE.batch())
    before = to_the_bit(learner_)
    with pytest.raises(FloatingPointError, match=message):
        learner_.step(huge(CASE.batch(), which, task=1))
    assert to_the_bit(learner_) == before


def test_the_step_at_which_a_task_diverges_is_named():
    diverging = learner(maml(3, inner_lr=1e200), nn.Linear(4, 3), squares)
    with pytest.raises(FloatingPointError, match="support loss of task 0 at step 1 is inf"):
        diverging.step(CASE.batch())


def test_the_norm_is_that_of_the_whole_gradient():
    gradient, metrics = learner().meta_gradient(CASE.batch())
    assert len(gradient) > 1
    expected = torch.cat([g.flatten() for g in gradient.values()]).norm()
    torch.testing.assert_close(metrics.gradient_norm, expected)


def test_a_gradient_that_is_not_finite_stops_the_step():
    def root(outputs, targets):
        return (0 * outputs).sum().sqrt()

    learner_ = learner(maml(num_steps=0), nn.Linear(4, 3), root)
    before = to_the_bit(learner_)
    with pytest.raises(FloatingPointError, match="norm of the meta-gradient is nan"):
        learner_.step(CASE.batch())
    assert to_the_bit(learner_) == before


def test_a_buffer_that_grows_is_refused_before_anything_changes():
    module = Growing()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(InputError, match="seen"):
        learner(module=module).step(CASE.batch())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_a_sparse_buffer_is_told_as_such():
    module = nn.Linear(2, 2)
    module.register_buffer("adjacency", torch.eye(2).to_sparse())
    with pytest.raises(InputError, match=r"buffer `adjacency` of Linear is sparse, .*register it"):
        MetaLearner(module, maml(1), nn.functional.mse_loss)


def test_what_is_no_module_or_no_loss_is_refused():
    with pytest.raises(InputError, match=r"the module is a function; pass an instance of torch.nn"):
        MetaLearner(lambda x: x, maml(1), nn.functional.mse_loss)
    with pytest.raises(InputError, match="loss=None must be a function of outputs and targets"):
        MetaLearner(nn.Linear(2, 2), maml(1), None)


def test_scores_of_complex_outputs_are_real():
    class Phases(nn.Linear):
        def forward(self, x):
            return torch.polar(torch.ones_like(y := super().forward(x)), y)

    def loss(outputs, targets):
        return (outputs - targets).abs().square().mean()

    batch = TaskBatch(*(torch.randn(2, 3, 2, dtype=torch.float64) for _ in range(4)))
    found = MetaLearner(Phases(2, 2).double(), maml(1), loss).evaluate(batch, 2)
    assert found.loss.dtype == torch.float64
    assert found.as_dict()["mean"] == pytest.approx(found.mean)


def test_an_error_that_vectorisation_may_have_made_says_how_to_find_out():
    class ToNumpy(nn.Linear):
        def forward(self, x):
            return super().forward(torch.from_numpy(x.numpy()))

    batch = TaskBatch(*(torch.randn(2, 3, 2) for _ in range(4)))
    with pytest.raises(RuntimeError) as error:
        MetaLearner(ToNumpy(2, 2), maml(1), nn.functional.mse_loss).meta_gradient(batch)
    assert any("pass vectorize=False" in note for note in error.value.__notes__)
