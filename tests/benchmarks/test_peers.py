"""What is timed of the peers is their own work."""

import sys
from types import ModuleType, SimpleNamespace

import torch

from peers import Case, with_jax


class Array:
    """Stand in for JAX's, which nobody is to convert while it is timed."""

    def __init__(self, shape):
        self.shape = shape


def test_jax_s_arrays_stay_its_own(monkeypatch):
    jax, numpy = ModuleType("jax"), ModuleType("jax.numpy")
    jax.numpy = numpy
    numpy.asarray = lambda array: Array(array.shape)
    jax.config = SimpleNamespace(update=lambda *_: None)
    jax.vmap = jax.grad = jax.jit = lambda function, **_: lambda phi, *arrays: phi
    jax.block_until_ready = lambda found: found
    for name, module in (("jax", jax), ("jax.numpy", numpy)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # and back afterwards
    case = Case("sinusoids", 1, 2, tasks=2, size=0)
    found = with_jax(case, torch.float64, native=False)()
    assert all(isinstance(each, Array) for each in found)
