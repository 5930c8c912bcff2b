"""The meta-gradient against finite differences of the meta-loss."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewstep import AdaptedParameters, MetaLearner, TaskBatch, maml

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("include", [("*",), ("2.*",)], ids=["all", "head only"])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_meta_gradient_is_the_derivative_of_the_meta_loss(include, vectorize):
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    algorithm = maml(2, 0.3, adapted=AdaptedParameters(include=include))
    learner = MetaLearner(module, algorithm, F.mse_loss, vectorize=vectorize)
    x, y = torch.randn(2, 2, 5, 2), torch.randn(2, 2, 5, 1)
    batch = TaskBatch(x[0], y[0], x[1], y[1])

    class MetaLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *phi):
            for parameter, value in zip(learner.parameters.values(), phi, strict=True):
                parameter.data = value
            with torch.enable_grad():
                ctx.gradient, metrics = learner.meta_gradient(batch)
            return metrics.loss

        @staticmethod
        def backward(ctx, outer):
            return tuple(outer * g for g in ctx.gradient.values())

    phi = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(MetaLoss.apply, phi, rtol=1e-6, atol=1e-8)
