"""On a GPU nothing mixes devices or reads a value, and CUDA graphs hold what they can.

Numbers need a real one; this needs none, only a compiler.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long
HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX", "c++").split()
    if sys.platform != "linux" or not compiler or shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler on Linux")
    if torch.backends.cuda.is_built():
        pytest.skip("this PyTorch can have a real GPU")
    path = tmp_path_factory.mktemp("gpu") / "imagined.so"
    of_torch = ["-I", TORCH / "include", "-L", TORCH / "lib", f"-Wl,-rpath,{TORCH / 'lib'}"]
    source = ["-shared", "-fPIC", "-std=c++20", HERE / "imagined_gpu.cpp", "-o", path]
    subprocess.run([*compiler, *source, *of_torch, "-lc10", "-ltorch_cpu"], check=True)
    return path


def test_models_train_on_a_gpu_that_is_imagined(library: Path) -> None:
    trained = ["batch norm", "Conv4", "LSTM", "transformer", "Conv4 in checkpoints"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.imagined_gpu", *trained],
        cwd=HERE.parents[1],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Each has a graph for each of two phases and for the test; one of them is used twice.
    counts = f"captured {3 * len(trained)} launched {len(trained)}"
    assert done.stdout.splitlines()[-1] == counts
