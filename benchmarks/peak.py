"""The most memory that this process holds, or that of the GPU."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch

from fewstep.core.allocator import return_freed_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """What is held beyond what was held when this was made, in MiB.

    `ru_maxrss` does not serve where there is something better: a process starts with the most that
    the one that started it ever held.

    Args:
        device: "cpu" or "cuda".
        package: Which package allocates on a GPU, "torch" or "jax".
    """

    def __init__(self, device: str = "cpu", package: str = "torch") -> None:
        self._on_gpu, self._of_jax = device.startswith("cuda"), package == "jax"
        return_freed_memory()
        self._before, self._files_before = self._now(), self._of_files()

    def most(self, do: Callable[[], object]) -> dict[str, float]:
        """Return the most during a call, as `mib`, and how much are pages of files.

        Only Linux and PyTorch on a GPU forget an earlier peak.
        """
        return_freed_memory()
        if self._on_gpu and not self._of_jax:
            torch.cuda.reset_peak_memory_stats()
        elif not self._on_gpu and _CLEAR.exists():
            _CLEAR.write_text("5")  # the peak is now what is resident
        do()
        return {
            "mib": self._peak() - self._before,
            "mib_of_files": self._of_files() - self._files_before,
        }

    def _now(self) -> float:
        if self._on_gpu:
            return self._of_gpu("bytes_in_use", torch.cuda.memory_allocated)
        return _status("VmRSS") if _STATUS.exists() else self._peak()

    def _peak(self) -> float:
        if self._on_gpu:
            return self._of_gpu("peak_bytes_in_use", torch.cuda.max_memory_allocated)
        if _STATUS.exists():
            return _status("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def _of_gpu(self, jax_name: str, of_torch: Callable[[], int]) -> float:
        if self._of_jax:
            import jax

            return float(jax.devices()[0].memory_stats()[jax_name]) / 2**20
        return of_torch() / 2**20

    def _of_files(self) -> float:
        return _status("RssFile") if _STATUS.exists() and not self._on_gpu else 0.0


def _status(name: str) -> float:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) / 1024
