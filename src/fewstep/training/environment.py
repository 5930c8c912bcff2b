"""What a result depends on besides its settings: command, commit, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fewstep


def environment(command: str, device: str) -> dict[str, Any]:
    """Describe what a result depends on besides its settings."""
    return {
        "command": command,
        "commit": commit(),
        "fewstep": fewstep.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def hardware(device: str) -> str:
    """Name the processor or the accelerator."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def commit() -> str:
    """Return the commit of the source tree, marked when it has uncommitted changes.

    Asked again it is what it was at first, as the tree may move on while the process runs.
    """
    folder = Path(__file__).parent
    try:
        # A project may hold the environment that fewstep is installed in, and is not its source.
        _git("ls-files", "--error-unmatch", Path(__file__).name, folder=folder)
        found = _git("rev-parse", "HEAD", folder=folder)
        changed = _git("status", "--porcelain", "--untracked-files=no", folder=folder)
    except (OSError, subprocess.CalledProcessError):
        return "not from a repository"
    return found + (" with changes" if changed else "")


def _git(*arguments: str, folder: Path) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def command_line() -> str:
    """Return the command, to be typed again."""
    program, python = Path(sys.argv[0]), ["python"]
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        python = ["torchrun", "--nproc-per-node", processes]
    if program.name == "__main__.py":
        words = [*python, "-m", program.parent.name]
    elif program.suffix == ".py":
        words = [*python, program.name if program.is_absolute() else str(program)]
    else:
        words = [program.name] if processes == "1" else [*python, "-m", program.name]
    return shlex.join([*words, *sys.argv[1:]])
