"""Freed memory between what is in use goes back to the system."""

import platform
from pathlib import Path

import pytest
import torch

from fewstep.core.allocator import return_freed_memory


def resident_mib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_gaps_go_back():
    tensors = [torch.zeros(8192) for _ in range(4096)]  # 32 KiB each
    del tensors[::2]
    before = resident_mib()
    assert return_freed_memory()
    assert 40 < before - resident_mib() < 70  # of 64
    assert all(not t.any() for t in tensors)
