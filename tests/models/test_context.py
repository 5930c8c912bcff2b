"""A learned vector beside each input."""

import pytest
import torch
from torch import nn

import fewstep
from fewstep.core.errors import InputError
from fewstep.models.context import Context


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3)])
def test_it_is_beside_the_features(shape):
    context, x = Context(4), torch.randn(shape)
    nn.init.normal_(context.vector)
    y = context(x)
    assert torch.equal(y[..., :3], x)
    assert torch.equal(y[..., 3:], context.vector.expand(*shape[:-1], 4))


def test_images_are_not_widened():
    """Neither plainly nor as those of a task."""
    x, y = torch.randn(2, 2, 1, 28, 28), torch.tensor([[0, 1]] * 2)
    module = nn.Sequential(Context(5), nn.Flatten(), nn.Linear(28 * 33, 3))
    with pytest.raises(InputError, match=r"shape \(2, 1, 28, 28\), whose rows .*; flatten images"):
        module(x[0])
    learner = fewstep.MetaLearner(
        module, fewstep.cavia(1, context="0.*"), nn.functional.cross_entropy
    )
    with pytest.raises(InputError, match=r"shape \(2, 1, 28, 28\), whose rows"):
        learner.meta_gradient(fewstep.TaskBatch(x, y, x, y))
