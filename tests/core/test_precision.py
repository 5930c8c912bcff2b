"""Rounded products: rounded indeed, by as much as promised, and only while they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep import MetaLearner, TaskBatch, maml
from fewstep.core.precision import Precision
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


BLOCK = {"norm": "batch", "downsample": "max-pool", "activation": "leaky-relu", "bias": False}
MODULES = {
    "linear": (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)), (20,)),
    "fast block": (lambda: Conv4(1, 3, 16, filters=8, activation="leaky-relu"), (1, 16, 16)),
    "a convolution before it": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 1), ConvBlock(4, 4, 8, **BLOCK), nn.Flatten(), nn.Linear(64, 3)
        ),
        (1, 8, 8),
    ),
}


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize(("build", "shape"), MODULES.values(), ids=MODULES)
def test_bfloat16_is_close_but_not_float32(
    build: Callable[[], nn.Module], shape: tuple[int, ...], replay: bool
) -> None:
    module, batch = build(), tasks(*shape)
    exact = gradient(module, batch, "float32")
    rounded = gradient(module, batch, "bfloat16", replay=replay)
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.1  # 2^-9 = 0.002 in each factor; activations at their bend jump


def test_replay_rounds_alike() -> None:
    build, shape = MODULES["fast block"]
    module, batch = build(), tasks(*shape)
    plain, replayed = (gradient(module, batch, "bfloat16", replay=r) for r in (False, True))
    assert torch.equal(plain, replayed)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_is_close_but_not_float32() -> None:
    build, shape = MODULES["fast block"]
    module, batch = build().cuda(), tasks(*shape).to("cuda")
    exact, rounded = (gradient(module, batch, p) for p in ("float32", "tf32"))
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.02
