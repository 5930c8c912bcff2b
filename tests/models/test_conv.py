"""ConvBlock in one piece and its layers in the usual order give the same."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewstep
from fewstep.core.errors import InputError
from fewstep.models import ConvBlock

pytestmark = pytest.mark.usefixtures("float64")

CHANNELS, FILTERS = 2, 6
SCALES = torch.tensor([1.5, 0.3, -0.7, -1e-3, 1e-3, -2.0])  # of batch norm: signs mixed


def plain(block: ConvBlock, x: Tensor) -> Tensor:
    """Return what the block's layers give in the usual order."""
    return block.pool(block.activation(block.norm(block.conv(x))))


def block_for(norm="batch", downsample="max-pool", activation="relu", bias=True, size=6):
    block = ConvBlock(
        CHANNELS,
        FILTERS,
        size,
        norm=norm,
        downsample=downsample,
        activation=activation,
        bias=bias,
    )
    if norm == "batch":
        with torch.no_grad():
            block.norm.weight.copy_(SCALES)
            block.norm.bias.normal_()
    return block


def images(size: int = 6) -> Tensor:
    return torch.randn(5, CHANNELS, size, size) + 0.5


every_kind = pytest.mark.parametrize(
    ("norm", "downsample", "activation", "bias", "size"),
    [
        (norm, downsample, activation, bias, size)
        for norm in ("batch", "layer", "none")
        for downsample in ("max-pool", "stride")
        for activation in ("relu", "leaky-relu")
        for bias in (True, False)
        for size in (6, 7)
    ],
)


@every_kind
def test_values_are_those_of_the_usual_order(norm, downsample, activation, bias, size):
    block, x = block_for(norm, downsample, activation, bias, size), images(size)
    out = block(x)
    assert out.shape == (5, FILTERS, block.out_size, block.out_size)
    torch.testing.assert_close(out, plain(block, x), rtol=1e-12, atol=1e-12)


@every_kind
def test_first_and_second_derivatives_are_too(norm, downsample, activation, bias, size):
    block, x = block_for(norm, downsample, activation, bias, size), images(size).requires_grad_()
    wrt = [x, *block.parameters()]
    weight, directions = None, [torch.randn_like(p) for p in wrt]
    results = []
    for forward in (block, lambda x: plain(block, x)):
        out = forward(x)
        weight = torch.randn_like(out) if weight is None else weight
        first = torch.autograd.grad((weight * out**2).sum(), wrt, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        results.append([*first, *torch.autograd.grad(along, wrt)])
    scale = max(float(g.detach().abs().max()) for g in results[1])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize("part", [None, nn.Identity()])
def test_a_block_called_twice_has_no_one_support_statistics(part):
    """Neither in one piece nor with a part exchanged: the second call's would serve the first."""
    block = ConvBlock(
        1, 1, 8, norm="batch", downsample="max-pool", activation="relu", bias=False
    )  # fmt: skip
    block.pool = part or block.pool
    module = nn.Sequential(block, block, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    learner = fewstep.MetaLearner(module, fewstep.maml(1), F.cross_entropy)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    learner.adapt(x, y, statistics="running")
    with pytest.raises(InputError, match=r"^statistics='support' .* one is called twice"):
        learner.adapt(x, y, statistics="support")


ACTIVATIONS = {"relu": F.relu, "leaky-relu": lambda z: F.leaky_relu(z, 0.01)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("downsample", "stride"), [("max-pool", 1), ("stride", 2)])
def test_layers_are_those_asked_for(activation, downsample, stride):
    block, x = block_for("batch", downsample, activation), images()
    y = F.conv2d(x, block.conv.weight, block.conv.bias, stride=stride, padding=1)
    y = F.batch_norm(y, None, None, block.norm.weight, block.norm.bias, training=True)
    y = ACTIVATIONS[activation](y)
    torch.testing.assert_close(block(x), F.max_pool2d(y, 2) if stride == 1 else y)


def test_gradient_of_the_gradient_of_batch_norm():
    block = block_for("batch", activation="leaky-relu", bias=False, size=4)
    x = torch.randn(2, CHANNELS, 4, 4, requires_grad=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(block.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(block, named, (x,))

    inputs = (x, *block.parameters())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("downsample", ["max-pool", "stride"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_batch_norm(downsample, bias, momentum):
    block = block_for(downsample=downsample, bias=bias)
    block.norm.momentum = momentum
    norm = nn.BatchNorm2d(FILTERS, momentum=momentum)
    for x in (images(), images(), images()[:1]):
        block(x)
        norm(block.conv(x))
    assert block.norm.num_batches_tracked == 3
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(getattr(block.norm, name), buffer, rtol=1e-12, atol=1e-14)


def test_evaluation_uses_running_statistics():
    block, x = block_for(), images()
    with torch.no_grad():
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2)
    block.eval()
    before = {name: b.clone() for name, b in block.named_buffers()}
    mean, var = (s[:, None, None] for s in (block.norm.running_mean, block.norm.running_var))
    gamma, beta = (p[:, None, None] for p in (block.norm.weight, block.norm.bias))
    normalised = gamma * (block.conv(x) - mean) / (var + block.norm.eps).sqrt() + beta
    torch.testing.assert_close(block(x), block.pool(normalised.relu()), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(b, before[name]) for name, b in block.named_buffers())


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0, 100.0])
def test_float32_bears_an_offset(offset):
    # E[y^2] - mean^2 cancels digits when the mean is large; few, as zero padding spreads y too.
    block = block_for(size=16, bias=False)
    x = torch.rand(25, CHANNELS, 16, 16) + offset
    exact = plain(block, x).detach()
    rounded = block.float()(x.float()).detach().double()
    assert (rounded - exact).norm() < 1e-4 * exact.norm()


def test_state_has_ordinary_names():
    assert set(block_for().state_dict()) == {
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("activation", nn.GELU()),
        ("pool", nn.AvgPool2d(2)),
        ("norm", nn.InstanceNorm2d(FILTERS)),
        ("conv", nn.Conv2d(CHANNELS, FILTERS, 5, padding=2, bias=False)),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_part_may_be_exchanged(norm, name, part):
    block, x = copy.deepcopy(block_for(norm, bias=False)), images()
    setattr(block, name, part.double())
    torch.testing.assert_close(block(x), plain(block, x))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("activation", "negative_slope", 0.3),
        ("activation", "negative_slope", -0.3),  # does not rise, so it may not follow the pool
        ("conv", "padding", (0, 0)),
        ("conv", "padding", (2, 1)),
        ("conv", "dilation", (2, 2)),
        ("conv", "stride", (1, 2)),
        ("conv", "padding_mode", "circular"),
        ("pool", "stride", 1),
        ("pool", "kernel_size", 3),
        ("pool", "padding", 1),
        ("pool", "ceil_mode", True),
        ("norm", "eps", 0.5),
        ("norm", "momentum", None),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_setting_may_be_changed(norm, name, setting, value):
    block, x = block_for(norm, activation="leaky-relu", bias=False, size=7), images(7)
    block(x)
    setattr(getattr(block, name), setting, value)
    torch.testing.assert_close(block(x), plain(block, x))
    torch.testing.assert_close(copy.deepcopy(block)(x), plain(block, x))


def test_a_change_that_a_piece_can_follow_stays_in_one_piece(monkeypatch):
    block, x = block_for(activation="leaky-relu", bias=False), images()
    block.activation.negative_slope, block.norm.eps, block.norm.momentum = 0.3, 0.5, None
    pieces, in_one_piece = [], ConvBlock._in_one_piece
    monkeypatch.setattr(ConvBlock, "_in_one_piece", lambda *a: pieces.append(a) or in_one_piece(*a))
    torch.testing.assert_close(block(x), plain(block, x))
    assert len(pieces) == 1


@pytest.mark.parametrize("part", ["conv", "norm", "pool", "activation"])
def test_hooks_fire(part):
    block, x, seen = block_for(bias=False), images(), []
    block(x)
    assert not seen
    handle = getattr(block, part).register_forward_hook(lambda *given: seen.append(given[2]))
    z = block(x)
    assert len(seen) == 1
    if part == "pool":
        assert seen[0] is z
    handle.remove()
    torch.testing.assert_close(block(x), z)
    assert len(seen) == 1


def test_a_copy_is_still_in_one_piece(monkeypatch):
    pieces = []
    monkeypatch.setattr(ConvBlock, "_in_one_piece", lambda self, x, *_: pieces.append(x))
    copy.deepcopy(block_for(bias=False))(images())
    assert len(pieces) == 1
