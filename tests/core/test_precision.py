"""Rounded products: rounded indeed, by as much as promised, and only while they are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep import SGD, MetaLearner, NormStatistics, TaskBatch, maml
from fewstep.core.precision import Precision
from fewstep.core.replay import Replay
from fewstep.models import Conv4, ConvBlock


def gradient(
    module: nn.Module, batch: TaskBatch, precision: Precision, *, steps: int = 1, **options: bool
) -> Tensor:
    learner = MetaLearner(
        module, maml(steps, inner_lr=0.01), F.cross_entropy, precision=precision, **options
    )
    for _ in range(2):
        found, _ = learner.meta_gradient(batch)
    assert {g.dtype for g in found.values()} == {torch.float32}
    return torch.cat([g.flatten() for g in found.values()])


def tasks(*shape: int) -> TaskBatch:
    y = torch.arange(6).remainder(3).expand(2, 6)
    return TaskBatch(torch.randn(2, 6, *shape), y, torch.randn(2, 6, *shape), y)


class RoundedConv2d(nn.Conv2d):
    """A convolution whose factors are rounded by hand."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x.bfloat16(), self.weight.bfloat16(), padding=self.padding)
        return y.float()


class RoundedLinear(nn.Linear):
    """A linear layer whose factors are rounded by hand, as autocast rounds them."""

    def forward(self, x: Tensor) -> Tensor:
        factors = (t.bfloat16() for t in (x, self.weight, self.bias))
        return F.linear(*factors).float()


class ToFloat32(nn.Module):
    """What a fast block does first."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def by_hand(block: ConvBlock) -> nn.Module:
    """Return a block of PyTorch's layers with the same parameters."""
    conv = RoundedConv2d(block.conv.in_channels, block.conv.out_channels, 3, padding=1, bias=False)
    conv.weight = block.conv.weight
    return nn.Sequential(conv, block.norm, block.activation, block.pool)


BLOCK = {"norm": "batch", "downsample": "max-pool", "activation": "leaky-relu", "bias": False}


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_fast_block_rounds_what_its_convolution_reads(steps: int) -> None:
    block = ConvBlock(4, 8, 8, **BLOCK)  # 4 channels: by the statistics of its outputs
    batch = tasks(4, 8, 8)
    head, rounded_head = nn.Linear(8 * 16, 3), RoundedLinear(8 * 16, 3)
    rounded_head.weight, rounded_head.bias = head.weight, head.bias
    rounded, exact, expected = (
        gradient(nn.Sequential(first, nn.Flatten(), last), batch, precision, steps=steps)
        for first, last, precision in (
            (block, head, "bfloat16"), (block, head, "float32"),
            (by_hand(block), rounded_head, "float32"),
        )
    )  # fmt: skip
    # Some maxima and signs are not those of float32, and one more or less is as much as this.
    conv = slice(0, block.conv.weight.numel())
    error = (rounded - expected)[conv].norm() / exact[conv].norm()
    assert error < 0.01
    assert error < (exact - expected)[conv].norm() / exact[conv].norm() / 3


def test_a_first_block_is_not_rounded() -> None:
    module, batch = nn.Sequential(ConvBlock(1, 4, 8, **BLOCK), nn.Flatten()), tasks(1, 8, 8)
    found, expected = (gradient(module, batch, p) for p in ("bfloat16", "float32"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_convolutions_are_rounded_where_autocast_is_on(
    enabled: bool, dtype: torch.dtype, vectorize: bool
) -> None:
    seen = []

    class Noting(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = super().forward(x)
            seen.append(y.dtype)
            return y.float().flatten(1)

    gradient(Noting(4, 3, 5), tasks(4, 5), "bfloat16", vectorize=vectorize)
    assert set(seen) == {dtype}


@pytest.mark.parametrize("replay", [True, False])
def test_linear_layers_are_rounded_by_autocast(replay: bool) -> None:
    module, batch = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)), tasks(20)
    exact = gradient(module, batch, "float32")
    rounded = gradient(module, batch, "bfloat16", replay=replay)
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.01  # 2^-9 = 0.002 in each factor


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_autocast_around_changes_nothing(precision: Precision, replay: bool) -> None:
    module, batch = Conv4(1, 3, 16, filters=8), tasks(1, 16, 16)
    plain = gradient(module, batch, precision, replay=replay)
    with torch.autocast("cpu", torch.bfloat16):
        around = gradient(module, batch, precision, replay=replay)
    assert torch.equal(plain, around)


def test_replay_rounds_alike() -> None:
    module, batch = Conv4(1, 3, 16, filters=8), tasks(1, 16, 16)
    plain, replayed = (gradient(module, batch, "bfloat16", replay=r) for r in (False, True))
    assert torch.equal(plain, replayed)


def test_a_fast_block_takes_what_autocast_rounded() -> None:
    block = ConvBlock(4, 4, 8, **BLOCK)
    before = nn.Conv2d(1, 4, 1, bias=False)  # a bias would make its output float32 again
    after, batch = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), tasks(1, 8, 8)
    found, expected = (
        gradient(nn.Sequential(before, between, block, after), batch, "bfloat16")
        for between in (nn.Identity(), ToFloat32())
    )
    assert torch.equal(found, expected)


def test_losses_are_float32() -> None:
    learner = MetaLearner(
        nn.Linear(20, 3, bias=False), maml(1, 0.1), F.cross_entropy, precision="bfloat16"
    )
    _, metrics = learner.meta_gradient(tasks(20))
    assert metrics.loss.dtype == torch.float32
    assert learner.predict(tasks(20), 2).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_a_rounded_module_are_float32(dtype: torch.dtype) -> None:
    y = torch.arange(300).remainder(3).expand(2, 300)
    x = torch.randn(2, 300, 4, dtype=dtype)
    algorithm = replace(maml(1, 0.1), outer=SGD(0.1))  # Adam refuses float16
    learner = MetaLearner(nn.Linear(4, 3, dtype=dtype), algorithm, F.cross_entropy)
    scores = learner.evaluate(TaskBatch(x, y, x, y), 2)
    assert scores.loss.dtype == torch.float32
    shares = scores.metric * 300  # which 8 bits cannot hold
    torch.testing.assert_close(shares, shares.round(), atol=1e-3, rtol=0)


def test_float64_is_not_rounded(float64: None) -> None:
    found = []
    for precision in get_args(Precision):
        torch.manual_seed(0)
        block = ConvBlock(4, 4, 8, **BLOCK)
        module = nn.Sequential(block, nn.Flatten(), nn.Linear(64, 3))
        learner = MetaLearner(module, maml(1, 0.1), F.cross_entropy, precision=precision)
        found.append(learner.meta_gradient(tasks(4, 8, 8))[0]["0.conv.weight"])
    assert all(torch.equal(each, found[0]) for each in found)


def precisions() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize(
    ("precision", "within"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")]
)
def test_a_gpu_is_told_and_told_back(precision: Precision, within: str) -> None:
    seen = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(precisions())
            return super().forward(x)

    before = precisions()
    learner = MetaLearner(Noting(4, 3), maml(1, 0.1), F.cross_entropy, precision=precision)
    learner.step(tasks(4))
    learner.evaluate(tasks(4), 2)
    assert set(seen) == {(within, within)}
    assert precisions() == before


def test_a_gpu_is_still_told_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Replay.__call__

    def noting(*arguments: Any, **keywords: Any) -> Any:
        outputs = real(*arguments, **keywords)  # a graph is captured at its end
        seen.append(precisions())
        return outputs

    monkeypatch.setattr(Replay, "__call__", noting)
    gradient(nn.Linear(4, 3), tasks(4), "tf32", replay=True)
    assert seen == [("tf32", "tf32")] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_is_close_but_not_float32() -> None:
    module, batch = Conv4(1, 3, 16, filters=8).cuda(), tasks(1, 16, 16).to("cuda")
    exact, rounded = (gradient(module, batch, p) for p in ("float32", "tf32"))
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.02


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("use", ["batch", "support", "running"])
def test_batch_norms_of_rounded_images(vectorize, affine, dims, use):
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dims - 1]
    torch.manual_seed(0)
    module = nn.Sequential(conv(2, 8, 3), norm(8, affine=affine), nn.Flatten(), nn.LazyLinear(3))
    batch = tasks(2, *[6] * dims)
    module(batch.x_support[0])
    algorithm = replace(maml(1, 0.01), norm_statistics=NormStatistics(use))
    found = {}
    for precision in ("float32", "bfloat16"):
        learner = MetaLearner(
            module, algorithm, F.cross_entropy, precision=precision, vectorize=vectorize
        )
        found[precision] = learner.meta_gradient(batch)[0]
    of_conv = [gradients["0.weight"] for gradients in found.values()]
    assert 0 < (of_conv[0] - of_conv[1]).norm() < 0.05 * of_conv[0].norm()
