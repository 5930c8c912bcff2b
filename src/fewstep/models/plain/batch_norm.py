"""`BatchNorm` of `layer_functions`, and its two derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.plain.sums import SPACE, count_of_channel, sum_of_channel


def forward(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None,
    examples: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return z, mean, var and r."""
    if mean is None or var is None:
        var, mean = torch.var_mean(y[:examples], SPACE, correction=0, keepdim=True)
    r = torch.rsqrt(var + eps)
    return (y - mean).mul_(gamma * r).add_(beta), mean, var, r


def backward(
    g: Tensor, y: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, *, examples: int
) -> tuple[Tensor, ...]:
    """Return gy, ggamma and gbeta."""
    d, a = y - mean, gamma * r
    gbeta, ggamma = sum_of_channel(g), sum_of_channel(g * d).mul_(r)
    gy = g * a
    if examples:
        a_n = a / -count_of_channel(d[:examples])
        gy[:examples].addcmul_(d[:examples], a_n * r * ggamma).add_(a_n * gbeta)
    return gy, ggamma, gbeta


def second(
    h: Tensor, hgamma: Tensor, hbeta: Tensor, g: Tensor, y: Tensor, gamma: Tensor, mean: Tensor,
    r: Tensor, ggamma: Tensor, gbeta: Tensor, *, examples: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients by g, y and gamma of h . gy + hgamma . ggamma + hbeta . gbeta."""
    d, a = y - mean, gamma * r
    counted, h_counted = d[:examples], h[:examples]
    n = count_of_channel(counted)
    # h enters gy's three terms by its values and by two sums.
    h0, h1 = sum_of_channel(h_counted) / n, sum_of_channel(h_counted * counted) * r / n
    to_a = sum_of_channel(g * h) - gbeta * h0 - ggamma * h1
    to_ggamma, to_gbeta = hgamma - a * h1, hbeta - a * h0
    to_g = torch.addcmul(to_gbeta, d, to_ggamma * r).addcmul_(h, a)
    to_y = g * (to_ggamma * r)
    if examples:  # y enters by d, and r and mu bring in all they are of
        c = a * ggamma
        of_d = (to_a * a + to_ggamma * ggamma - c * h1) * r * r / n
        shift = (to_ggamma * gbeta - c * h0) * r / n
        to_y[:examples].addcmul_(counted, of_d, value=-1).sub_(shift)
        to_y[:examples].addcmul_(h_counted, c * r / n, value=-1)
    return to_g, to_y, to_a * r
