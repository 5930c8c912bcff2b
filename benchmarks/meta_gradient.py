"""One meta-gradient, fewstep against its peers, in one process.

    python benchmarks/meta_gradient.py [--out results/benchmarks/meta_gradient.json]

Every way computes the same meta-gradient of the same network on the same tasks; that is checked
before anything is timed. The ways take turns, so that a slow moment of the machine meets all.
`higher` and `torchopt` come with `pip install -e ".[benchmark]"`; without them their rows are left
out, and the table says so.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fewstep
from fewstep.models import Conv4, sinusoid_mlp
from fewstep.training.allocator import keep_freed_memory
from fewstep.training.run_folder import command_line, environment, write_json

Gradient = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """What to differentiate."""

    name: str
    num_steps: int
    inner_lr: float
    order: Literal[1, 2]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: fewstep.TaskBatch
    ours: nn.Module  # built of our blocks
    plain: nn.Module  # the same function and parameters of PyTorch's layers

    def double(self) -> Case:
        """Return the same case in float64."""
        tensors = (t.double() if t.is_floating_point() else t for t in self.batch.tensors())
        return replace(
            self,
            batch=fewstep.TaskBatch(*tensors),
            ours=copy.deepcopy(self.ours).double(),
            plain=copy.deepcopy(self.plain).double(),
        )


def plain_conv4(ways: int) -> nn.Sequential:
    """Return Conv4 as anyone would write it; the bias that batch norm cancels is left out."""
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        layers += [
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, ways))


def omniglot_case(num_steps: int, order: Literal[1, 2], tasks: int = 8, ways: int = 5) -> Case:
    """Return Conv4-64, 28x28, 5-way 1-shot with 1 query image a class."""
    labels = torch.arange(ways).expand(tasks, ways)
    images = torch.rand(2, tasks, ways, 1, 28, 28)
    ours, plain = Conv4(1, ways, 28), plain_conv4(ways)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    batch = fewstep.TaskBatch(images[0], labels, images[1], labels)
    name = f"Conv4-64 {ways}-way 1-shot, {tasks} tasks"
    return Case(name, num_steps, 0.1, order, F.cross_entropy, batch, ours, plain)


def sinusoid_case(num_steps: int, order: Literal[1, 2], tasks: int = 25) -> Case:
    """Return the sinusoid network with 10 support and 10 query points."""
    x, y = torch.randn(2, tasks, 10, 1), torch.randn(2, tasks, 10, 1)
    batch = fewstep.TaskBatch(x[0], y[0], x[1], y[1])
    net = sinusoid_mlp()
    return Case(f"sinusoid MLP, {tasks} tasks", num_steps, 0.01, order, F.mse_loss, batch, net, net)


def with_fewstep(case: Case, module: nn.Module) -> Gradient:
    """Return the meta-gradient by this library."""
    recipe = fewstep.maml if case.order == 2 else fewstep.fomaml
    learner = fewstep.MetaLearner(
        module, recipe(case.num_steps, case.inner_lr), case.loss, chunk_size=len(case.batch)
    )
    return lambda: list(learner.meta_gradient(case.batch)[0].values())


def with_loop(case: Case) -> Gradient:
    """Return the meta-gradient by a plain loop over tasks and `torch.autograd.grad`."""
    phi = dict(case.plain.named_parameters())

    def gradient() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in phi.values()]
        for task in zip(*case.batch.tensors(), strict=True):
            x_support, y_support, x_query, y_query = task
            theta: dict[str, Tensor] = dict(phi)
            for _ in range(case.num_steps):
                loss = case.loss(functional_call(case.plain, theta, (x_support,)), y_support)
                s = torch.autograd.grad(loss, list(theta.values()), create_graph=case.order == 2)
                theta = {
                    n: p - case.inner_lr * g for (n, p), g in zip(theta.items(), s, strict=True)
                }
            query = case.loss(functional_call(case.plain, theta, (x_query,)), y_query)
            parts = torch.autograd.grad(query / len(case.batch), list(phi.values()))
            total = [t + part for t, part in zip(total, parts, strict=True)]
        return total

    return gradient


def with_higher(case: Case) -> Gradient:
    """Return the meta-gradient by `higher`, of second order."""
    import higher

    inner = torch.optim.SGD(case.plain.parameters(), lr=case.inner_lr)

    def gradient() -> list[Tensor]:
        case.plain.zero_grad()
        for x_support, y_support, x_query, y_query in zip(*case.batch.tensors(), strict=True):
            with higher.innerloop_ctx(
                case.plain,
                inner,
                copy_initial_weights=False,
            ) as (net, optimiser):
                for _ in range(case.num_steps):
                    optimiser.step(case.loss(net(x_support), y_support))
                (case.loss(net(x_query), y_query) / len(case.batch)).backward()
        return [p.grad.clone() for p in case.plain.parameters() if p.grad is not None]

    return gradient


def with_torchopt(case: Case) -> Gradient:
    """Return the meta-gradient by `torchopt`; it has no first order."""
    import torchopt

    net = case.plain
    inner = torchopt.MetaSGD(net, lr=case.inner_lr)
    phi = list(net.parameters())

    def gradient() -> list[Tensor]:
        start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        start_inner = torchopt.extract_state_dict(inner, by="reference")
        total = [torch.zeros_like(p) for p in phi]
        for x_support, y_support, x_query, y_query in zip(*case.batch.tensors(), strict=True):
            for _ in range(case.num_steps):
                inner.step(case.loss(net(x_support), y_support))
            query = case.loss(net(x_query), y_query) / len(case.batch)
            parts = torch.autograd.grad(query, phi)
            total = [t + part for t, part in zip(total, parts, strict=True)]
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, start_inner)
        return total

    return gradient


def ways_of(case: Case) -> dict[str, Gradient]:
    """Return every way that is installed and applies."""
    ways = {"fewstep": with_fewstep(case, case.ours), "plain loop": with_loop(case)}
    if isinstance(case.ours, Conv4):
        ways["fewstep, plain layers"] = with_fewstep(case, case.plain)
    # At order 1, higher drops its graph and with it the path from phi to theta[K].
    if importlib.util.find_spec("higher") and case.order == 2:
        ways["higher"] = with_higher(case)
    if importlib.util.find_spec("torchopt") and case.order == 2:
        ways["torchopt"] = with_torchopt(case)
    return ways


def check_agreement(case: Case) -> float:
    """Return the largest difference from the plain loop in float64, relative to its largest entry.

    Raises:
        AssertionError: two ways differ by more than rounding.
    """
    ways = ways_of(case.double())
    reference = torch.cat([g.flatten() for g in ways["plain loop"]()])
    worst = 0.0
    for name, way in ways.items():
        gradient = torch.cat([g.flatten() for g in way()])
        difference = float((gradient - reference).abs().max() / reference.abs().max())
        assert difference < 1e-9, f"{name} differs from the plain loop by {difference:.1e}"
        worst = max(worst, difference)
    return worst


def measure(ways: dict[str, Gradient], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every way, in turns, after one unmeasured turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main(repeats: int = 9, keep_memory: bool = True, out: Path | None = None) -> None:
    """Compare one meta-gradient with the peers'.

    Args:
        repeats: Measured turns.
        keep_memory: Tell the C library to keep freed memory, as `fewstep train` does; it serves
            every way alike.
        out: JSON file for the numbers.
    """
    torch.manual_seed(0)
    if keep_memory:
        keep_freed_memory()
    orders: tuple[Literal[1, 2], ...] = (2, 1)
    cases = [make(k, o) for make in (omniglot_case, sinusoid_case) for o in orders for k in (1, 5)]
    table = Table("case", "steps", "order", "way", "median s", "min-max s", "x fewstep")
    rows = []
    for case in cases:
        worst = check_agreement(case)
        ways = ways_of(case)
        seconds = measure(ways, repeats)
        base = statistics.median(seconds["fewstep"])
        for name, s in seconds.items():
            median = statistics.median(s)
            row = {
                "case": case.name, "steps": case.num_steps, "order": case.order, "way": name,
                "median_s": median, "min_s": min(s), "max_s": max(s), "ratio": median / base,
                "largest_difference": worst,
            }  # fmt: skip
            rows.append(row)
            table.add_row(
                case.name, str(case.num_steps), str(case.order), name, f"{median:.4f}",
                f"{min(s):.4f}-{max(s):.4f}", f"{median / base:.2f}",
            )  # fmt: skip
        table.add_section()
    Console(width=120).print(table)
    missing = [n for n in ("higher", "torchopt") if not importlib.util.find_spec(n)]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"rows": rows, "environment": environment(command_line(), "cpu")})


if __name__ == "__main__":
    tyro.cli(main)
