"""Conv4 is the published network, with what may be asked for besides."""

from typing import get_args

import pytest
import torch
from torch.nn import functional as F

import fewstep
from fewstep import InputError
from fewstep.models import Conv4, ConvBlock
from fewstep.models.conv import Initialisation
from fewstep.models.features import UnitFeatures, projection_of

pytestmark = pytest.mark.usefixtures("float64")


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
    torch.testing.assert_close(own.unit_features(own.blocks(x)).detach(), unit, rtol=1e-4, atol=0)
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
    expected = UnitFeatures()(without.blocks(x) @ mapped.T)
    torch.testing.assert_close(own.unit_features(own.blocks(x)), expected)


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


@pytest.mark.parametrize("use", ["batch", "support", "running"])
def test_an_adapted_network_can_be_exported(use):
    """Into a graph of PyTorch's operations alone, for programs without this library."""
    learner = fewstep.MetaLearner(Conv4(3, 3, 16, filters=16), fewstep.maml(1), F.cross_entropy)
    x, y = torch.randn(6, 3, 16, 16), torch.arange(3).repeat(2)
    adapted = learner.adapt(x, y, statistics=use)
    exported = torch.export.export(adapted, (x,))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in called)
    torch.testing.assert_close(exported.module()(x), adapted(x), rtol=1e-9, atol=1e-9)
