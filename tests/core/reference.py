"""MAML written plainly, and a registry of models to try it on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import Algorithm, ClipByNorm, TaskBatch
from fewstep.core.metrics import Metrics
from fewstep.models import Conv4, fully_connected, sinusoid_mlp

WAYS = 3
ROUTES: dict[str, dict[str, int]] = {  # to the same gradient
    "at once": {},
    "a step's graph": {"checkpoint_every": 1},
    "two steps' graph": {"checkpoint_every": 2},
    "loop": {"vectorize": False},
    "a task at a time": {"chunk_size": 1},
    "replayed": {"replay": True},
}


@sdpa_kernel(SDPBackend.MATH)
def plain_meta_gradient(
    module: nn.Module,
    algorithm: Algorithm,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: TaskBatch,
    adapted: list[str] | None = None,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Return the meta-gradient, the meta-loss and the mean buffers, by a loop over the tasks."""
    module.train()
    phi = {name: p for name, p in module.named_parameters() if p.requires_grad}
    adapted = list(phi) if adapted is None else adapted
    losses, states = [], []
    for x_support, y_support, x_query, y_query in zip(*batch.tensors(), strict=True):
        theta = dict(phi)
        state = {name: b.clone() for name, b in module.named_buffers()}
        for _ in range(algorithm.num_steps):
            support = loss(functional_call(module, (theta, state), (x_support,)), y_support)
            gradient = torch.autograd.grad(
                support,
                [theta[name] for name in adapted],
                create_graph=algorithm.derivative_order(0) == 2,
            )
            if isinstance(algorithm.inner_clipping, ClipByNorm):
                norm = torch.sqrt(sum(g.square().sum() for g in gradient))
                if norm > algorithm.inner_clipping.limit:
                    gradient = [g * algorithm.inner_clipping.limit / norm for g in gradient]
            for name, g in zip(adapted, gradient, strict=True):
                theta[name] = theta[name] - algorithm.inner_rate.inner_lr * g
        losses.append(loss(functional_call(module, (theta, state), (x_query,)), y_query))
        states.append(state)
    meta_loss = torch.stack(losses).mean()
    gradient = torch.autograd.grad(meta_loss, list(phi.values()))
    buffers = {name: torch.stack([s[name].double() for s in states]).mean(0) for name in states[0]}
    return dict(zip(phi, gradient, strict=True)), meta_loss.detach(), buffers


def numbers(metrics: Metrics) -> list[Tensor]:
    """Return all that metrics hold but the metric's name."""
    return [value for value in vars(metrics).values() if isinstance(value, Tensor)]


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return |actual - expected| / |expected|, each dict one long vector."""
    assert actual.keys() == expected.keys()
    a = torch.cat([actual[name].flatten() for name in expected])
    b = torch.cat([expected[name].flatten() for name in expected])
    return float((a - b).norm() / b.norm())


class Recurrent(nn.Module):
    """The last state of a recurrent network, through a linear layer."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.rnn, nn.RNNBase):
            return self.head(self.rnn(x)[0][:, -1])
        state = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            state = self.rnn(x[:, t], state)
        return self.head(state)


class Transformer(nn.Module):
    """One encoder layer; its default attention kernel has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def batch_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, WAYS),
    )


def two_blocks() -> nn.Module:
    """Two of a Conv4's blocks: one of data, and one as the others."""
    module = nn.Sequential(Conv4(1, WAYS, 16, filters=4).blocks[:2], nn.Flatten())
    module.add_module("head", nn.Linear(64, WAYS))
    return module


@dataclass(frozen=True)
class Case:
    """A model, the shape of one of its examples, and its loss."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def batch(self, tasks: int = 3, examples: int = 2 * WAYS) -> TaskBatch:
        """Return random tasks."""
        x = torch.randn(2, tasks, examples, *self.shape)
        if self.loss is F.mse_loss:
            y = torch.randn(2, tasks, examples, 1)
        else:
            y = torch.arange(examples).remainder(WAYS).expand(2, tasks, examples)
        return TaskBatch(x[0], y[0], x[1], y[1])


MODELS = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, WAYS)), (4,)),
    "batch norm": Case(batch_norm_cnn, (1, 6, 6)),
    "layer norm": Case(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, WAYS)),
        (4,),
    ),
    "group norm": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, WAYS)
        ),
        (1, 6, 6),
    ),
    "transformer": Case(Transformer, (5, 8)),
    "GRU cell": Case(lambda: Recurrent(nn.GRUCell(3, 4)), (5, 3)),
    "LSTM": Case(lambda: Recurrent(nn.LSTM(3, 4, batch_first=True)), (5, 3)),
    "Conv4": Case(lambda: Conv4(1, WAYS, 16, filters=4), (1, 16, 16)),
    "Conv4 layer norm": Case(
        lambda: Conv4(1, WAYS, 16, filters=4, norm="layer", activation="leaky-relu"), (1, 16, 16)
    ),
    "Conv4 features": Case(
        lambda: Conv4(1, WAYS, 16, filters=4, projection=True, unit_features=True),
        (1, 16, 16),
    ),
    "Conv4 cosine head": Case(lambda: Conv4(1, WAYS, 16, filters=4, head="cosine"), (1, 16, 16)),
    "fully connected": Case(lambda: fully_connected(16, WAYS), (1, 4, 4)),
    "sinusoid MLP": Case(lambda: sinusoid_mlp(hidden=8), (1,), F.mse_loss),
}
