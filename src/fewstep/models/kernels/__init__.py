"""Kernels in C++, compiled once on each machine.

They are compiled when first wanted, with the C++ compiler at hand ($CXX, c++, g++ or clang++), and
kept in the cache folder. Without a compiler, on other systems than Linux, or on processors other
than x86-64 with AVX2, PyTorch's operations take their place.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cache import cache_folder

_SOURCES, _HEADERS = (sorted(Path(__file__).parent.glob(f"*.{end}")) for end in ("cpp", "h"))
_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC")
_TARGETS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
_NAMES = {torch.float32: "float", torch.float64: "double"}
LANES = 16  # channels come in multiples of


def take(*tensors: Tensor) -> bool:
    """Whether there are kernels for tensors of this device and type, the same for all."""
    first, *others = tensors
    return (
        first.device.type == "cpu"
        and first.dtype in _NAMES
        and all(t.dtype == first.dtype for t in others)
        and all(t.numel() for t in tensors)
        and library() is not None
    )


def take_by_channel(images: Tensor, *of_channels: Tensor | None) -> bool:
    """Whether there are kernels for images and tensors with an element for each channel."""
    given = [t for t in of_channels if t is not None]
    channels = images.shape[1]
    return (
        channels % LANES == 0
        and all(t.numel() == channels for t in given)  # they are read by address
        and take(images, *given)
    )


def take_filters(x: Tensor, w: Tensor, groups: int) -> bool:
    """Whether there are kernels for images and filters, which are for as many channels."""
    return (
        x.shape[1] == groups * w.shape[1]
        and w.shape[0] % groups == 0
        and w.shape[0] // groups % LANES == 0
        and take(x, w)
    )


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be."""
    target = _TARGETS.get(torch.backends.cpu.get_cpu_capability())
    named = os.environ.get("CXX")
    ways = [["c++"], ["g++"], ["clang++"]] if named is None else [named.split()]  # "ccache g++"
    if target is None or platform.system() != "Linux" or [] in ways:
        return None
    compiler = next((words for words in ways if shutil.which(words[0])), None)
    if compiler is None:
        _warn(f"there is no C++ compiler called {' or '.join(words[0] for words in ways)}")
        return None
    command = [*compiler, *_FLAGS, target]
    of = hashlib.sha256(" ".join(command).encode())
    for file in (*_SOURCES, *_HEADERS):
        of.update(file.read_bytes())
    path = cache_folder() / f"kernels-{of.hexdigest()[:12]}.so"
    try:
        if path.exists():
            with contextlib.suppress(OSError):  # damaged, or of a machine with another C library
                return ctypes.CDLL(str(path))
        _compile(command, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _warn(f"{' '.join(compiler)} cannot compile the kernels ({' '.join(said.split()):.160})")
        return None


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}, so convolutional networks take PyTorch's operations, up to twice as slow; "
        "install g++, name a compiler in $CXX, or leave $CXX empty to go on without this notice",
        stacklevel=2,
    )


def _compile(command: list[str], path: Path) -> None:
    """Compile to a temporary name and then rename, as other processes may be at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        pairs = [(source, Path(folder, source.stem + ".o")) for source in _SOURCES]
        with ThreadPoolExecutor() as pool:  # they take seconds
            list(pool.map(_run, ([*command, "-c", s, "-o", o] for s, o in pairs)))
        made = Path(folder, path.name)
        _run([*command, "-shared", *(o for _, o in pairs), "-o", made])
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def call(name: str, dtype: torch.dtype, *args: Any) -> None:
    """Call a kernel on all of PyTorch's threads, with tensors by address and tuples as arrays."""
    kernels = library()
    assert kernels is not None
    threads = torch.get_num_threads()
    getattr(kernels, f"{name}_{_NAMES[dtype]}")(*map(_argument, args), threads)


def _argument(value: Any) -> Any:
    match value:
        case Tensor():
            return ctypes.c_void_p(value.data_ptr())
        case tuple():
            return (ctypes.c_int64 * len(value))(*value)
        case float():
            return ctypes.c_double(value)
    return value


def images_like(like: Tensor, *shape: int) -> Tensor:
    """Return a new tensor (examples, channels, height, width), with channels next to each other."""
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


# Operations of PyTorch, so that a recording holds them.
operations = torch.library.Library("fewstep", "DEF")
