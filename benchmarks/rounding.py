"""How exact float32 meta-gradients of Conv4 are, with our kernels and with PyTorch's operations.

    python benchmarks/rounding.py [--out results/benchmarks/rounding.json]

The truth is float64's. Where rounding makes a maximum or the sign of an activation another one, the
gradient is that of another piece of the function, so such draws are counted apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from fewstep import MetaLearner, TaskBatch, maml
from fewstep.models import Conv4, kernels
from fewstep.models.convolution import Space, convolve, gradients
from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json
from options import options_of


@dataclass(frozen=True)
class Options:
    """Compare float32 with float64 on random Omniglot-sized tasks."""

    draws: int = 48
    """Draws of a task and of initial parameters."""
    ways: int = 5
    """Classes of the task."""
    num_steps: int = 3
    """Inner steps."""
    flipped: float = 1e-4
    """Relative error from which a maximum or a sign is taken to have flipped."""
    out: Path | None = None
    """JSON file for the numbers."""


def meta_gradient(options: Options, seed: int, dtype: torch.dtype) -> Tensor:
    """Return the second-order meta-gradient of one draw, as one vector."""
    torch.manual_seed(seed)
    model = Conv4(1, options.ways, 28).to(dtype)
    x = torch.rand(2, 1, options.ways, 1, 28, 28).to(dtype)
    y = torch.arange(options.ways)[None]
    learner = MetaLearner(model, maml(options.num_steps, inner_lr=0.1), F.cross_entropy)
    found, _ = learner.meta_gradient(TaskBatch(x[0], y, x[1], y))
    return torch.cat([g.flatten() for g in found.values()])


def convolution(_: Options, seed: int, dtype: torch.dtype) -> Tensor:
    """Return a convolution of the second block's and both of its gradients, as one vector."""
    torch.manual_seed(seed)
    shapes = (5, 64, 14, 14), (64, 64, 3, 3), (5, 64, 14, 14)
    x, w, g = (
        torch.randn(s).to(dtype).contiguous(memory_format=torch.channels_last) for s in shapes
    )
    y = convolve((x, w), Space(), 1)
    results = (y, *gradients(g, x, w, Space(), 1, by_x=True, by_w=True))
    return torch.cat([(r / r.norm()).flatten() for r in results])


def errors(options: Options, of: Callable[[Options, int, torch.dtype], Tensor]) -> list[float]:
    """Return |a32 - a64| / |a64| of every draw."""
    found = []
    for seed in track(range(options.draws), of.__name__):
        a32, a64 = (of(options, seed, dtype).double() for dtype in (torch.float32, torch.float64))
        found.append(float((a32 - a64).norm() / a64.norm()))
    return found


def main() -> None:
    """Print the median of each, and how many draws flipped."""
    options = options_of(Options)
    if kernels.library() is None:
        raise SystemExit("there are no kernels to compare with: install a C++ compiler")
    found = {}
    for of in (convolution, meta_gradient):
        found[of.__name__] = {"kernels": errors(options, of)}
        with patch.object(kernels, "library", lambda: None):
            found[of.__name__]["PyTorch"] = errors(options, of)
    for name, by_way in found.items():
        for way, off in by_way.items():
            kept = [error for error in off if error < options.flipped]
            Console().print(
                f"{name} by {way}: {statistics.median(kept):.1e}, "
                f"{len(off) - len(kept)} of {len(off)} flipped"
            )
    if options.out is not None:
        settings = {k: v for k, v in asdict(options).items() if k != "out"}
        about = environment(command_line(), "cpu")
        write_json(options.out, {"environment": about, "settings": settings, "errors": found})


if __name__ == "__main__":
    main()
