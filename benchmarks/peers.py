"""Every way to compute one and the same meta-gradient: ours, the peers' and a plain loop's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fewstep
from fewstep.models import Conv4, sinusoid_mlp

Gradient = Callable[[], list[Any]]
"""Returns the arrays of the package that computes them, which have `__dlpack__`."""


@dataclass(frozen=True)
class Case:
    """What to differentiate: Conv4 on images, or the sinusoid network on points."""

    name: str
    num_steps: int
    order: Literal[1, 2]
    tasks: int
    ways: int = 5
    channels: int = 1
    size: int = 28  # 0 for the sinusoid network
    filters: int = 64
    chunk_size: int = 8
    device: str = "cpu"

    @property
    def inner_lr(self) -> float:
        """Return a rate at which the trajectory stays near its start, so that ways can agree."""
        return 0.01

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""
        return (F.cross_entropy if self.size else F.mse_loss)(outputs, targets)

    def batch(self, dtype: torch.dtype) -> fewstep.TaskBatch:
        """Return the tasks, one query example for each support example."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.ways, self.channels, self.size, self.size) if self.size else (10, 1)
        x = torch.rand(2, self.tasks, *shape, generator=generator).to(dtype)
        if self.size:
            y = torch.arange(self.ways).expand(2, self.tasks, self.ways)
        else:
            y = torch.rand(2, self.tasks, *shape, generator=generator).to(dtype)
        return fewstep.TaskBatch(x[0], y[0], x[1], y[1]).to(self.device)

    def ours(self, dtype: torch.dtype) -> nn.Module:
        """Return the network of our blocks."""
        torch.manual_seed(0)
        if not self.size:
            return sinusoid_mlp().to(self.device, dtype)
        net = Conv4(self.channels, self.ways, self.size, filters=self.filters)
        return net.to(self.device, dtype)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """Return the same network and parameters of PyTorch's layers."""
        ours = self.ours(dtype)
        if not self.size:
            return ours
        layers: list[nn.Module] = []
        for channels in (self.channels, *[self.filters] * 3):
            conv = nn.Conv2d(channels, self.filters, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(self.filters), nn.ReLU(), nn.MaxPool2d(2)]
        side = self.size // 16
        head = nn.Linear(self.filters * side * side, self.ways)
        net = nn.Sequential(*layers, nn.Flatten(), head).to(self.device, dtype)
        with torch.no_grad():
            for p, q in zip(net.parameters(), ours.parameters(), strict=True):
                p.copy_(q)
        return net


def with_fewstep(
    case: Case, dtype: torch.dtype, *, of_pytorch: bool = False, **options: Any
) -> Gradient:
    """Return the meta-gradient by this library, of its own blocks or of PyTorch's layers."""
    recipe = fewstep.maml if case.order == 2 else fewstep.fomaml
    learner = fewstep.MetaLearner(
        case.plain(dtype) if of_pytorch else case.ours(dtype),
        recipe(case.num_steps, case.inner_lr),
        case.loss,
        chunk_size=case.chunk_size,
        **options,
    )
    batch = case.batch(dtype)
    return lambda: list(learner.meta_gradient(batch)[0].values())


RECORDED = partial(with_fewstep, replay=True)  # in the first call


def with_least_memory(case: Case, dtype: torch.dtype) -> Gradient:
    """Return it with the graph of one inner step of one task at a time."""
    return with_fewstep(replace(case, chunk_size=1), dtype, checkpoint_every=1)


def without_compiler(case: Case, dtype: torch.dtype) -> Gradient:
    """Return it recorded, by PyTorch's operations alone, as where there is no C++ compiler."""
    os.environ["CXX"] = ""  # of this way's process
    return RECORDED(case, dtype)


def with_loop(case: Case, dtype: torch.dtype) -> Gradient:
    """Return it by a plain loop over tasks and `torch.autograd.grad`."""
    net, batch = case.plain(dtype), case.batch(dtype)
    phi = dict(net.named_parameters())

    def gradient() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in phi.values()]
        for x_support, y_support, x_query, y_query in zip(*batch.tensors(), strict=True):
            theta: dict[str, Tensor] = dict(phi)
            for _ in range(case.num_steps):
                loss = case.loss(functional_call(net, theta, (x_support,)), y_support)
                s = torch.autograd.grad(loss, list(theta.values()), create_graph=case.order == 2)
                theta = {
                    n: p - case.inner_lr * g for (n, p), g in zip(theta.items(), s, strict=True)
                }
            query = case.loss(functional_call(net, theta, (x_query,)), y_query)
            parts = torch.autograd.grad(query / case.tasks, list(phi.values()))
            total = [t + part for t, part in zip(total, parts, strict=True)]
        return total

    return gradient


def with_higher(case: Case, dtype: torch.dtype) -> Gradient:
    """Return it by `higher`."""
    import higher

    net, batch = case.plain(dtype), case.batch(dtype)
    inner = torch.optim.SGD(net.parameters(), lr=case.inner_lr)

    def gradient() -> list[Tensor]:
        net.zero_grad()
        for x_support, y_support, x_query, y_query in zip(*batch.tensors(), strict=True):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, optimiser):
                for _ in range(case.num_steps):
                    optimiser.step(case.loss(fnet(x_support), y_support))
                (case.loss(fnet(x_query), y_query) / case.tasks).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    return gradient


def with_torchopt(case: Case, dtype: torch.dtype) -> Gradient:
    """Return it by `torchopt`."""
    import torchopt

    net, batch = case.plain(dtype), case.batch(dtype)
    inner = torchopt.MetaSGD(net, lr=case.inner_lr)
    phi = list(net.parameters())

    def gradient() -> list[Tensor]:
        start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        start_inner = torchopt.extract_state_dict(inner, by="reference")
        total = [torch.zeros_like(p) for p in phi]
        for x_support, y_support, x_query, y_query in zip(*batch.tensors(), strict=True):
            for _ in range(case.num_steps):
                inner.step(case.loss(net(x_support), y_support))
            query = case.loss(net(x_query), y_query) / case.tasks
            parts = torch.autograd.grad(query, phi)
            total = [t + part for t, part in zip(total, parts, strict=True)]
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, start_inner)
        return total

    return gradient


def with_parallel_metalearn(case: Case, dtype: torch.dtype) -> Gradient:
    """Return it by `parallel-metalearn`.

    Its layers take keywords that PyTorch's do not, so the network is put together anew.
    """
    from metalearn.algorithms import MAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.nn_models.basic_layers.BatchNormalization import BatchNorm

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = case.plain(dtype)
            for name, layer in self.layers.named_children():
                if isinstance(layer, nn.BatchNorm2d):
                    norm = BatchNorm(layer.num_features, track_running_stats=False)
                    norm.load_state_dict({"weight": layer.weight, "bias": layer.bias})
                    setattr(self.layers, name, norm.to(layer.weight))

        def get_fast_weights(self) -> dict[str, nn.Parameter]:
            return dict(self.named_parameters())

        def forward(self, x: Tensor, training: bool, num_step: int) -> dict[str, Any]:
            return {"logits": self.layers(x), "buffers": {}}

    class Loss(nn.Module):
        def forward(self, out_dict: dict[str, Tensor], targets: Tensor, **_: Any) -> Any:
            loss = case.loss(out_dict["logits"], targets)
            return loss, loss.detach()

    net, batch = Network(), case.batch(dtype)
    weights = net.get_fast_weights()
    inner = InnerSGD(weights, case.order == 1, case.inner_lr, case.num_steps, learn_lr=False)
    for rate in inner.to(dtype).parameters():
        rate.data.fill_(case.inner_lr)  # it was rounded to float32
    learner = MAML(
        model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0), inner_optimizer=inner,
        support_loss_fn=Loss(), inner_steps=case.num_steps, chunk_size=case.chunk_size,
        device=torch.device(case.device),
    )  # fmt: skip

    def gradient() -> list[Tensor]:
        learner.step(iter([batch.tensors()]))
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    return gradient


def with_jax(case: Case, dtype: torch.dtype, *, native: bool) -> Gradient:
    """Return it by JAX: `jit` of `grad` of `vmap`, convolutions its own or as matrix products.

    Channels are last, as suits XLA. The first call compiles. 20 steps of a convolutional network
    are a loop of XLA's: in a row they take twice as long to compile, and no less time to run.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # beside it others have their turns
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", dtype == torch.float64)
    jax.config.update("jax_default_matmul_precision", "highest")  # of itself TF32 on a GPU
    phi = [jnp.asarray(p.detach().cpu().numpy()) for p in case.plain(dtype).parameters()]
    arrays = [jnp.asarray(t.cpu().numpy()) for t in case.batch(dtype).tensors()]
    if case.size:
        arrays[0], arrays[2] = (jnp.moveaxis(a, 2, -1) for a in (arrays[0], arrays[2]))

    def convolve(x: Any, w: Any) -> Any:  # w is (filters, channels, 3, 3)
        if native:
            kernel, numbers = jnp.transpose(w, (2, 3, 1, 0)), ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=numbers
            )
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        kernel = jnp.transpose(w, (2, 3, 1, 0)).reshape(-1, w.shape[0])
        return jnp.concatenate(patches, axis=-1) @ kernel

    def conv4(phi: list[Any], x: Any) -> Any:
        *blocks, weight, bias = phi
        for w, gamma, beta in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
            y = convolve(x, w)
            mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
            z = jax.nn.relu((y - mean) * (gamma * jax.lax.rsqrt(var + 1e-5)) + beta)
            h, w_ = z.shape[1] // 2 * 2, z.shape[2] // 2 * 2
            # jaxlib 0.10 compiles `max` over a reshaped window to wrong derivatives on CPUs
            rows = jnp.maximum(z[:, 0:h:2], z[:, 1:h:2])
            x = jnp.maximum(rows[:, :, 0:w_:2], rows[:, :, 1:w_:2])
        flat = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        return flat @ weight.T + bias

    def mlp(phi: list[Any], x: Any) -> Any:
        *hidden, weight, bias = phi
        for w, b in zip(hidden[::2], hidden[1::2], strict=True):
            x = jax.nn.relu(x @ w.T + b)
        return x @ weight.T + bias

    def loss(phi: list[Any], x: Any, y: Any) -> Any:
        outputs = (conv4 if case.size else mlp)(phi, x)
        if case.size:
            return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1).mean()
        return ((outputs - y) ** 2).mean()

    unroll = 1 if case.size and case.num_steps > 5 else case.num_steps

    def task_loss(phi: list[Any], xs: Any, ys: Any, xq: Any, yq: Any) -> Any:
        def step(theta: list[Any], _: None) -> tuple[list[Any], None]:
            s = jax.grad(loss)(theta, xs, ys)
            if case.order == 1:
                s = jax.lax.stop_gradient(s)
            return [p - case.inner_lr * g for p, g in zip(theta, s, strict=True)], None

        theta, _ = jax.lax.scan(step, phi, length=case.num_steps, unroll=unroll)
        return loss(theta, xq, yq)

    tasks = jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))
    differentiate = jax.jit(jax.grad(lambda phi, *arrays: tasks(phi, *arrays).mean()))

    return lambda: list(jax.block_until_ready(differentiate(phi, *arrays)))


@dataclass(frozen=True)
class Way:
    """How to build a meta-gradient, what must be installed, and where it applies."""

    build: Callable[[Case, torch.dtype], Gradient]
    package: str = "torch"
    orders: tuple[int, ...] = (1, 2)
    where: Callable[[Case], bool] = lambda case: True
    is_tf32: bool = False

    def applies(self, case: Case) -> bool:
        """Whether there is such a way for a case."""
        return case.order in self.orders and self.where(case)

    def is_installed(self) -> bool:
        """Whether its package is here."""
        return importlib.util.find_spec(self.package) is not None


def _has_tf32(case: Case) -> bool:
    return case.device.startswith("cuda") and case.size > 0


WAYS = {
    "fewstep": Way(with_fewstep),
    "fewstep, replay": Way(RECORDED),
    # The network that the peers get.
    "fewstep, PyTorch's layers": Way(
        partial(RECORDED, of_pytorch=True), where=lambda case: case.size > 0
    ),
    "fewstep, no compiler": Way(without_compiler, where=lambda case: case.size > 0),
    "fewstep, checkpoints": Way(partial(with_fewstep, checkpoint_every=1), orders=(2,)),
    "fewstep, least memory": Way(with_least_memory, orders=(2,), where=lambda case: case.size > 0),
    "fewstep, compile": Way(partial(RECORDED, compile=True), where=lambda case: case.size == 0),
    "fewstep, tf32": Way(partial(RECORDED, precision="tf32"), where=_has_tf32, is_tf32=True),
    "fewstep, bfloat16": Way(
        partial(RECORDED, precision="bfloat16"), where=lambda case: case.size > 0
    ),
    "plain loop": Way(with_loop),
    "plain loop, tf32": Way(with_loop, where=_has_tf32, is_tf32=True),
    # At order 1, higher drops its graph and with it the path from phi to theta[K]; torchopt has no
    # first order.
    "higher": Way(with_higher, "higher", orders=(2,)),
    "torchopt": Way(with_torchopt, "torchopt", orders=(2,)),
    "parallel-metalearn": Way(with_parallel_metalearn, "metalearn"),
    "JAX, matmul": Way(partial(with_jax, native=False), "jax"),
    # 9 seconds for 5-way and 5 steps: a batch of filters has no fast kernel.
    "JAX, its convolution": Way(
        partial(with_jax, native=True),
        "jax",
        where=lambda case: case.size == 28 and case.num_steps * case.tasks * case.ways <= 200,
    ),
}
