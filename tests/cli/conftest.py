"""What the tests of the commands share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.cli.main import main
from tests.data.conftest import write_images

TINY = "--iterations 4 --val-every 2 --val-tasks 3 --test-tasks 3 --tasks 2 --device cpu"
SINUSOID = f"train --dataset sinusoid {TINY}"


@pytest.fixture
def empty_folder(tmp_path, monkeypatch, own_cache):
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def sinusoid_run(tmp_path_factory):
    """A run to read, or to copy and change."""
    run = tmp_path_factory.mktemp("trained") / "sinusoid"
    assert main([*SINUSOID.split(), "--out", str(run)]) == 0
    return run


def train_on_images(root: Path) -> str:
    """Write images of twenty classes, and return the command that trains on them."""
    write_images(root, {f"c{i:02d}": 6 for i in range(20)})
    options = "--ways 2 --queries 2 --eval-queries 2 --size 16 --filters 4 --rotations episode"
    return f"train --dataset folder --root {root} {options} {TINY}"


def scribble(root: Path) -> None:
    """Make all images of a folder noise, which looks another when turned or mirrored."""
    noise = np.random.default_rng(0)
    for file in sorted(root.rglob("*.png")):
        Image.fromarray(noise.integers(0, 256, (16, 16), np.uint8)).save(file)


def refused(capsys, command: str) -> str:
    """Return the one line that a command is refused with."""
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error
