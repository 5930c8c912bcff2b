"""The compiled kernels against PyTorch's operations, and what happens without them."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep.models import Conv4, kernels
from fewstep.models.block_functions import Affine, NormaliseAndPool
from fewstep.models.convolution import Space, convolve, gradients
from fewstep.models.form import Form
from fewstep.models.kernels import affine, moments, normalise, pooled, winograd
from fewstep.models.plain import moments as plain_moments

CAPABLE = (
    platform.system() == "Linux"
    and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    and any(map(shutil.which, ("c++", "g++", "clang++")))
)
POOLED = Form(stride=1, pool=True, slope=0.0, eps=1e-5)
SLOPED = Form(stride=1, pool=True, slope=0.01, eps=1e-3)
needs_kernels = pytest.mark.skipif(not CAPABLE, reason="no C++ compiler, or not x86-64 with AVX2")


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    """Within rounding of the type of `got`."""
    off = float((got.double() - wanted.detach()).norm() / wanted.detach().norm())
    assert off < {torch.float64: 1e-14, torch.float32: 3e-6}[got.dtype]


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@needs_kernels
def test_they_compile_here():
    assert kernels.library() is not None


@needs_kernels
def test_a_damaged_library_is_compiled_again(tmp_path, monkeypatch, recwarn):
    whole, compiled = Path(kernels.library()._name), []

    def compile_again(_, path):
        compiled.append(path)
        shutil.copy(whole, path)

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_compile", compile_again)
    path = tmp_path / whole.name
    path.touch()  # as a power cut may leave it
    for _ in range(2):
        assert kernels.library.__wrapped__() is not None
        assert compiled == [path]
    assert not recwarn


@needs_kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("groups", "examples", "height", "width", "channels", "filters"),
    [(1, 3, 4, 4, 16, 16), (3, 2, 5, 7, 32, 48), (2, 7, 14, 14, 64, 64), (1, 1, 42, 9, 16, 80)],
)
def test_winograd_is_the_convolution(groups, examples, height, width, channels, filters, dtype):
    x, x2 = (images(examples, groups * channels, height, width) for _ in range(2))
    w, w2 = (torch.randn(groups * filters, channels, 3, 3, dtype=torch.float64) for _ in range(2))
    g = images(examples, groups * filters, height, width)
    y = F.conv2d(x, w, padding=1, groups=groups)
    both = y + F.conv2d(x2, w2, padding=1, groups=groups)
    gx, gw, _ = torch.ops.aten.convolution_backward(
        g, x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), groups, (True, True, False)
    )
    x, x2, w, w2, g = (t.to(dtype) for t in (x, x2, w, w2, g))
    for layout in (torch.contiguous_format, torch.channels_last):
        w, w2 = (t.contiguous(memory_format=layout) for t in (w, w2))
        assert_near(winograd.convolve(x, w, None, None, groups, False), y)
        assert_near(winograd.convolve(x, w, x2, w2, groups, False), both)
        assert_near(winograd.convolve(g, w, None, None, groups, True), gx)
    assert_near(winograd.correlate(x, g, groups), gw)


@needs_kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("groups", "examples", "height", "width", "channels", "filters"),
    [(1, 1, 2, 2, 1, 16), (3, 2, 5, 8, 2, 48), (2, 4, 28, 28, 1, 32), (1, 3, 9, 7, 3, 80)],
)
def test_pooled_is_the_convolution_and_the_pool(
    groups, examples, height, width, channels, filters, dtype
):
    x = images(examples, groups * channels, height, width)
    w, hw = (torch.randn(groups * filters, channels, 3, 3, dtype=torch.float64) for _ in range(2))
    b, hb = (torch.randn(groups * filters, dtype=torch.float64) for _ in range(2))
    p = F.max_pool2d(F.conv2d(x, w.requires_grad_(), b.requires_grad_(), 1, 1, 1, groups), 2)
    g = images(*p.shape).requires_grad_()
    gw, gb = torch.autograd.grad(p, (w, b), g, create_graph=True)
    (to_g,) = torch.autograd.grad((gw * hw).sum() + (gb * hb).sum(), g)
    x, w, b, g, hw, hb = (t.detach().to(dtype) for t in (x, w, b, g, hw, hb))
    own, where = pooled.convolve(x, w, b, POOLED, groups)
    assert_near(own, p)
    for got, wanted in zip(pooled.correlate(x, g, where, POOLED, groups), (gw, gb), strict=True):
        assert_near(got, wanted)
    assert_near(pooled.convolve_at(x, hw, hb, where, POOLED, groups), to_g)


@needs_kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("groups", "examples", "channels", "height", "width"),
    [(1, 1, 3, 2, 2), (3, 2, 2, 9, 3), (2, 3, 1, 4, 17), (1, 7, 3, 16, 8)],
)
def test_moments_are_those_of_the_patches(groups, examples, channels, height, width, dtype):
    x = images(examples, groups * channels, height, width).to(dtype)
    patches = F.unfold(x.double(), 3, padding=1).view(examples, groups, channels * 9, -1)
    mean = patches.mean((0, 3))[..., None]
    second = torch.einsum("ngap,ngbp->gab", patches, patches) / (examples * height * width)
    for by in (moments, plain_moments):
        for layout in (torch.contiguous_format, torch.channels_last):
            found = by.of_patches(x.contiguous(memory_format=layout), 1, groups)
            for got, wanted in zip(found, (mean, second), strict=True):
                assert_near(got, wanted)


def derivatives(function, inputs: list[Tensor], g: Tensor, h: list[Tensor]) -> list[Tensor]:
    """Return outputs, gradients by the inputs, and gradients of these by g and the inputs."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    g = g.clone().requires_grad_()
    z = function(*inputs)
    first = torch.autograd.grad(z, inputs, g, create_graph=True)
    along = torch.stack([(f * each).sum() for f, each in zip(first, h, strict=True)]).sum()
    return [z, *first, *torch.autograd.grad(along, [g, *inputs], materialize_grads=True)]


def batch_norm_and_pool(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    z = F.batch_norm(y, None, None, gamma.flatten(), beta.flatten(), True, eps=SLOPED.eps)
    return F.max_pool2d(F.leaky_relu(z, SLOPED.slope), 2)


def by_the_first(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    mean = y[:1].mean((0, 2, 3), keepdim=True)
    var = y[:1].var((0, 2, 3), correction=0, keepdim=True)
    z = (y - mean) / (var + SLOPED.eps).sqrt() * gamma + beta
    return F.max_pool2d(F.leaky_relu(z, SLOPED.slope), 2)


def by_given(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    z = (y - 0.25) / (2 + SLOPED.eps) ** 0.5 * gamma + beta
    return F.max_pool2d(F.leaky_relu(z, SLOPED.slope), 2)


def normalise_and_pool(y: Tensor, gamma: Tensor, beta: Tensor, form: Form = SLOPED) -> Tensor:
    y = y.clone(memory_format=torch.channels_last)  # the mean is subtracted from y itself
    return NormaliseAndPool.apply(y, gamma, beta, None, None, form)[0]


def normalise_by_the_first(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return normalise_and_pool(y, gamma, beta, SLOPED._replace(examples=1))


def normalise_by_given(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y, given = y.clone(memory_format=torch.channels_last), torch.ones_like(gamma).detach()
    return NormaliseAndPool.apply(y, gamma, beta, given / 4, given * 2, SLOPED)[0]


def affine_and_activation(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.leaky_relu(d * a + b, SLOPED.slope)


@needs_kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("examples", "channels", "height", "width"),
    [(3, 16, 2, 2), (2, 48, 5, 7), (4, 16 * 35, 4, 3), (1, 64, 14, 14)],
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("kernel", "fast", "slow"),
    [
        ("normalise", normalise_and_pool, batch_norm_and_pool),
        ("normalise", normalise_by_the_first, by_the_first),
        ("normalise", normalise_by_given, by_given),
        ("affine", lambda *t: Affine.apply(*t, SLOPED.slope), affine_and_activation),
    ],
)
def test_two_derivatives_are_those_of_pytorch(
    examples, channels, height, width, dtype, layout, kernel, fast, slow
):
    torch.manual_seed(0)
    wide = (1, channels, 1, 1)
    inputs, h = (
        [images(examples, channels, height, width), torch.rand(wide).double() + 0.5,
         torch.randn(wide).double()]
        for _ in range(2)
    )  # fmt: skip
    inputs[0] = inputs[0].to(dtype).double()  # where the maxima are must not depend on rounding
    g = images(*slow(*inputs).shape)
    wanted = derivatives(slow, inputs, g, h)
    inputs[0], g, h[0] = (t.contiguous(memory_format=layout) for t in (inputs[0], g, h[0]))
    with Names() as names:
        found = derivatives(
            fast, [t.to(dtype) for t in inputs], g.to(dtype), [t.to(dtype) for t in h]
        )
    assert {n for n in names.seen if "fewstep" in n} == {
        f"fewstep.{kernel}{which}.default" for which in ("", "_backward", "_second")
    }
    for got, exact in zip(found, wanted, strict=True):
        off = float((got.detach().double() - exact.detach()).norm())
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}[dtype]
        assert off <= tolerance * max(1.0, float(exact.detach().norm()))


def normalised(y: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones(1, y.shape[1], 1, 1, dtype=y.dtype)
    _, _, _, _, p, where = normalise.forward(y.clone(), one, 0 * one, None, None, POOLED)
    return p, where


def convolved(x: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.zeros(16, 1, 3, 3, dtype=x.dtype)
    w[:, :, 1, 1] = 1
    return pooled.convolve(x[:, :1].contiguous(), w, torch.zeros(16, dtype=x.dtype), POOLED, 1)


@needs_kernels
@pytest.mark.parametrize("find", [normalised, convolved])
def test_maxima_are_where_pytorch_finds_them(find):
    x = torch.randint(3, (4, 1, 6, 6)).double().expand(4, 16, 6, 6)  # many are equal
    x = x.contiguous(memory_format=torch.channels_last)
    _, indices = F.max_pool2d(x, 2, return_indices=True)
    row, column = indices // 6 % 2, indices % 6 % 2
    p, where = find(x)
    assert torch.equal(where.long(), 2 * row + column)
    x[1, :, 3, 2] = torch.nan
    p, _ = find(x)
    assert p.isnan().any()
    if find is convolved:  # windows of a padded image: a NaN reaches the squares beside it
        assert torch.equal(p.isnan().any(1), F.max_pool2d(F.conv2d(
            x[:, :1], torch.ones(1, 1, 3, 3).double(), padding=1), 2).isnan()[:, 0])  # fmt: skip


class Names(TorchDispatchMode):
    """The operations that a meta-gradient is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] = self.seen.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def meta_gradient(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, int]]:
    torch.manual_seed(0)
    network = Conv4(1, 3, 32, filters=16).to(dtype)
    y = torch.arange(3).repeat(2, 4)
    x = torch.rand(2, 2, 12, 1, 32, 32, dtype=torch.float64).to(dtype)
    learner = fewstep.MetaLearner(network, fewstep.maml(2, 0.1), F.cross_entropy)
    with Names() as names:
        gradient, _ = learner.meta_gradient(fewstep.TaskBatch(x[0], y, x[1], y))
    return list(gradient.values()), names.seen


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_meta_gradient_is_made_of_them(monkeypatch, dtype):
    fast, names = meta_gradient(dtype)
    assert not {n for n in names if "convolution" in n or "max_pool" in n}
    assert names["fewstep.pooled_convolve.default"] == 2 + 1
    assert names["fewstep.moments.default"] == 2
    assert names["fewstep.affine.default"] == 2 + 1
    assert names["fewstep.affine_second.default"] == 2
    assert names["fewstep.normalise.default"] == 3 * (2 + 1)
    assert names["fewstep.normalise_second.default"] == 3 * 2
    assert names["fewstep.winograd_correlate.default"] == 3 * (2 + 1 + 2 * 2)
    if dtype == torch.float64:
        monkeypatch.setattr(kernels, "library", lambda: None)
        slow, names = meta_gradient()
        assert not any("fewstep" in n for n in names)
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@needs_kernels
@pytest.mark.usefixtures("threads")
def test_the_same_comes_out_each_time():
    first, second = (meta_gradient(torch.float32)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernels
def test_what_they_do_not_take(monkeypatch):
    called = []
    monkeypatch.setattr(winograd, "call", lambda *a: called.append(a))
    for x, w, stride in (
        (images(9, 16, 8, 8), images(16, 16, 3, 3), 2),
        (images(9, 16, 8, 8), images(24, 16, 3, 3), 1),
        (images(9, 24, 8, 8), images(16, 24, 3, 3), 1),
        (images(9, 16, 5, 5), images(16, 16, 3, 3), 1),  # 4 tiles for 25 outputs
        (images(9, 16, 8, 8).bfloat16(), images(16, 16, 3, 3).bfloat16(), 1),
    ):
        y = convolve((x, w), Space((stride, stride)), 1)
        gx, gw = gradients(y, x, w, Space((stride, stride)), 1, by_x=True, by_w=True)
        assert (gx.shape, gw.shape) == (x.shape, w.shape)
        assert not called
    one, w = images(1, 16, 3, 3), images(16, 16, 3, 3)
    y = convolve((one, w), Space(), 1)
    gradients(y, one, w, Space(), 1, by_x=True, by_w=True)
    names = ["winograd_convolve", "winograd_convolve", "winograd_correlate"]
    assert [name for name, *_ in called] == names


@needs_kernels
def test_nothing_is_left_to_them_where_there_is_nothing_to_do():
    for x in (images(0, 1, 8, 8), images(3, 1, 1, 8)):
        assert not pooled.fits(x, images(16, 1, 3, 3), images(16, 1, 1, 1), POOLED, 1)
        assert not moments.fits(x, 1, 1)
    for x in (images(0, 16, 8, 8), images(3, 16, 8, 1)):
        assert not winograd.fits(x, images(16, 16, 3, 3), 1)
        assert not normalise.fits(POOLED, x, images(1, 16, 1, 1))
    assert not affine.fits(images(0, 16, 8, 8), *[images(1, 16, 1, 1)] * 2)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Compile anew, into a folder of its own."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    return kernels.library.__wrapped__


@needs_kernels
def test_they_are_compiled_once_and_for_avx2_too(fresh, monkeypatch, tmp_path):
    """By a compiler with arguments."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")))
    monkeypatch.setenv("CXX", f"env {compiler} -DNOTHING")
    commands = []
    run = kernels._run
    monkeypatch.setattr(kernels, "_run", lambda c: commands.append(c) or run(c))
    assert fresh() is not None
    assert commands
    assert all(command[:3] == ["env", compiler, "-DNOTHING"] for command in commands)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".so"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    for_avx2 = fresh()
    assert for_avx2 is not None

    gradient, _ = meta_gradient()
    monkeypatch.setattr(kernels, "library", lambda: for_avx2)
    same, names = meta_gradient()
    assert "fewstep.winograd_convolve.default" in names
    for a, b in zip(same, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("false", "false cannot compile the kernels"),
        ("env false", "env false cannot compile the kernels"),
        ("no-such-c++ -m64", "called no-such-c\\+\\+,"),
    ],
)
def test_without_a_compiler_there_is_a_notice(fresh, monkeypatch, tmp_path, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=message):
        assert fresh() is None
    assert not list(tmp_path.glob("cache/*"))
    for empty in ("", " "):
        monkeypatch.setenv("CXX", empty)
        assert fresh() is None  # and nothing is said
