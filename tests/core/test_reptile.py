"""Reptile is first-order MAML with other weights, judged on the support set: no part of ours."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from fewstep import SGD, MetaLearner, TaskBatch, fomaml
from tests.core.reference import MODELS

pytestmark = pytest.mark.usefixtures("float64")

STEPS, INNER_LR, EPSILON = 4, 0.2, 0.7


class EveryPointButTheLast:
    def __call__(self, num_steps, epoch):
        return (1.0,) * num_steps + (0.0,)


@pytest.mark.parametrize("name", ["mlp", "layer norm", "GRU cell", "sinusoid MLP"])
def test_parameters_move_to_the_mean_of_where_the_tasks_end(name):
    """phi + epsilon (mean theta[K] - phi), as theta[K] = phi - alpha sum_k grad L(theta[k])."""
    case = MODELS[name]
    module, batch = case.build(), case.batch()
    phi = {n: p.detach().clone() for n, p in module.named_parameters()}
    ends = []
    for x, y in zip(batch.x_support, batch.y_support, strict=True):
        theta = {n: p.clone().requires_grad_() for n, p in phi.items()}
        for _ in range(STEPS):
            loss = case.loss(functional_call(module, theta, (x,)), y)
            gradients = torch.autograd.grad(loss, list(theta.values()))
            theta = {
                n: (p - INNER_LR * g).detach().requires_grad_()
                for (n, p), g in zip(theta.items(), gradients, strict=True)
            }
        ends.append(theta)

    reptile = replace(
        fomaml(STEPS, INNER_LR),
        query_weights=EveryPointButTheLast(),
        outer=SGD(EPSILON * INNER_LR),
    )
    x, y = batch.x_support, batch.y_support
    MetaLearner(module, reptile, case.loss).step(TaskBatch(x, y, x, y))

    for n, p in module.named_parameters():
        end = torch.stack([theta[n] for theta in ends]).mean(0)
        torch.testing.assert_close(p.detach(), phi[n] + EPSILON * (end.detach() - phi[n]))
