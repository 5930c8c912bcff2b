"""Layers of any convolutional module, all tasks at once, against PyTorch's own in a loop."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewstep
from fewstep import MetaLearner, maml
from fewstep.core.stand_ins.registry import StandIns
from fewstep.models import ConvBlock, kernels, layer_functions, layers
from fewstep.models.kernels import batch_norm as compiled
from fewstep.models.plain import batch_norm as plain
from tests.core.reference import Case, plain_meta_gradient, relative_error

pytestmark = pytest.mark.usefixtures("float64")

SIZE, CHANNELS, WAYS = 9, 16, 3
needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Scaled(nn.Module):
    """Batch norm whose scale and shift are views of one parameter."""

    def __init__(self, views, *shape: int) -> None:
        super().__init__()
        self.both = nn.Parameter(1 + 0.3 * torch.randn(shape))
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("var", torch.ones(CHANNELS))
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, *self.views(self.both), training=True)


def conv(*args, **options):
    return lambda: nn.Conv2d(CHANNELS, 8, *args, **options)


LAYERS = {
    "3x3": conv(3, padding=1),
    "3x3, 16 filters": lambda: nn.Conv2d(CHANNELS, 16, 3, padding=1, bias=False),
    "3x3, no padding": lambda: nn.Conv2d(CHANNELS, 16, 3),
    "3x3, stride": conv(3, stride=2, padding=1),
    "3x3, dilation": conv(3, dilation=2, padding=(2, 1)),
    "1x1": conv(1),
    "5x3": conv((5, 3), stride=(2, 1), padding=(0, 2)),
    "groups": conv(3, padding=1, groups=4),
    "same": conv(3, padding="same"),
    "circular": conv(3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 4, 3, stride=2),
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "batch norm, no affine": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "batch norm, not tracked": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "batch norm, scale a column": lambda: Scaled(lambda p: p.t(), CHANNELS, 2),
    "batch norm, scale expanded": lambda: Scaled(lambda p: p.expand(2, CHANNELS), 2, 1),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "group norm of one pixel": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, 16, 3), nn.AdaptiveAvgPool2d(1), nn.GroupNorm(4, 16)
    ),
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "layer norm": lambda: nn.LayerNorm((CHANNELS, SIZE, SIZE)),
    "max-pool": lambda: nn.MaxPool2d(2),
    "max-pool, overlapping": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "max-pool, dilated": lambda: nn.MaxPool2d(2, dilation=2),
    "max-pool, ceil": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "max-pool, 2x1": lambda: nn.MaxPool2d((2, 1)),
    "max-pool, where": lambda: Call(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "torch.max_pool2d": lambda: Call(lambda x: torch.max_pool2d(x, 2)),
    "mean": lambda: nn.AdaptiveAvgPool2d(1),
    "means": lambda: nn.AdaptiveAvgPool2d((2, 3)),
    "average": lambda: nn.AvgPool2d(2),
    "upsampled": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "reflected": lambda: nn.ReflectionPad2d(1),
    "viewed": lambda: Call(lambda x: x.view(len(x), -1)),
    "viewed in two": lambda: Call(lambda x: x.flatten(2).view(len(x), -1)),
    "viewed by a size": lambda: Call(lambda x: x.view(torch.Size((len(x), SIZE, -1)))),
    "viewed by size=": lambda: Call(lambda x: x.view(size=(len(x), SIZE, -1))),
    "viewed as another": lambda: Call(
        lambda x: x.view_as(torch.empty(len(x), SIZE, x[0, :, 0].numel()))
    ),
    "attention": lambda: Call(lambda x: F.scaled_dot_product_attention(*[x.flatten(2)] * 3)),
}


def network(build) -> nn.Module:
    """Return a network with a layer between a convolution and the head."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, CHANNELS, 3, padding=1)
    body = nn.Sequential(first, build(), nn.Tanh(), nn.Flatten())
    with torch.no_grad():
        features = body(torch.randn(2, 1, SIZE, SIZE)).shape[1]
    return nn.Sequential(*body, nn.Linear(features, WAYS))


def case_of(name: str) -> Case:
    return Case(lambda: network(LAYERS[name]), (1, SIZE, SIZE))


@pytest.mark.parametrize("name", LAYERS)
def test_meta_gradient(name):
    case, algorithm = case_of(name), fewstep.maml(2, 0.1)
    module, batch = case.build(), case.batch()
    expected, *_ = plain_meta_gradient(module, algorithm, case.loss, batch)
    for options in ({}, {"chunk_size": 1}, {"replay": True}):
        learner = fewstep.MetaLearner(module, algorithm, case.loss, **options)
        for _ in range(2):
            gradient, _ = learner.meta_gradient(batch)
            assert relative_error(gradient, expected) < 1e-9


@pytest.mark.parametrize("name", LAYERS)
def test_one_task_is_as_one_of_many(name):
    case, algorithm = case_of(name), fewstep.maml(2, 0.1)
    learner, batch = fewstep.MetaLearner(case.build(), algorithm, case.loss), case.batch()
    wanted = learner.predict(batch, 2)[1, -1]
    adapted = learner.adapt(batch.x_support[1], batch.y_support[1])
    torch.testing.assert_close(adapted(batch.x_query[1]), wanted)


@pytest.mark.parametrize("use", ["batch", "support", "running"])
def test_statistics_of_batch_norm(use):
    algorithm = replace(
        fewstep.maml_plus_plus(2, 0.1), norm_statistics=fewstep.NormStatistics(use, per_step=True)
    )
    case = case_of("batch norm")
    batch, states = case.batch(), []
    for vectorize in (True, False):
        learner = fewstep.MetaLearner(case.build(), algorithm, case.loss, vectorize=vectorize)
        learner.step(batch)
        learner.step(batch)
        states.append(learner.state_tensors() | {"loss": learner.evaluate(batch, 3).loss})
    for name, expected in states[1].items():
        torch.testing.assert_close(states[0][name], expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("3x3", layer_functions.Convolve),
        ("max-pool", layer_functions.MaxPool),
        ("batch norm", layer_functions.BatchNorm),
    ],
)
def test_they_stand_in(name, function, monkeypatch):
    """Within a meta-gradient: none falls back on PyTorch's in silence."""
    called = []
    monkeypatch.setattr(function, "apply", lambda *a: called.append(a) or function_apply(*a))
    function_apply = super(function, function).apply
    case = case_of(name)
    fewstep.MetaLearner(case.build(), fewstep.fomaml(2), case.loss).meta_gradient(case.batch())
    images = 2 if name == "3x3" else 1
    assert len(called) == 3 * images  # support twice, query once


def test_a_filter_of_no_task_is_left_to_pytorch(monkeypatch):
    """PyTorch sees the tasks as examples then, which is faster."""
    monkeypatch.setattr(layers, "_convolve", lambda tasks, *a: pytest.fail("it stands in"))
    module = Call(lambda x: F.conv2d(x, torch.ones(3, 2, 3, 3)).mean((2, 3)))
    x = torch.randn(4, 5, 2, 6, 6)
    with StandIns():
        found = torch.vmap(module)(x)
    torch.testing.assert_close(found, torch.stack([module(each) for each in x]))


def test_outside_of_tasks_they_are_pytorchs_own():
    module, x = network(LAYERS["batch norm"]), torch.randn(2, 1, SIZE, SIZE)
    expected = module(x)
    with StandIns():
        assert module(x).equal(expected)
        assert x.view(2, -1).data_ptr() == x.data_ptr()
        with pytest.raises(RuntimeError, match="view size"):
            x.mT.view(-1)


def test_one_value_has_no_variance():
    module = nn.Sequential(nn.Conv2d(1, 16, 1), nn.BatchNorm2d(16), nn.Flatten())
    one = fewstep.TaskBatch(*[torch.ones(2, 1, 1, 1, 1), torch.zeros(2, 1).long()] * 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fewstep.MetaLearner(module, fewstep.maml(1), F.cross_entropy).meta_gradient(one)


def test_their_arguments_have_pytorchs_names():
    x, w = torch.randn(3, 2, 4, 6, 6), torch.randn(3, 4, 4, 3, 3)

    def functions(x: Tensor, w: Tensor) -> Tensor:
        y = torch.conv2d(input=x, weight=w, bias=w[:, 0, 0, 0], stride=1, padding=1, dilation=1)
        y = F.max_pool2d(input=y, kernel_size=(2, 1), stride=None, padding=0, dilation=1)
        y = F.avg_pool2d(input=y, kernel_size=2, stride=1)
        y = F.group_norm(input=y, num_groups=2, eps=1e-3)
        one, none = w[0, :, 0, 0].exp(), w[0, :, 1, 0] * 0
        y = F.batch_norm(
            input=y, running_mean=none.clone(), running_var=one.clone(), weight=one, bias=none,
            training=True, momentum=0.1, eps=1e-3,
        )  # fmt: skip
        return F.adaptive_avg_pool2d(input=y, output_size=1)

    with StandIns():
        found = torch.vmap(functions)(x, w)
    torch.testing.assert_close(
        found, torch.stack([functions(*each) for each in zip(x, w, strict=True)])
    )


def test_a_convolution_of_any_order():
    """Its three functions are each other's derivatives, without an end."""
    space = layer_functions.Space((2, 1), (1, 0), (1, 1))
    x = torch.randn(2, 4, 5, 4, requires_grad=True)
    w = torch.randn(4, 2, 3, 3, requires_grad=True)

    def third(convolve) -> list[Tensor]:
        y = convolve(x, w)
        for i in range(3):
            found = torch.autograd.grad(y.sin().sum(), [x, w], create_graph=True)
            y = found[i % 2]
        return list(found)

    own = third(lambda x, w: layer_functions.Convolve.apply(x, w, space, 2))
    for a, b in zip(own, third(lambda x, w: F.conv2d(x, w, None, *space, 2)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_pool_twice_over():
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    window = (3, 2), (2, 2), (1, 0)

    def double(y: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
        return torch.autograd.grad(gradient.sin().sum(), [x])[0]

    own = double(layer_functions.MaxPool.apply(x, *window))
    torch.testing.assert_close(own, double(F.max_pool2d(x, *window)), rtol=1e-12, atol=1e-12)


def test_a_third_derivative_of_batch_norm_is_refused():
    y = torch.randn(4, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    of_channels = torch.ones(1, 16, 1, 1).requires_grad_(), torch.zeros(1, 16, 1, 1)
    z = layer_functions.BatchNorm.apply(y, *of_channels, None, None, 4, 1e-5)[0]
    (first,) = torch.autograd.grad(z.sin().sum(), [y], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), [y], create_graph=True)
    with pytest.raises(RuntimeError, match=r"a third was asked for; pass vectorize=False"):
        torch.autograd.grad(second.square().sum(), [y])


def images(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 16, 3, 5), (3, 48, 9, 9), (2, 544, 2, 1), (1, 16, 1, 2)])
@pytest.mark.parametrize("counted", [0, 1, None])
def test_batch_norm_kernels(dtype, shape, counted):
    """The same as PyTorch's operations: z, moments, first and second derivative."""
    y, g, h = (images(*shape, dtype=dtype) + 3 * i for i in range(3))
    of = (1, shape[1], 1, 1)
    gamma, beta, hgamma, hbeta = (torch.randn(of, dtype=dtype) for _ in range(4))
    moments = (torch.randn(of, dtype=dtype), torch.rand(of, dtype=dtype)) if counted == 0 else ()
    examples = shape[0] if counted is None else counted
    assert compiled.fits(y, gamma)
    results = []
    for by in (compiled, plain):
        z, mean, var, r = by.forward(y, gamma, beta, *(moments or (None, None)), examples, 1e-3)
        first = by.backward(g, y, gamma, mean, r, examples=examples)
        saved = g, y, gamma, mean, r, *first[1:]
        second = by.second(h, hgamma, hbeta, *saved, examples=examples)
        results.append([z, mean, var, r, *first, *second])
    for own, expected in zip(*results, strict=True):
        error = (own - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < (1e-4 if dtype == torch.float32 else 1e-11)


def test_the_mean_of_many_pixels_loses_no_digits():
    y = images(64, 16, 32, 32, dtype=torch.float32) + 1000
    one, none = torch.ones(1, 16, 1, 1, dtype=torch.float32), torch.zeros(1, 16, 1, 1)
    for by in (compiled, plain) if kernels.library() else (plain,):
        _, mean, var, _ = by.forward(y, one, none.float(), None, None, 64, 1e-5)
        exact = torch.var_mean(y.double(), (0, 2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(var.double(), exact[0], rtol=1e-4, atol=0)


def block_of(channels: int) -> nn.Module:
    options = {"norm": "batch", "downsample": "max-pool", "activation": "relu", "bias": False}
    return ConvBlock(channels, 16, SIZE, **options)


@pytest.mark.parametrize("given", [1, 8, 16, 17, 32, 48])
@pytest.mark.parametrize(
    ("build", "takes", "says"),
    [
        (lambda: nn.Conv2d(16, 16, 3, padding=1), 16, "to have"),
        (lambda: nn.Conv2d(32, 16, 3, padding=1, groups=2), 32, "to have"),
        (lambda: block_of(16), 16, "to have"),
        (lambda: block_of(3), 3, "to have"),
        (lambda: nn.BatchNorm2d(32), 32, "should contain"),
        (lambda: nn.BatchNorm2d(1), 1, "should contain"),
    ],
    ids=["conv", "groups", "block", "block of few", "batch norm", "batch norm of one"],
)
def test_other_numbers_of_channels_are_pytorchs_to_refuse(build, takes, says, given):
    """The kernels read by address: they would run past the end, or take others' numbers."""
    torch.manual_seed(0)
    # A 1x1 convolution, so that images have a gradient where they meet the layer.
    head = Call(lambda x: x.mean((2, 3)).repeat(1, WAYS))
    module = nn.Sequential(nn.Conv2d(2, given, 1), build(), head)
    batch = Case(lambda: module, (2, SIZE, SIZE)).batch()
    learner = fewstep.MetaLearner(module, fewstep.maml(2, 0.1), F.cross_entropy)
    for call in (
        lambda: module(batch.x_support[0]),
        lambda: learner.evaluate(batch, num_tasks=2, num_steps=0),
        lambda: learner.meta_gradient(batch),
    ):
        if given == takes:
            call()
        else:
            with pytest.raises(RuntimeError, match=says):
                call()


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_feature_map_may_be_the_filter(tasks):
    """One task, whose filters lie channels last, meets another path of PyTorch than several."""

    class Correlation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(1, WAYS)

        def forward(self, x):
            x = self.conv(x)
            return self.head(F.conv2d(x, x[:1]).flatten(1))

    case = Case(Correlation, (2, 6, 6))
    module, batch = case.build(), case.batch(tasks)
    found, _ = MetaLearner(module, maml(2, 0.01), F.cross_entropy).meta_gradient(batch)
    slow = MetaLearner(module, maml(2, 0.01), F.cross_entropy, vectorize=False)
    for name, wanted in slow.meta_gradient(batch)[0].items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)
