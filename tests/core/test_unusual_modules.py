"""Modules with habits of their own: what they hold, share, assign and freeze is respected."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import register_module_full_backward_hook
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep import InputError, MetaLearner, NormStatistics, TaskBatch, maml
from fewstep.core.stand_ins.weight_norm import weight_norm
from fewstep.models import Conv4
from fewstep.models.conv import ConvBlock
from tests.core.reference import plain_meta_gradient, relative_error

pytestmark = pytest.mark.usefixtures("float64")

IN, HIDDEN, OUT = 3, 4, 2
HOW = [{}, {"vectorize": False}, {"replay": True}]
every_way = pytest.mark.parametrize("options", HOW, ids=str)


def batch_of(tasks: int = 3, shape: tuple[int, ...] = (IN,)) -> TaskBatch:
    x, y = torch.randn(2, tasks, 5, *shape), torch.randn(2, tasks, 5, OUT)
    return TaskBatch(x[0], y[0], x[1], y[1])


def learner_of(module: nn.Module, **options) -> MetaLearner:
    return MetaLearner(module, maml(2, 0.1), F.mse_loss, **options)


class With(nn.Module):
    """A linear layer, a buffer, and a function of both to be called beside it."""

    def __init__(self, function, buffer: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.register_buffer("buffer", buffer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.function(self, x)
        return self.layer(x)


def twice(part: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(IN, HIDDEN), part, nn.Tanh(), part, nn.Linear(HIDDEN, OUT))


@every_way
@pytest.mark.parametrize(
    "part", [lambda: nn.Linear(HIDDEN, HIDDEN), lambda: nn.BatchNorm1d(HIDDEN)]
)
def test_a_part_under_two_names(part, options):
    module, batch = twice(part()), batch_of()
    learner, before = learner_of(module, **options), list(module.parameters())
    expected, *_ = plain_meta_gradient(copy.deepcopy(module), maml(2, 0.1), F.mse_loss, batch)
    for _ in range(2):
        gradient, _ = learner.meta_gradient(batch)
        assert relative_error(gradient, expected) < 1e-9
    assert all(a is b and a.is_leaf for a, b in zip(before, module.parameters(), strict=True))
    learner.step(batch)
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    found = learner.predict(batch, 1)[0, -1]
    torch.testing.assert_close(adapted(batch.x_query[0]), found, rtol=1e-12, atol=1e-12)


def add(module: nn.Module, x: Tensor) -> None:
    module.buffer.add_(x.mean(0).detach())


def assign(module: nn.Module, x: Tensor) -> None:
    module.buffer = module.buffer + x.mean(0).detach()


def add_to_data(module: nn.Module, x: Tensor) -> None:
    module.buffer.data += x.mean(0).data


def assign_data(module: nn.Module, x: Tensor) -> None:
    module.buffer.data = module.buffer + x.mean(0).detach()


@every_way
def test_assigned_buffers_are_kept_like_those_changed_in_place(options):
    batch, found = batch_of(), []
    for change in (add, assign, add_to_data, assign_data):
        module = With(change, torch.zeros(IN))
        learner_of(module, **options).step(batch)
        found.append(module.buffer)
    total = 2 * batch.x_support.mean((0, 1)) + batch.x_query.mean((0, 1))
    for buffer in found:
        torch.testing.assert_close(buffer, total)


@pytest.mark.parametrize("value", [torch.finfo(torch.float64).min, 0.1, 1 / 3, float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_buffers_stay_to_the_bit(value, dtype):
    constant = torch.full((3,), value).to(dtype)
    module = With(lambda module, x: None, constant.clone())
    learner = learner_of(module)
    for _ in range(3):
        learner.step(batch_of(tasks=7))
    assert torch.equal(module.buffer, constant)


def add_mean(module: nn.Module, x: Tensor) -> None:
    module.buffer.add_(x.mean().detach())


def test_complex_buffers_are_averaged_too():
    module = With(
        lambda m, x: m.buffer.add_(x.mean().detach()), torch.zeros((), dtype=torch.cdouble)
    )
    batch = batch_of()
    learner_of(module).step(batch)
    total = 2 * batch.x_support.mean() + batch.x_query.mean()
    torch.testing.assert_close(module.buffer.real, total)


def test_an_expanded_buffer_is_refused():
    with pytest.raises(InputError, match=r"`buffer` of With is expanded.*\.clone\(\)"):
        learner_of(With(add, torch.ones(1).expand(3)))


@pytest.mark.parametrize("replay", [False, True])
def test_another_type_after_the_learner_was_made(replay):
    module = With(add, torch.zeros(IN)).float()
    learner = learner_of(module, replay=replay)
    batch = batch_of()
    learner.meta_gradient(TaskBatch(*(t.float() for t in batch.tensors())))
    before = module.double().buffer.clone()
    learner.step(batch)
    learner.evaluate(batch, 3)
    total = 2 * batch.x_support.mean((0, 1)) + batch.x_query.mean((0, 1))
    torch.testing.assert_close(module.buffer, before + total)
    assert learner.buffers["buffer"] is module.buffer


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def test_a_recording_does_not_outlive_a_buffer_that_is_replaced():
    module, batch = Scaled(), batch_of()
    learners = [learner_of(module, replay=replay) for replay in (True, False)]
    for value in (1.0, 2.0):
        module.scale = torch.tensor(value)
        gradients = [learner.meta_gradient(batch)[0] for learner in learners]
        outputs = [learner.predict(batch, 3) for learner in learners]
        assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
        assert torch.equal(*outputs)


def test_a_recording_does_not_outlive_a_buffer_of_a_loss():
    y = torch.randint(OUT, (2, 3, 5))
    x = torch.randn(2, 3, 5, IN)
    batch, module = TaskBatch(x[0], y[0], x[1], y[1]), nn.Linear(IN, OUT)
    loss = nn.CrossEntropyLoss(weight=torch.ones(OUT))
    learners = [MetaLearner(module, maml(2), loss, replay=replay) for replay in (True, False)]
    for value in (1.0, 2.0):
        loss.weight = torch.tensor([1.0, value])
        gradients = [learner.meta_gradient(batch)[0] for learner in learners]
        losses = [learner.evaluate(batch, 3).loss for learner in learners]
        assert relative_error(*gradients) < 1e-12
        assert torch.allclose(*losses)


@pytest.mark.parametrize("was", [True, False])
def test_freezing_afterwards_is_refused(was):
    module = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT))
    module[0].weight.requires_grad_(was)
    learner = learner_of(module)
    learner.step(batch_of())
    module[0].weight.requires_grad_(not was)
    with pytest.raises(InputError, match=r"`0\.weight` was (un)?frozen after"):
        learner.step(batch_of())


def assigned(module: nn.Sequential) -> None:
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)


def exchanged(module: nn.Sequential) -> None:
    module[1] = nn.Linear(HIDDEN, OUT)


def untied(module: nn.Sequential) -> None:
    del module[1]


def extended(module: nn.Sequential) -> None:
    module.append(nn.Linear(OUT, OUT))


USES = {
    "step": lambda learner, batch: learner.step(batch),
    "meta_gradient": lambda learner, batch: learner.meta_gradient(batch),
    "evaluate": lambda learner, batch: learner.evaluate(batch, 3),
    "predict": lambda learner, batch: learner.predict(batch, 3),
    "adapt": lambda learner, batch: learner.adapt(batch.x_support[0], batch.y_support[0]),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


@every_use
@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        (assigned, r"`0\.weight` was replaced"),
        (exchanged, r"`1\.weight` was replaced"),
        (untied, r"`1\.weight` was removed"),
        (extended, r"`2\.weight` was added"),
    ],
)
def test_other_parameters_afterwards_are_refused(change, quoted, use):
    module = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT))
    learner = learner_of(module)
    change(module)
    with pytest.raises(InputError, match=quoted):
        use(learner, batch_of())


def test_module_and_algorithm_are_not_exchanged_by_half():
    learner = learner_of(nn.Linear(IN, OUT))
    for name in ("module", "algorithm"):
        with pytest.raises(AttributeError):
            setattr(learner, name, getattr(learner_of(nn.Linear(IN, OUT)), name))


def test_values_may_change_in_place_afterwards():
    module, batch = nn.Linear(IN, OUT), batch_of()
    learner, other = learner_of(module), nn.Linear(IN, OUT)
    module.load_state_dict(other.state_dict())
    found, wanted = (each.meta_gradient(batch)[0] for each in (learner, learner_of(other)))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_are_refused(register, vectorize):
    learner = learner_of(nn.Linear(IN, OUT), vectorize=vectorize)
    hook = getattr(learner.module.weight, register)(lambda t: None)
    with pytest.raises(InputError, match=r"`weight` has a hook on its gradient"):
        learner.step(batch_of())
    hook.remove()
    seen = []
    learner.optimiser.register_step_pre_hook(lambda *_: seen.append(learner.module.weight.grad))
    learner.step(batch_of())
    assert seen[0] is not None


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_backward_hooks_are_called_or_refused(register):
    """One that triples a gradient, by hand and in a loop over the tasks; vmap would not call it."""
    batch = batch_of()
    module = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))
    without = learner_of(module).meta_gradient(batch)[0]
    getattr(module[1], register)(lambda part, *of: (of[0][0] * 3,))
    with pytest.raises(InputError, match=r"Sequential has a backward hook.* vectorize=False"):
        learner_of(module).meta_gradient(batch)
    found = learner_of(module, vectorize=False).meta_gradient(batch)[0]
    assert (
        relative_error(found, plain_meta_gradient(module, maml(2, 0.1), F.mse_loss, batch)[0])
        < 1e-12
    )
    assert relative_error(found, without) > 0.1


class Padded(nn.Module):
    def __init__(self, padding_idx: int) -> None:
        super().__init__()
        self.table = nn.Embedding(6, HIDDEN)
        self.padding_idx = padding_idx
        self.head = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.embedding(x, self.table.weight, self.padding_idx).mean(1))


@every_way
@pytest.mark.parametrize("padding_idx", [0, 2, -1])
def test_the_padding_of_an_embedding_is_left_alone(padding_idx, options):
    module, y = Padded(padding_idx), torch.randn(2, 3, 5, OUT)
    x = torch.randint(0, 6, (2, 3, 5, 7))
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    expected, *_ = plain_meta_gradient(module, maml(2, 0.5), F.mse_loss, batch)
    learner = MetaLearner(module, maml(2, 0.5), F.mse_loss, **options)
    for _ in range(2):
        gradient, _ = learner.meta_gradient(batch)
        assert relative_error(gradient, expected) < 1e-9
        assert not gradient["table.weight"][padding_idx].any()


class Kept(nn.Module):
    """Keeps activations, as hooks that look at features do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.seen = {"all": [], "last": None}

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.seen["all"].append((y,))
        self.seen["last"] = y
        return y


def test_kept_activations_are_left_behind():
    learner, batch = learner_of(Kept()), batch_of()
    learner.step(batch)
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    found = learner.predict(batch, 1)[0, -1]
    torch.testing.assert_close(adapted(batch.x_query[0]), found)


class OwnNoise(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * torch.rand(x.shape, generator=self.generator))


def test_checkpoints_draw_again_what_a_generator_of_the_module_drew():
    torch.manual_seed(0)
    module, batch, found = OwnNoise(), batch_of(), []
    for checkpoint_every in (None, 1):
        module.generator.manual_seed(3)
        learner = MetaLearner(
            module, maml(3, 0.1), F.mse_loss, vectorize=False, checkpoint_every=checkpoint_every
        )
        found.append(learner.meta_gradient(batch)[0])
    assert relative_error(found[1], found[0]) < 1e-12


class OfFixedSeed(nn.Module):
    """Projects its inputs by numbers that are drawn in each call, the same each time."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, OUT)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.draw())


def of_a_generator() -> Tensor:
    return torch.randn(IN, HIDDEN, generator=torch.Generator().manual_seed(0))


def in_place() -> Tensor:
    return torch.empty(IN, HIDDEN).normal_(generator=torch.Generator().manual_seed(0))


def as_initialised() -> Tensor:
    return nn.init.orthogonal_(torch.empty(IN, HIDDEN), 1, torch.Generator().manual_seed(0))


def permuted() -> Tensor:
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0))
    return torch.eye(IN, HIDDEN)[:, order]


def seeded() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randn(IN, HIDDEN)


def dropped() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return F.dropout(torch.ones(IN, HIDDEN))


@pytest.mark.parametrize("options", [*HOW, {"vectorize": False, "replay": True}], ids=str)
@pytest.mark.parametrize(
    "draw", [of_a_generator, in_place, as_initialised, permuted, seeded, dropped]
)
def test_numbers_of_a_fixed_seed_are_the_same_for_each_task_or_refused(draw, options):
    """Under vmap each task would draw its own, in a recording each call."""
    torch.manual_seed(1)
    module, batch = OfFixedSeed(draw), batch_of()
    learner = learner_of(module, **options)
    if options != {"vectorize": False}:
        with pytest.raises(
            InputError, match=r"draws from a seed .* register a buffer, .* replay=False"
        ):
            learner.meta_gradient(batch)
        return
    expected, *_ = plain_meta_gradient(module, maml(2, 0.1), F.mse_loss, batch)
    gradient, _ = learner.meta_gradient(batch)
    assert relative_error(gradient, expected) < 1e-12
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    torch.testing.assert_close(adapted(batch.x_query[0]), learner.predict(batch, 1)[0, -1])


class NoisyLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs + torch.randn(y.shape, generator=self.generator), y)


@every_way
def test_a_generator_that_is_kept_is_drawn_from(options):
    learner = MetaLearner(OwnNoise(), maml(2, 0.1), NoisyLoss(), **options)
    found = [learner.step(batch_of()).loss for _ in range(2)]
    assert found[0] != found[1]


class OverTime(nn.Module):
    """Folds time into the batch, before or behind the examples."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(IN, OUT), nn.BatchNorm1d(OUT)
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.time_first else x
        y = self.norm(self.layer(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return y.mean(0 if self.time_first else 1)


@pytest.mark.parametrize("time_first", [True, False])
def test_no_support_statistics_where_rows_are_no_examples(time_first):
    algorithm = replace(maml(1, 0.1), norm_statistics=NormStatistics("support"))
    learner = MetaLearner(OverTime(time_first), algorithm, F.mse_loss)
    with pytest.raises(InputError, match="cannot tell the support set in the 40 rows"):
        learner.step(batch_of(shape=(4, IN)))


@pytest.mark.parametrize("use", ["batch", "support", "running"])
def test_an_adapted_instance_norm_is_that_of_training(use):
    algorithm = replace(maml(2, 0.1), norm_statistics=NormStatistics(use))
    module = nn.Sequential(
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(8, OUT)
    )
    learner, batch = MetaLearner(module, algorithm, F.mse_loss), batch_of(shape=(2, 4))
    learner.step(batch)
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    found = learner.predict(batch, 1)[0, -1]
    torch.testing.assert_close(adapted(batch.x_query[0]), found)


def test_inference_mode_is_refused_and_no_grad_is_not():
    module, batch = nn.Linear(IN, OUT), batch_of()
    with torch.inference_mode(), pytest.raises(InputError, match=r"inference_mode.*leave it out"):
        learner_of(module).evaluate(batch, 3)
    with torch.no_grad():
        learner_of(module).step(batch)


@pytest.mark.parametrize("vectorize", [True, False])
def test_what_a_metric_may_return(vectorize):
    module, batch = nn.Linear(IN, OUT), batch_of()

    def measured(metric) -> float:
        learner = learner_of(module, metric=metric, vectorize=vectorize)
        return float(learner.meta_gradient(batch)[1].metric)

    assert measured(lambda out, y: (out == out).sum()) == 5 * OUT
    assert measured(lambda out, y: (out == out).all()) == 1
    with pytest.raises(InputError, match="metric returned float for one task"):
        measured(lambda out, y: 0.5)
    with pytest.raises(InputError, match=r"metric returned shape \(5,\) for one task"):
        measured(lambda out, y: (out - y).square().mean(1))


def test_steps_beyond_none_have_no_rate():
    algorithm = fewstep.Algorithm(0, fewstep.LayerStepRates(0.1), extra_steps="repeat")
    learner = MetaLearner(nn.Linear(IN, OUT), algorithm, F.mse_loss)
    with pytest.raises(InputError, match="num_steps=2 needs the rate of a step"):
        learner.evaluate(batch_of(), 3, num_steps=2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize(
    "algorithm", [maml(2, 0.1), fewstep.alpha_maml(), fewstep.auto()], ids=["maml", "alpha", "auto"]
)
@pytest.mark.parametrize("replay", [True, False])
def test_a_copy_of_a_learner_goes_on_alike(copied, algorithm, replay):
    learner = MetaLearner(nn.Linear(IN, OUT), algorithm, F.mse_loss, replay=replay)
    batch = batch_of()
    learner.step(batch)
    other = copied(learner)
    for _ in range(2):
        assert learner.step(batch).loss == other.step(batch).loss


class Following(nn.Module):
    """Its last inputs' mean is a part of what it returns, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.register_buffer("last", torch.zeros(IN))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x - self.last)
        self.last.copy_(x.detach().mean(0))
        return y


@every_way
@pytest.mark.parametrize("use", ["batch", "support"])
def test_scores_on_the_way_leave_nothing_behind(use, options):
    learner, batch = learner_of(Following(), **options), batch_of()
    every = learner.evaluate(batch, 3, statistics=use)
    last = learner.evaluate(batch, 3, statistics=use, every_step=False)
    assert torch.equal(every.loss[:, -1], last.loss[:, 0])


@pytest.mark.parametrize("fast", [True, False])
def test_a_mean_of_all_batches_counts_support_sets_alone(fast):
    """Under momentum=None the running mean is that of the batches seen, one at each of 4 points."""
    block = ConvBlock(
        IN, OUT, 4, norm="batch", downsample="max-pool", activation="relu", bias=False
    )
    module, norm = nn.Sequential(block, nn.AvgPool2d(2), nn.Flatten()), block.norm
    if not fast:
        block.norm = norm = nn.BatchNorm2d(OUT)
    norm.momentum = None
    algorithm = replace(maml(3, 0.0), norm_statistics=NormStatistics("support"))
    batch = batch_of(3, (IN, 4, 4))
    expected = block.conv(batch.x_support.flatten(0, 1)).mean((0, 2, 3))
    MetaLearner(module, algorithm, F.mse_loss, vectorize=fast).step(batch)
    assert norm.num_batches_tracked == 4
    assert torch.allclose(norm.running_mean, expected)


class Caching(nn.Module):
    """Makes what its forward pass needs when it is first called, and keeps it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.head = nn.Linear(IN, OUT)
        if kind == "buffer":
            self.register_buffer("scale", None)
        elif kind == "attribute":
            self.scale = None

    def forward(self, x):
        if getattr(self, "scale", None) is None:
            self.scale = 2 * x.new_ones(IN)
        return self.head(x * self.scale)


@pytest.mark.parametrize("kind", ["buffer", "attribute", "new attribute"])
def test_what_a_module_makes_when_it_is_called_is_not_of_one_task(kind):
    module, batch = Caching(kind), batch_of()
    learner = learner_of(module)
    learner.step(batch)
    assert getattr(module, "scale", None) is None
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    wanted = learner.predict(batch, 1)[0, -1]
    torch.testing.assert_close(adapted(batch.x_query[0]), wanted)
    assert torch.equal(copy.deepcopy(module)(batch.x_query[0]), module(batch.x_query[0]))


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh())
        self.head = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.layers, x, use_reentrant=False))


@every_way
def test_what_would_be_computed_anew_by_other_parameters_is_refused(options):
    """The backward pass comes when the module has its own parameters again."""
    for call in (
        lambda of: of.meta_gradient(batch_of()),
        lambda of: of.predict(batch_of(), 3),
        lambda of: of.adapt(batch_of().x_support[0], batch_of().y_support[0]),
    ):
        with pytest.raises(InputError, match=r"^Recomputed has saved-tensor hooks, .*_every=1"):
            call(learner_of(Recomputed(), **options))
    with torch.autograd.graph.save_on_cpu():  # of a caller, around all: nothing is computed anew
        learner_of(nn.Linear(IN, OUT), **options).meta_gradient(batch_of())


@every_way
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, old_weight_norm])
def test_weight_norm_has_its_second_derivative(wrap, options):
    """That of PyTorch's own leaves out the derivative of the norm, by which it divides."""

    class ByHand(nn.Linear):
        def __init__(self, of: nn.Linear) -> None:
            super().__init__(of.in_features, of.out_features)
            self.load_state_dict(of.state_dict())
            self.g = nn.Parameter(self.weight.detach().norm(dim=1, keepdim=True))

        def forward(self, x: Tensor) -> Tensor:
            v = self.weight
            return F.linear(x, self.g * v / v.norm(dim=1, keepdim=True), self.bias)

    layers, batch = [nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)], batch_of()
    by_hand = nn.Sequential(ByHand(layers[0]), nn.Tanh(), ByHand(layers[1]))
    module = nn.Sequential(wrap(layers[0]), nn.Tanh(), wrap(layers[1]))
    expected, _ = learner_of(by_hand, vectorize=False).meta_gradient(batch)
    gradient, _ = learner_of(module, **options).meta_gradient(batch)
    for number in "02":
        of_v = [n for n in gradient if n.startswith(number) and ("original1" in n or "_v" in n)]
        torch.testing.assert_close(gradient[of_v[0]], expected[f"{number}.weight"])


@every_way
def test_padding_of_a_table_of_ones_own(options):
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, HIDDEN))
            self.head = nn.Linear(HIDDEN, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.embedding(x, self.table, padding_idx=1).mean(1))

    x, y = torch.randint(6, (2, 3, 5, 4)), torch.randn(2, 3, 5, OUT)
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    module = Table()
    expected, *_ = plain_meta_gradient(copy.deepcopy(module), maml(2, 0.1), F.mse_loss, batch)
    gradient, _ = learner_of(module, **options).meta_gradient(batch)
    assert relative_error(gradient, expected) < 1e-12
    assert not gradient["table"][1].any()


@every_way
def test_a_module_may_ask_whether_derivatives_go_through(options):
    class Asking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return (2 * y if y.requires_grad else 3 * y) + (5 if x.requires_grad else 7)

    module, batch = Asking(IN, OUT), batch_of()
    expected, *_ = plain_meta_gradient(copy.deepcopy(module), maml(2, 0.1), F.mse_loss, batch)
    gradient, _ = learner_of(module, **options).meta_gradient(batch)
    assert relative_error(gradient, expected) < 1e-12


def test_hooks_that_vmap_does_not_call_are_refused():
    class Reversing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if y.requires_grad:
                y.register_hook(torch.neg)
            return y

    module, batch = Reversing(IN, OUT), batch_of()
    with pytest.raises(InputError, match=r"registers a hook on a tensor, .* pass vectorize=False"):
        learner_of(module).meta_gradient(batch)
    expected, *_ = plain_meta_gradient(copy.deepcopy(module), maml(2, 0.1), F.mse_loss, batch)
    gradient, _ = learner_of(module, vectorize=False).meta_gradient(batch)
    assert relative_error(gradient, expected) < 1e-12

    def seen(*_: object) -> None:
        pass

    handle = register_module_full_backward_hook(seen)
    try:
        with pytest.raises(InputError, match="has a backward hook, which"):
            learner_of(nn.Linear(IN, OUT)).meta_gradient(batch)
    finally:
        handle.remove()


class Cached(nn.Module):
    """Keeps angles for the length that it was called with, as rotary embeddings do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(IN, IN), nn.Linear(IN, OUT)
        self.register_buffer("rates", torch.rand(IN))
        self.kind, self.length = kind, None
        if kind == "attribute":
            self.angles = None
        elif kind == "unset buffer":
            self.register_buffer("angles", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.length != x.shape[1]:
            self.length = x.shape[1]
            angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), self.rates).cos()
            if self.kind == "new buffer":
                self.register_buffer("angles", angles, persistent=False)
            else:
                self.angles = angles
        return self.head((self.layer(x).tanh() * self.angles).mean(1))


@every_way
@pytest.mark.parametrize("kind", ["attribute", "unset buffer", "new buffer"])
def test_a_cache_goes_with_its_key(kind, options):
    module = Cached(kind)
    learner, names = learner_of(module, **options), set(module.state_dict())
    for tasks, length in ((3, 4), (2, 4), (2, 6)):
        batch = batch_of(tasks, (length, IN))
        fresh = Cached(kind)
        fresh.load_state_dict({n: t for n, t in module.state_dict().items() if n in names})
        expected, *_ = plain_meta_gradient(fresh, maml(2, 0.1), F.mse_loss, batch)
        gradient, _ = learner.meta_gradient(batch)
        assert relative_error(gradient, expected) < 1e-12
        assert module(batch.x_query[0]).shape == (5, OUT)  # the caller's own call


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_vectors_of_spectral_norm_stay_of_length_one(wrap):
    module = nn.Sequential(wrap(nn.Linear(IN, HIDDEN)), nn.Tanh(), nn.Linear(HIDDEN, OUT))
    learner = MetaLearner(module, maml(3, 1.0), F.mse_loss, vectorize=False)
    names = [n for n in learner.buffers if n.endswith(("_u", "_v"))]
    assert len(names) == 2
    before = {name: learner.buffers[name].clone() for name in names}
    for _ in range(4):
        learner.step(batch_of(6))
    for name in names:
        assert not torch.equal(learner.buffers[name], before[name])
        assert learner.buffers[name].norm().item() == pytest.approx(1)


@every_way
@pytest.mark.parametrize("recipe", [fewstep.fomaml, maml])
def test_a_module_that_writes_into_its_input_is_refused(recipe, options):
    class Halving(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.div_(2))

    learner, batch = (
        MetaLearner(Halving(IN, OUT), recipe(2, 0.1), F.mse_loss, **options),
        batch_of(),
    )
    before = [t.clone() for t in batch.tensors()]
    for use in USES.values():
        with pytest.raises(InputError, match=r"changes what it is given, .* in place of x.sub_"):
            use(learner, batch)
        assert all(torch.equal(t, old) for t, old in zip(batch.tensors(), before, strict=True))


class Projected(nn.Linear):
    """Projects its weight before it uses it."""

    def __init__(self, project) -> None:
        super().__init__(IN, OUT)
        self.project = project

    def forward(self, x: Tensor) -> Tensor:
        self.project(self)
        return super().forward(x)


@torch.no_grad()
def divided(layer: nn.Linear) -> None:
    layer.weight.div_(layer.weight.norm())


@torch.no_grad()
def renormed(layer: nn.Linear) -> None:
    layer.weight.copy_(torch.renorm(layer.weight, 2, 0, 0.1))


def copied_into_data(layer: nn.Linear) -> None:
    layer.weight.data.copy_(torch.renorm(layer.weight.data, 2, 0, 0.1))


def assigned_to_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.1)


def divided_in_data(layer: nn.Linear) -> None:
    layer.weight.data /= layer.weight.data.norm()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of torch.renorm
@every_way
@every_use
@pytest.mark.parametrize(
    "project", [divided, renormed, copied_into_data, assigned_to_data, divided_in_data]
)
def test_a_module_that_writes_into_its_parameters_is_refused(project, use, options):
    module = Projected(project)
    before, learner = module.weight.detach().clone(), learner_of(module, **options)
    with pytest.raises(
        InputError, match=r"^Projected changes (its parameter `weight`|a parameter)"
    ):
        use(learner, batch_of())
    assert torch.equal(module.weight, before)


@every_way
@pytest.mark.parametrize(("function", "is_kept"), [(F.hardtanh, False), (torch.tanh, True)])
def test_data_assigned_straight_through(function, is_kept, options):
    """PyTorch itself takes the new values for those that the derivative of tanh needs."""

    class Signs(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = function(super().forward(x))
            y.data = y.data.sign()
            return y

    module, batch = Signs(IN, OUT), batch_of()
    learner = learner_of(module, **options)
    if is_kept:
        with pytest.raises(InputError, match=r"changes in place, .* make a new tensor"):
            learner.meta_gradient(batch)
        return
    expected, *_ = plain_meta_gradient(copy.deepcopy(module), maml(2, 0.1), F.mse_loss, batch)
    gradient, _ = learner.meta_gradient(batch)
    assert relative_error(gradient, expected) < 1e-12


def test_a_batch_norm_called_twice_has_no_one_support_statistics():
    module, batch = twice(nn.BatchNorm1d(HIDDEN)), batch_of()
    learner = learner_of(module)
    for use in ("batch", "running"):
        adapted = learner.adapt(batch.x_support[0], batch.y_support[0], statistics=use)
        expected = learner.predict(batch, 1, statistics=use)[0, -1]
        torch.testing.assert_close(adapted(batch.x_query[0]), expected)
    with pytest.raises(InputError, match=r"^statistics='support' .* one is called twice"):
        learner.adapt(batch.x_support[0], batch.y_support[0], statistics="support")


@every_way
def test_a_tied_weight_is_adapted_by_any_of_its_names(options):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(IN, IN), nn.Linear(IN, IN)
            self.head.weight = self.body.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).tanh())[:, :OUT]

    learner = MetaLearner(Tied(), fewstep.anil(2, 0.1), F.mse_loss, **options)
    assert learner._meta.adapted == ("body.weight", "head.bias")
    exclude = replace(maml(2), adapted=fewstep.AdaptedParameters(exclude=("head.weight",)))
    learner = MetaLearner(Tied(), exclude, F.mse_loss, **options)
    assert learner._meta.adapted == ("body.bias", "head.bias")


class Exponential(torch.autograd.Function):
    """Has no second derivative, as its backward pass is no part of the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Exponential.apply(x)


@every_way
@pytest.mark.parametrize("part", [nn.Hardsigmoid, Once])
def test_what_has_no_second_derivative_is_told(part, options):
    """The first by PyTorch; the second it would leave out of the meta-gradient in silence."""
    module = nn.Sequential(nn.Linear(IN, HIDDEN), part(), nn.Linear(HIDDEN, OUT))
    batch, first_order = batch_of(), fewstep.fomaml(2, 0.1)
    with pytest.raises(InputError, match=r"has no second derivative .*FixedOrder\(1\)"):
        learner_of(module, **options).meta_gradient(batch)
    learner_of(module, **options).evaluate(batch, 3)
    gradient, _ = MetaLearner(module, first_order, F.mse_loss, **options).meta_gradient(batch)
    expected, *_ = plain_meta_gradient(module, first_order, F.mse_loss, batch)
    assert relative_error(gradient, expected) < 1e-12


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_sparse_gradients_or_that_writes_into_its_table_is_refused(kind):
    name = f"has {kind.__name__}"
    with pytest.raises(InputError, match=rf"{name}\(sparse=True\), .* sparse=False"):
        learner_of(nn.Sequential(kind(4, 3, sparse=True)))
    with pytest.raises(InputError, match=rf"{name}\(max_norm=0.5\), .* leave max_norm out"):
        learner_of(nn.Sequential(kind(4, 3, max_norm=0.5)))
    learner_of(nn.Sequential(kind(4, 3)))


def test_support_statistics_need_examples_of_one_shape():
    module = nn.Sequential(nn.Conv1d(IN, OUT, 1), nn.BatchNorm1d(OUT), nn.AdaptiveAvgPool1d(1))
    module.append(nn.Flatten())
    x, y = batch_of(2, (IN, 4)), batch_of(2, (IN, 6))
    batch = TaskBatch(x.x_support, x.y_support, y.x_query, y.y_query)
    learner = learner_of(module)
    assert learner.predict(batch, 2).isfinite().all()
    with pytest.raises(InputError, match=r"examples are \(3, 4\) of support sets, \(3, 6\) of que"):
        learner.predict(batch, 2, statistics="support")


@pytest.mark.parametrize("has_buffers", [True, False])
def test_blocks_without_running_statistics(has_buffers):
    block = Conv4(1, OUT, 16, filters=4).blocks[0]
    block.norm.track_running_stats = False
    if not has_buffers:
        block.norm.running_mean = block.norm.running_var = block.norm.num_batches_tracked = None
    module = nn.Sequential(block, nn.Flatten(), nn.Linear(256, OUT))
    plain = nn.Sequential(
        nn.Sequential(block.conv, block.norm, block.activation, block.pool), *list(module)[1:]
    )
    batch = batch_of(2, (1, 16, 16))
    found, expected = (learner_of(m).meta_gradient(batch)[0] for m in (module, plain))
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b)
    if has_buffers:
        learner_of(module).step(batch)
        assert not block.norm.running_mean.any()


def test_what_mixes_the_tasks_of_processes_is_refused(monkeypatch):
    module = nn.Sequential(nn.Linear(IN, OUT), nn.SyncBatchNorm(OUT))
    learner_of(module)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(InputError, match=r"has nn.SyncBatchNorm, which would mix the tasks"):
        learner_of(module)


@pytest.mark.parametrize("dim", [-2, -1, 0, 1])
def test_weight_norm_by_every_dimension(dim):
    v = torch.randn(3, 4, requires_grad=True)
    g = torch.rand_like(torch.norm_except_dim(v, 2, dim)).requires_grad_()
    torch.testing.assert_close(weight_norm(v, g, dim), torch._weight_norm(v, g, dim))
    assert torch.autograd.gradgradcheck(lambda v, g: weight_norm(v, g, dim), (v, g))
