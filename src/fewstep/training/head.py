"""A saved last layer under a learner for other classes."""

from __future__ import annotations

from fewstep.core.inner_start import PrototypeStart
from fewstep.core.learner import MetaLearner
from fewstep.core.modules import layer_of
from fewstep.core.tensors import Tensors


def fitting_head(learner: MetaLearner, state: Tensors) -> Tensors:
    """Return a saved state, with the learner's own last layer where that has other outputs.

    They may differ where tasks make a last layer of their own.
    """
    named = dict(learner.module.named_parameters())
    *_, last = named
    saved = state.get(f"model.{last}")
    makes_own = isinstance(learner.algorithm.inner_start, PrototypeStart)
    if saved is None or saved.shape == named[last].shape or not makes_own:
        return state  # to be loaded, or refused, as it is
    layer = layer_of(last)
    own = {f"model.{n}": p.detach() for n, p in named.items() if layer_of(n) == layer}
    of_layer = (f"model.{layer}.", f"optimiser.{layer}.")
    return {n: t for n, t in state.items() if not n.startswith(of_layer)} | own
