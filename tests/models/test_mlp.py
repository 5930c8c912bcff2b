import pytest
import torch
from torch import nn

from fewstep import InputError
from fewstep.models import fully_connected, sinusoid_mlp

pytestmark = pytest.mark.usefixtures("float64")


def test_sinusoid_mlp_is_1_40_40_1():
    shapes = [tuple(p.shape) for p in sinusoid_mlp().parameters()]
    assert shapes == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]


def test_sinusoid_mlp_refuses_no_units():
    with pytest.raises(InputError, match=r"^sinusoid_mlp\(hidden=0\) .*$"):
        sinusoid_mlp(hidden=0)


def test_fully_connected_is_that_of_the_paper():
    model = fully_connected(784, 5)
    linear = [m for m in model if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [256, 128, 64, 64, 5]
    assert [m.num_features for m in model if isinstance(m, nn.BatchNorm1d)] == [256, 128, 64, 64]
    assert linear[0].weight.detach().std() == pytest.approx(0.01, rel=0.02)
    assert not any(m.bias.any() for m in linear)
    assert model(torch.randn(3, 1, 28, 28)).shape == (3, 5)
