"""`NormaliseAndPool` of `block_functions`, and its two derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.models.form import Form
from fewstep.models.plain.pool import pick, pool, unpool
from fewstep.models.plain.sums import SPACE, count_of_channel, sum_of_channel

_leaky_relu_backward = torch.ops.aten.leaky_relu_backward


def forward(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None, form: Form
) -> tuple[Tensor | None, ...]:
    """Subtract the mean from y, and return z, mean, var, r, p and where the maxima are."""
    first = y[: form.examples]
    if mean is None:
        mean = first.mean(SPACE, keepdim=True)
    d = y.sub_(mean)
    if var is None:
        var = (first * first).mean(SPACE, keepdim=True)
    p, where = pool(d, form)
    r = torch.rsqrt(var + form.eps)
    z = F.leaky_relu_(torch.addcmul(beta, p, gamma * r), form.slope)
    return z, mean, var, r, p, where


def backward(
    gz: Tensor, d: Tensor, gamma: Tensor, z: Tensor, r: Tensor, p: Tensor, where: Tensor | None,
    form: Form,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return gy, ggamma and gbeta."""
    ga = _leaky_relu_backward(gz, z, form.slope, True)
    a = gamma * r
    gbeta = sum_of_channel(ga)
    ggamma = sum_of_channel(ga * p).mul_(r)
    first = d[: form.examples]
    a_n = a / -count_of_channel(first)
    gy = unpool(ga * a, where, d.shape)
    gy[: form.examples].addcmul_(first, a_n * r * ggamma).add_(a_n * gbeta)
    return gy, ggamma, gbeta


def second(
    hy: Tensor, hgamma: Tensor, hbeta: Tensor, d: Tensor, gamma: Tensor, z: Tensor, r: Tensor,
    p: Tensor, where: Tensor | None, gz: Tensor, ggamma: Tensor, gbeta: Tensor, form: Form,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients by gz, y and gamma of hy . gy + hgamma . ggamma + hbeta . gbeta."""
    ga = _leaky_relu_backward(gz, z, form.slope, True)
    first, hfirst = d[: form.examples], hy[: form.examples]
    a, r_n = gamma * r, r / count_of_channel(first)
    # hy enters gy's three terms by its values at the maxima and by two sums.
    u = pick(hy, where)
    h0 = sum_of_channel(hfirst).div_(count_of_channel(first))
    h1 = sum_of_channel(hfirst * first).mul_(r_n)
    to_a = sum_of_channel(ga * u).sub_(gbeta * h0).sub_(ggamma * h1)
    to_ggamma = torch.addcmul(hgamma, a, h1, value=-1)
    to_gbeta = torch.addcmul(hbeta, a, h0, value=-1)
    to_p = to_ggamma * r
    to_ga = torch.addcmul(to_gbeta, p, to_p).addcmul_(u, a)
    to_gz = _leaky_relu_backward(to_ga, z, form.slope, True)
    # y enters by r p (ggamma) and by r d (h1), and r and mu bring in all they are of.
    c = a * ggamma
    slope = torch.addcmul(to_a * a, to_ggamma, ggamma).addcmul_(c, h1, value=-1).mul_(r * r_n)
    shift = torch.mul(to_ggamma, gbeta).addcmul_(c, h0, value=-1).mul_(r_n)
    to_y = unpool(ga * to_p, where, d.shape)
    to_first = to_y[: form.examples]
    to_first.addcmul_(first, slope, value=-1).sub_(shift).addcmul_(hfirst, c * r_n, value=-1)
    return to_gz, to_y, to_a * r
