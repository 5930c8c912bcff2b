"""3x3 convolutions with fewer multiplications, by a kernel compiled once on each machine.

Winograd's F(4x4, 3x3) takes 36 multiplications where a convolution has 144. `winograd.cpp` is the
kernel. It is compiled when first wanted, with the C++ compiler at hand ($CXX, c++, g++ or clang++),
and kept in the cache folder; without one, PyTorch's convolutions do. Its float32 results are as
exact as sums in another order are: 6e-7 of the whole off, where PyTorch's are 2e-7 to 4e-7.

Reference: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cache import cache_folder

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_TARGETS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
_NAMES = {torch.float32: "float", torch.float64: "double"}
_LANES = 16  # channels come in multiples of
_TILE = 4  # height and width of the outputs of a tile
_FEW = 10  # tiles; with fewer, transforming the filters takes longer than it saves


def fits(x: Tensor, weight: Tensor, stride: int, groups: int) -> bool:
    """Whether the kernel takes these images and filters, and saves half of the multiplications."""
    out, channels = weight.shape[0] // groups, weight.shape[1]
    height, width = x.shape[-2:]
    return (
        stride == 1
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _NAMES
        and channels % _LANES == out % _LANES == 0
        and height * width >= 8 * _tiles(x)
        and kernel() is not None
    )


def has_many(x: Tensor) -> bool:
    """Whether there are tiles enough to transform the filters for."""
    return len(x) * _tiles(x) >= _FEW


def _tiles(x: Tensor) -> int:
    height, width = x.shape[-2:]
    return -(-height // _TILE) * -(-width // _TILE)


@cache
def kernel() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None where it cannot be."""
    target = _TARGETS.get(torch.backends.cpu.get_cpu_capability())
    compiler = _compiler()
    if target is None or compiler is None or platform.system() != "Linux":
        return None
    source = _SOURCE.read_bytes()
    command = [compiler, *_FLAGS, target]
    of = hashlib.sha256(source + " ".join(command).encode()).hexdigest()[:12]
    path = cache_folder() / f"winograd-{of}.so"
    try:
        if not path.exists():
            _compile(command, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    if named is not None:  # empty: none
        return shutil.which(named) if named else None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def _compile(command: list[str], path: Path) -> None:
    """Compile to a temporary name and then rename, as other processes may be at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        made = Path(folder, path.name)
        subprocess.run([*command, str(_SOURCE), "-o", str(made)], check=True, capture_output=True)
        made.replace(path)


def convolve(
    x: Tensor, weight: Tensor, x2: Tensor | None, weight2: Tensor | None, groups: int, turned: bool
) -> Tensor:
    """Return conv(x, w), or conv(x, w) + conv(x2, w2); transposed ones, if `turned`.

    Args:
        x: (examples, groups x channels, height, width), channels-last.
        weight: 3x3 filters, (groups x out, channels, 3, 3), in any layout.
        x2: More images, of the same shape.
        weight2: Their filters.
        groups: Groups of channels.
        turned: Of the convolution with these filters, take the gradient by its input.
    """
    examples, _, height, width = x.shape
    out, channels = weight.shape[0] // groups, weight.shape[1]
    if turned:
        out, channels = channels, out
    y = x.new_empty((examples, height, width, groups * out)).permute(0, 3, 1, 2)
    more = (None, None, None) if x2 is None or weight2 is None else (_at(x2), *_filters(weight2))
    _call(
        "convolve", x.dtype, _at(y), _at(x), *_filters(weight), *more,
        _numbers(examples, height, width, groups, channels, out), int(turned),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def correlate(x: Tensor, g: Tensor, groups: int) -> Tensor:
    """Return the gradient of conv(x, w) by w, of g by the outputs; its layout is channels-last.

    Args:
        x: (examples, groups x channels, height, width), channels-last.
        g: (examples, groups x out, height, width), channels-last.
        groups: Groups of channels.
    """
    examples, _, height, width = x.shape
    channels, out = x.shape[1] // groups, g.shape[1] // groups
    gw = x.new_empty((groups * out, 3, 3, channels)).permute(0, 3, 1, 2)
    _call(
        "correlate", x.dtype, _at(gw), _at(x), _at(g),
        _numbers(examples, height, width, groups, channels, out), torch.get_num_threads(),
    )  # fmt: skip
    return gw


def _call(name: str, dtype: torch.dtype, *args: Any) -> None:
    library = kernel()
    assert library is not None
    getattr(library, f"{name}_{_NAMES[dtype]}")(*args)


def _at(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _filters(w: Tensor) -> tuple[ctypes.c_void_p, Any]:
    return _at(w), _numbers(*w.stride())


def _numbers(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


# Operations of PyTorch, so that a recording holds them.
_operations = torch.library.Library("fewstep", "DEF")
_operations.define(
    "convolve(Tensor x, Tensor w, Tensor? x2, Tensor? w2, int groups, bool turned) -> Tensor"
)
_operations.define("correlate(Tensor x, Tensor g, int groups) -> Tensor")
_operations.impl("convolve", convolve, "CPU")
_operations.impl("correlate", correlate, "CPU")
