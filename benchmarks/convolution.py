"""The convolutions of a Conv4 meta-gradient, each task with filters of its own: FLOP/s by layout.

    python benchmarks/convolution.py [--device cuda] [--out results/benchmarks/convolution.json]

First all ways must give the same in float64. The share is that of the speed of a large product of
float32 matrices, measured beside them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from fewstep.core.allocator import keep_freed_memory
from fewstep.core.precision import fp32_products
from fewstep.models.convolution import Space, convolve, gradients
from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json
from meta_gradient import flop_per_second, turn
from options import options_of


@dataclass(frozen=True)
class Options:
    """Compare layouts of 3x3 convolutions with filters for each task."""

    tasks: int = 8
    """Tasks of a meta-gradient."""
    examples: int = 5
    """Images of a task: 5 for 5-way 1-shot, 20 for 20-way."""
    channels: int = 64
    """Channels of every block."""
    sizes: tuple[int, ...] = (14, 7, 3)
    """Heights and widths: those of the second, third and fourth block on Omniglot."""
    repeats: int = 7
    """Turns to take the median of."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    out: Path | None = None
    """JSON file for the numbers."""


class Arguments(NamedTuple):
    """Images x (tasks, examples, c, h, w), filters w (tasks, o, c, 3, 3), gradients g like y."""

    x: Tensor
    w: Tensor
    g: Tensor


Results = tuple[Tensor, Tensor, Tensor]  # y, gradient by x, gradient by w, as Arguments are
Passes = tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def grouped(a: Arguments, memory_format: torch.memory_format) -> tuple[Passes, Any]:
    """Tasks beside the channels, as groups of one convolution."""
    tasks = len(a.x)
    x, g = (t.transpose(0, 1).flatten(1, 2).contiguous(memory_format=memory_format)
            for t in (a.x, a.g))  # fmt: skip
    w = a.w.flatten(0, 1).contiguous(memory_format=memory_format)

    def backward(wants: list[bool]) -> list[Any]:
        return list(torch.ops.aten.convolution_backward(
            g, x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), tasks, [*wants, False]
        ))  # fmt: skip

    def shaped(y: Tensor, gx: Tensor, gw: Tensor) -> Results:
        return (
            y.unflatten(1, (tasks, -1)).transpose(0, 1),
            gx.unflatten(1, (tasks, -1)).transpose(0, 1),
            gw.unflatten(0, (tasks, -1)),
        )

    passes = (
        lambda: F.conv2d(x, w, padding=1, groups=tasks),
        lambda: backward([True, False])[0],
        lambda: backward([False, True])[1],
    )
    return passes, shaped


def by_kernel(a: Arguments) -> tuple[Passes, Any]:
    """The same by our kernels, which make fewer multiplications."""
    tasks = len(a.x)
    _, shaped = grouped(a, torch.channels_last)
    x, g = (t.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
            for t in (a.x, a.g))  # fmt: skip
    w = a.w.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    passes = (
        lambda: convolve((x, w), Space(), tasks),
        lambda: gradients(g, x, w, Space(), tasks, by_x=True, by_w=False)[0],
        lambda: gradients(g, x, w, Space(), tasks, by_x=False, by_w=True)[1],
    )
    return passes, shaped


def products(a: Arguments) -> tuple[Passes, Any]:
    """Batched products of patches and filters."""
    tasks, examples, _, height, width = a.x.shape
    w = a.w.flatten(2)
    g = a.g.transpose(1, 2).flatten(2)  # (tasks, o, examples x h x w)

    def patches() -> Tensor:
        columns = F.unfold(a.x.flatten(0, 1), 3, padding=1).view(tasks, examples, w.shape[2], -1)
        return columns.transpose(1, 2).flatten(2)

    def by_input() -> Tensor:
        columns = (w.mT @ g).unflatten(2, (examples, -1)).transpose(1, 2).flatten(0, 1)
        return F.fold(columns, (height, width), 3, padding=1)

    def shaped(y: Tensor, gx: Tensor, gw: Tensor) -> Results:
        y = y.unflatten(2, (examples, height, width)).transpose(1, 2)
        return y, gx.unflatten(0, (tasks, examples)), gw.view(a.w.shape)

    return (lambda: w @ patches(), by_input, lambda: g @ patches().mT), shaped


def one_by_one(a: Arguments) -> tuple[Passes, Any]:
    """A convolution for each task."""

    def each(of: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([of(task) for task in range(len(a.x))])

    shape, filters = a.x.shape[1:], a.w.shape[1:]
    passes = (
        lambda: each(lambda j: F.conv2d(a.x[j], a.w[j], padding=1)),
        lambda: each(lambda j: conv2d_input(shape, a.w[j], a.g[j], padding=1)),
        lambda: each(lambda j: conv2d_weight(a.x[j], filters, a.g[j], padding=1)),
    )
    return passes, lambda *results: results


WAYS: dict[str, Callable[[Arguments], tuple[Passes, Any]]] = {
    "grouped, channels last": lambda a: grouped(a, torch.channels_last),
    "grouped, contiguous": lambda a: grouped(a, torch.contiguous_format),
    "grouped, our kernels": by_kernel,
    "batched products": products,
    "one by one": one_by_one,
}


def arguments(options: Options, size: int, dtype: torch.dtype) -> Arguments:
    """Return random arguments."""
    torch.manual_seed(0)
    n, m, c = options.tasks, options.examples, options.channels
    shapes = (n, m, c, size, size), (n, c, c, 3, 3), (n, m, c, size, size)
    return Arguments(*(torch.randn(s, dtype=dtype, device=options.device) for s in shapes))


def check(options: Options, size: int) -> None:
    """Refuse to go on unless all ways give the same.

    Raises:
        SystemExit: one differs by more than 1e-12 of the largest entry.
    """
    reference: Results | None = None
    for way, build in WAYS.items():
        passes, shaped = build(arguments(options, size, torch.float64))
        found = shaped(*(each() for each in passes))
        reference = reference or found
        for a, b in zip(found, reference, strict=True):
            if not (a - b).abs().max() <= 1e-12 * b.abs().max():
                raise SystemExit(f"{way} differs from {next(iter(WAYS))} at size {size}")


@fp32_products("float32")
def main() -> None:
    """Measure every size, way and pass, and print FLOP/s."""
    options = options_of(Options)
    keep_freed_memory()
    best = flop_per_second(options.device)
    table = Table("size", "way", title=f"GFLOP/s (share of {best / 1e9:.0f}, a large product)")
    for name in ("forward", "gradient of x", "gradient of w"):
        table.add_column(name, justify="right")
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        check(options, size)
        work = 2 * 9 * options.tasks * options.examples * options.channels**2 * size**2
        built = {w: build(arguments(options, size, torch.float32))[0] for w, build in WAYS.items()}
        seconds: dict[str, list[list[float]]] = {way: [[], [], []] for way in WAYS}
        for _ in range(options.repeats):  # in turns, so that a slow moment meets all
            for way, passes in built.items():
                for times, each in zip(seconds[way], passes, strict=True):
                    times.append(turn(lambda each=each: [each()]))  # type: ignore[misc]
        for way, by_pass in seconds.items():
            speeds = [work / statistics.median(times) for times in by_pass]
            table.add_row(str(size), way, *(f"{s / 1e9:.0f} ({s / best:.0%})" for s in speeds))
            rows.append({"size": size, "way": way, "flop_per_second": speeds, "seconds": by_pass})
    Console().print(table)
    if options.out is not None:
        settings = {k: v for k, v in asdict(options).items() if k != "out"}
        about = environment(command_line(), options.device)
        found = {"environment": about, "settings": settings, "large_product": best, "rows": rows}
        write_json(options.out, found)


if __name__ == "__main__":
    main()
