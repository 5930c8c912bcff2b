"""Every test starts from the same seed, on one thread: the tensors here are tiny."""

import os
import signal
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fewstep.models.kernels import library
from tests.processes import draw_nothing

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Begin with the long tests: one at the end leaves the other workers idle."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    """Draw none but for tests that look at them: they take longer than the tiny runs they end."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(FigureCanvasAgg, "print_png", draw_nothing)


@pytest.fixture
def signals_heard():
    """Hear what the shell lets jobs in its background ignore, and nohup all."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Prepare data into a folder of its own; kernels, which take seconds to compile, are shared."""
    folder = tmp_path / "cache"
    folder.mkdir()
    if (kernels := library()) is not None:
        compiled = Path(kernels._name)
        (folder / compiled.name).symlink_to(compiled)
    monkeypatch.setenv("FEWSTEP_CACHE", str(folder))
    return folder


@pytest.fixture
def float64():
    """New tensors and parameters are in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
