"""The written-out block against PyTorch's layers, over tasks and in both derivatives."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fewstep
from fewstep.core.norm import NormStatistics
from fewstep.core.normalise import Moments
from fewstep.core.query_weights import MultiStepLoss
from fewstep.models import Conv4, conv, fast_block
from fewstep.models.form import Form

pytestmark = pytest.mark.usefixtures("float64")

TASKS, CHANNELS, FILTERS = 3, 2, 6  # `sizes` has others
FORMS = [
    Form(stride, pool, slope, 1e-5, examples)
    for stride, pool in ((1, True), (2, False))
    for slope, examples in ((0.0, None), (0.01, None), (0.01, 2))
]


@pytest.fixture(params=[(2, 3), (2, 16), (16, 32)], ids=["PyTorch's", "pooled", "Winograd"])
def sizes(request, monkeypatch):
    """Channels and filters for which PyTorch's operations or compiled kernels do the work."""
    channels, filters = request.param
    monkeypatch.setitem(globals(), "CHANNELS", channels)
    monkeypatch.setitem(globals(), "FILTERS", filters)


def layers(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, form: Form,
    given: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    y = F.conv2d(x, weight, stride=form.stride, padding=1)
    if form.examples is None and given is None:
        y = F.batch_norm(y, None, None, gamma, beta, training=True, eps=form.eps)
    else:
        first = y[: form.examples]
        mean, var = given or (first.mean((0, 2, 3)), first.var((0, 2, 3), correction=0))
        wide = (-1, 1, 1)
        y = (y - mean.view(wide)) * (gamma / (var + form.eps).sqrt()).view(wide) + beta.view(wide)
    z = F.leaky_relu(y, form.slope)
    return F.max_pool2d(z, 2) if form.pool else z


def block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, form: Form,
    given: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    return fast_block.block(x, weight, gamma, beta, form, given and Moments(*given)).z


def with_data(function, x: Tensor):
    """The function of the other inputs alone: x is data, and few channels have their own way."""
    return lambda *inputs: function(x.detach(), *inputs)


def arguments(tasks: int | None = TASKS, x: tuple[int, ...] = (5, 6, 7)) -> list[Tensor]:
    lead, (examples, *size) = () if tasks is None else (tasks,), x
    shapes = ((examples, CHANNELS, *size), (FILTERS, CHANNELS, 3, 3), (FILTERS,), (FILTERS,))
    return [torch.randn(*lead, *shape, requires_grad=True) for shape in shapes]


def derivatives(function, inputs: list[Tensor]) -> list[Tensor]:
    """Values, gradients, and gradients along a direction of the gradients, of all inputs."""
    generator = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    out = function(*inputs)
    first = torch.autograd.grad((like(out) * out**2).sum(), inputs, create_graph=True)
    along = sum((g * like(g)).sum() for g in first)
    return [out.detach(), *(g.detach() for g in first), *torch.autograd.grad(along, inputs)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-10) -> None:
    scale = max(float(t.detach().abs().max()) for t in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-2 * tolerance * scale)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0, 0), (0, 0, None, 0), (0, None, None, None), (None, 0, 0, None)]
)
def test_tasks_get_what_the_layers_give_each(form, in_dims):
    inputs = [
        given if dim == 0 else shared
        for dim, given, shared in zip(in_dims, arguments(), arguments(None), strict=True)
    ]
    results = [
        derivatives(torch.vmap(lambda *a, f=f: f(*a, form), in_dims), inputs)
        for f in (block, layers)
    ]
    assert_equal(*results)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("form", FORMS)
def test_derivatives_against_differences(form):
    fast = FILTERS > 3  # along random directions; else by each element, of fewer
    inputs = arguments(None) if fast else arguments(None, (3, 4, 5))
    assert torch.autograd.gradcheck(lambda *a: block(*a, form), inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda *a: block(*a, form), inputs, fast_mode=fast)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, 0, None, 0), (None, 0, 0, None)])
def test_tasks_with_data_get_what_the_layers_give_each(form, in_dims):
    x, *inputs = [
        given if dim == 0 else shared
        for dim, given, shared in zip(in_dims, arguments(), arguments(None), strict=True)
    ]
    results = [
        derivatives(with_data(torch.vmap(lambda *a, f=f: f(*a, form), in_dims), x), inputs)
        for f in (block, layers)
    ]
    assert_equal(*results)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("form", FORMS)
def test_derivatives_with_data_against_differences(form):
    fast = FILTERS > 3  # along random directions; else by each element, of fewer
    x, *inputs = arguments(None) if fast else arguments(None, (3, 4, 5))
    function = with_data(lambda *a: block(*a, form), x)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_data", [False, True])
@pytest.mark.parametrize("dim_of_given", [0, None])
def test_given_statistics_take_no_part_in_the_derivatives(form, is_data, dim_of_given):
    x, *inputs = arguments()
    shape = (TASKS, FILTERS) if dim_of_given == 0 else (FILTERS,)
    mean, var = torch.randn(shape), torch.rand(shape) + 0.5
    results = []
    for f in (block, layers):

        def of_task(x, weight, gamma, beta, mean, var, f=f):
            return f(x, weight, gamma, beta, form, (mean, var))

        tasks = torch.vmap(of_task, (0, 0, 0, 0, dim_of_given, dim_of_given))
        function = lambda *a, tasks=tasks: tasks(*a, mean, var)  # noqa: E731
        own = with_data(function, x) if is_data else function
        results.append(derivatives(own, inputs if is_data else [x, *inputs]))
    assert_equal(*results)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]])
@pytest.mark.parametrize("is_data", [False, True])
def test_moments_are_of_the_examples_asked_for(form, is_data):
    x, weight, gamma, beta = arguments(None)
    x = x.detach() if is_data else x
    y = F.conv2d(x, weight, stride=form.stride, padding=1)
    given = Moments(torch.randn(FILTERS), torch.rand(FILTERS))
    for examples, by in ((None, None), (2, None), (None, given)):
        out = fast_block.block(x, weight, gamma, beta, form._replace(examples=examples), by)
        wanted = y[:examples].mean((0, 2, 3)), y[:examples].var((0, 2, 3), correction=0)
        assert not any(m.requires_grad for m in out.moments)
        torch.testing.assert_close(tuple(out.moments), wanted)


@pytest.mark.parametrize(("channels", "by_patches"), [(1, True), (3, True), (4, False)])
def test_statistics_of_data_with_few_channels_come_from_its_patches(
    monkeypatch, channels, by_patches
):
    called = []
    real = fast_block._by_patches
    monkeypatch.setattr(fast_block, "_by_patches", lambda *a: called.append(a) or real(*a))
    x, (_, _, gamma, beta) = torch.rand(5, channels, 8, 8), arguments(None)
    weight = torch.randn(FILTERS, channels, 3, 3)
    fast_block.block(x, weight, gamma, beta, FORMS[0])
    assert bool(called) == by_patches
    called.clear()
    fast_block.block(x.requires_grad_(), weight, gamma, beta, FORMS[0])
    assert not called


@pytest.mark.usefixtures("sizes")
def test_inputs_stay_as_they_are():
    inputs = arguments()
    before = [t.detach().clone() for t in inputs]
    derivatives(torch.vmap(lambda *a: block(*a, FORMS[0])), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("is_data", [False, True])
def test_a_third_derivative_is_refused(is_data):
    for wrt in arguments(None)[is_data:]:
        inputs = [wrt if t.shape == wrt.shape else t for t in arguments(None)]
        inputs[0] = inputs[0].detach() if is_data else inputs[0]
        out = block(*inputs, FORMS[0])
        for _ in range(2):
            (out,) = torch.autograd.grad((out**3).sum(), wrt, create_graph=True)
        with pytest.raises(RuntimeError, match="a third was asked for"):
            torch.autograd.grad(out.sum(), wrt)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch.func.jvp
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: f(x).pow(2).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).pow(2).sum()))(x[None])[0],
    ],
    ids=["grad", "jvp", "vmap of grad"],
)
def test_other_transforms_take_the_layers(transform):
    x, network = torch.rand(4, 1, 16, 16), Conv4(1, 3, 16, filters=4)
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())

    def call(x: Tensor) -> Tensor:
        nothing = 0 * x.detach().sum()  # makes each buffer one of this transform, to be written to
        own = {n: b + nothing.to(b.dtype) for n, b in buffers.items()}
        return torch.func.functional_call(network, parameters | own, (x,))

    got = transform(call, x)
    if got.shape == x.shape:
        (wanted,) = torch.autograd.grad(network(x.requires_grad_()).pow(2).sum(), x)
    else:
        wanted = ((network(x + 1e-6) - network(x - 1e-6)) / 2e-6).detach()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("use", ["batch", "support", "running"])
def test_a_meta_gradient_takes_the_fast_block_throughout(monkeypatch, vectorize, use):
    shapes = []

    def counted(x: Tensor, *rest: object) -> fast_block.Block:
        shapes.append(x.shape)
        return real(x, *rest)

    real = fast_block.block
    monkeypatch.setattr(fast_block, "block", counted)
    network = Conv4(1, 3, 16, filters=4)
    for name, running in network.named_buffers():
        if "var" in name:
            running.uniform_(0.5, 2)
    x, y = torch.rand(2, 2, 3, 1, 16, 16), torch.arange(3).expand(2, 3)
    batch = fewstep.TaskBatch(x[0], y, x[1], y)
    algorithm = replace(fewstep.maml(5, 0.1), norm_statistics=NormStatistics(use, per_step=True))
    learner = fewstep.MetaLearner(network, algorithm, F.cross_entropy, vectorize=vectorize)
    before = {n: t.clone() for n, t in learner.state_tensors().items()}

    def everything() -> list[Tensor]:
        learner.load_state_tensors(before)
        gradient, _ = learner.meta_gradient(batch)
        outputs = learner.predict(batch, 2)
        learner.step(batch)
        return [*gradient.values(), outputs, *(b.clone() for b in learner.buffers.values())]

    fast = everything()
    calls = 4 * ((5 + 1) + (5 + 6) + (5 + 1)) * (1 if vectorize else 2)
    assert len(shapes) == calls
    monkeypatch.setattr(conv, "one_vmap_at_most", lambda: False)
    assert_equal(fast, everything(), 1e-9)
    assert len(shapes) == calls


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}, {"replay": True}], ids=str)
def test_moments_of_data_are_taken_once_for_all_steps(monkeypatch, options):
    taken = []
    real = fast_block._data
    monkeypatch.setattr(fast_block, "_data", lambda x, *a: taken.append(x) or real(x, *a))
    algorithm = replace(fewstep.maml(5, 0.1), query_weights=MultiStepLoss())
    learner = fewstep.MetaLearner(Conv4(1, 3, 16, filters=4), algorithm, F.cross_entropy, **options)
    y = torch.arange(3).expand(2, 3)
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        x = torch.rand(2, 2, 3, 1, 16, 16)
        batch = fewstep.TaskBatch(x[0], y, x[1], y)
        fast, _ = learner.meta_gradient(batch)
        assert len(taken) == (0 if seed > 0 and "replay" in options else 2)
        taken.clear()
        learner.evaluate(batch, 2)
        assert len(taken) == (0 if seed > 1 and "replay" in options else 2)
        taken.clear()
        learner.adapt(x[0, 0], y[0])
        assert len(taken) == 1
        taken.clear()
        with monkeypatch.context() as patch:
            patch.setattr(conv, "one_vmap_at_most", lambda: False)
            layers = fewstep.MetaLearner(learner.module, algorithm, F.cross_entropy)
            slow, _ = layers.meta_gradient(batch)
        assert_equal(list(fast.values()), list(slow.values()), 1e-9)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("is_data", [False, True])
def test_float32_is_as_exact_as_the_layers(is_data):
    form, errors = FORMS[0], {}
    inputs = [t.detach() for t in arguments(None)]
    inputs[0] += 5  # a mean far above the spread

    def all_derivatives(function, inputs: list[Tensor]) -> list[Tensor]:
        own = [t.requires_grad_() for t in inputs[is_data:]]
        return derivatives(lambda *a: function(*inputs[:is_data], *a, form), own)

    exact = all_derivatives(layers, [t.clone() for t in inputs])
    for name, function in (("block", block), ("layers", layers)):
        rounded = all_derivatives(function, [t.float() for t in inputs])
        errors[name] = max(
            float((r.double() - e).norm() / e.norm()) for r, e in zip(rounded, exact, strict=True)
        )
    assert errors["block"] < 3 * errors["layers"]
