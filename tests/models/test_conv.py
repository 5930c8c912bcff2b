"""ConvBlock in one piece and its layers in the usual order give the same."""

import copy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep import InputError
from fewstep.models import Conv4, ConvBlock
from fewstep.models.conv import Initialisation, UnitFeatures, projection_of

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


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("downsample", ["max-pool", "stride"])
@pytest.mark.parametrize("initialisation", get_args(Initialisation))
@pytest.mark.parametrize("size", [16, 28])
def test_conv4_gives_one_output_per_class(norm, downsample, initialisation, size):
    model = Conv4(
        3, 5, size, filters=4, norm=norm, downsample=downsample, initialisation=initialisation
    )
    assert model(torch.randn(2, 3, size, size)).shape == (2, 5)


@pytest.mark.parametrize(("size", "features"), [(28, 64), (84, 64 * 25)])
def test_conv4_has_the_published_sizes(size, features):
    assert Conv4(1, 5, size).head.in_features == features


def test_conv4_biases_its_convolutions_unless_batch_norm_cancels_them():
    def biases(**options) -> set[bool]:
        blocks = Conv4(1, 5, 16, filters=4, **options).blocks
        return {b.conv.bias is not None for b in blocks if isinstance(b, ConvBlock)}

    assert biases(norm="batch") == {False}
    assert biases(norm="layer") == biases(norm="none") == {True}
    assert biases(norm="batch", bias=True) == {True}
    assert biases(norm="none", bias=False) == {False}


def test_xavier_initialisation_is_uniform_with_zero_biases():
    model = Conv4(3, 5, 16, filters=32, norm="none", initialisation="xavier")
    conv = model.blocks[1].conv
    bound = (6 / (9 * 32 + 9 * 32)) ** 0.5
    assert 0.99 * bound < conv.weight.abs().max() <= bound
    assert conv.weight.detach().std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not conv.bias.any()
    assert not model.head.bias.any()


def test_finn_initialisation_has_a_standard_normal_head():
    head = Conv4(3, 20, 28, initialisation="finn").head
    assert head.weight.detach().std() == pytest.approx(1, rel=0.1)
    assert not head.bias.any()


def test_a_head_of_zeros_prefers_no_class_and_changes_nothing_else():
    torch.manual_seed(0)
    own = Conv4(3, 5, 16, initialisation="zero-head")
    torch.manual_seed(0)
    xavier = Conv4(3, 5, 16, initialisation="xavier")
    assert not own(torch.randn(2, 3, 16, 16)).any()
    assert torch.equal(own.blocks[3].conv.weight, xavier.blocks[3].conv.weight)


def test_the_head_sees_the_spatial_mean_if_asked_of_images_of_any_size():
    own = Conv4(3, 5, 32, filters=4, spatial_mean=True)
    flat = Conv4(3, 5, 32, filters=4, spatial_mean=False)
    flat.blocks.load_state_dict(own.blocks.state_dict())
    x = torch.randn(6, 3, 32, 32)
    maps = flat.blocks(x).detach().view(6, 4, 2, 2)
    torch.testing.assert_close(own.blocks(x).detach(), maps.mean((2, 3)))
    assert own(torch.randn(2, 3, 48, 48)).shape == (2, 5)
    strided = Conv4(1, 5, 28, filters=4, downsample="stride", spatial_mean=False)
    assert strided.head.in_features == 4 * 2 * 2
    assert Conv4(1, 5, 28, filters=4, downsample="stride").head.in_features == 4
    assert Conv4(1, 5, 32, filters=4).head.in_features == 4 * 2 * 2


def test_unit_features_leave_only_their_direction_to_the_head():
    torch.manual_seed(0)
    own = Conv4(3, 5, 32, filters=4, unit_features=True)
    torch.manual_seed(0)
    raw = Conv4(3, 5, 32, filters=4)
    x = torch.randn(6, 3, 32, 32)
    f = raw.blocks(x).detach()
    unit = f / (f.square().mean(1, keepdim=True)).sqrt()
    torch.testing.assert_close(own.blocks(x).detach(), unit, rtol=1e-4, atol=0)
    torch.testing.assert_close(own(x), own.head(unit), rtol=1e-4, atol=1e-5)
    assert own.state_dict().keys() == raw.state_dict().keys()
    dark = UnitFeatures()(torch.zeros(1, 4, requires_grad=True))
    assert torch.equal(dark, torch.zeros(1, 4))


def test_a_projection_changes_nothing_until_it_is_learned():
    torch.manual_seed(0)
    own = Conv4(3, 5, 32, filters=4, projection=True, unit_features=True)
    torch.manual_seed(0)
    without = Conv4(3, 5, 32, filters=4, unit_features=True)
    x = torch.randn(6, 3, 32, 32)
    assert torch.equal(own(x), without(x))
    torch.manual_seed(1)
    mapped = torch.randn(16, 16)
    with torch.no_grad():
        own.blocks.projection.weight.copy_(mapped)
    expected = UnitFeatures()(without.blocks[:-1](x) @ mapped.T)
    torch.testing.assert_close(own.blocks(x), expected)


def test_the_projection_of_a_head_is_the_fourth_root_of_its_metric():
    torch.manual_seed(0)
    head = torch.randn(40, 6)
    own = projection_of(head + torch.randn(6))  # what all classes share tells none apart
    v = head - head.mean(0)
    metric = v.T @ v
    fourth = torch.linalg.matrix_power(own, 4)
    torch.testing.assert_close(fourth * (metric.trace() / fourth.trace()), metric)
    torch.testing.assert_close(own, own.T)
    assert torch.linalg.eigvalsh(own).min() > 0
    assert own.square().sum() == pytest.approx(6)
    torch.testing.assert_close(projection_of(7 * head), own)
    orthogonal, _ = torch.linalg.qr(torch.randn(6, 6))  # other axes, the same map
    torch.testing.assert_close(projection_of(head @ orthogonal), orthogonal.T @ own @ orthogonal)


def test_a_head_that_tells_no_classes_apart_gives_the_identity():
    assert torch.equal(projection_of(torch.ones(8, 4)), torch.eye(4))


def test_a_cosine_head_sees_angles_alone():
    torch.manual_seed(0)
    own = Conv4(3, 5, 32, filters=4, head="cosine")
    x = torch.randn(6, 3, 32, 32)
    f, w = own.blocks(x).detach(), own.head.weight.detach()
    cosine = torch.cosine_similarity(f[:, None], w[None], dim=2)
    torch.testing.assert_close(own(x).detach(), 10 * cosine)
    with torch.no_grad():
        own.head.weight *= torch.arange(1, 6)[:, None]
        own.head.scale.fill_(3)
    torch.testing.assert_close(own.head(7 * f).detach(), 3 * cosine)


@pytest.mark.parametrize(
    ("mistake", "quoted"),
    [
        ({"size": 15}, r"Conv4\(size=15\)"),
        ({"size": 0, "downsample": "stride"}, r"Conv4\(size=0\)"),
        ({"filters": 0}, r"Conv4\(filters=0\)"),
        ({"ways": 0}, r"Conv4\(ways=0\)"),
        ({"in_channels": -1}, r"Conv4\(in_channels=-1\)"),
        ({"head": "cosine", "initialisation": "zero-head"}, r"Conv4\(head='cosine', init"),
        ({"norm": "layers"}, "unknown norm 'layers'; did you mean 'layer'"),
        ({"downsample": "pool"}, "unknown downsample 'pool'; did you mean 'max-pool'"),
        ({"activation": "leaky"}, "unknown activation 'leaky'; did you mean 'leaky-relu'"),
        ({"initialisation": "glorot"}, "unknown initialisation 'glorot'; valid are xavier, "),
    ],
)
def test_conv4_refuses(mistake, quoted):
    with pytest.raises(InputError, match=f"^{quoted}.*$"):
        Conv4(**({"in_channels": 1, "ways": 5, "size": 28} | mistake))


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
    monkeypatch.setattr(ConvBlock, "_in_one_piece", lambda self, x, norm: pieces.append(x))
    copy.deepcopy(block_for(bias=False))(images())
    assert len(pieces) == 1
