"""Learners whose tasks make a last layer of their own, for other numbers of classes."""

import pytest
import torch
from torch.nn import functional as F

import fewstep
from fewstep import InputError, MetaLearner, TaskBatch
from fewstep.models import fully_connected
from fewstep.training.head import fitting_head


def _learner(module: torch.nn.Module) -> MetaLearner:
    return MetaLearner(module, fewstep.proto_maml(1, 0.1), F.cross_entropy)


def _batch(ways: int) -> TaskBatch:
    x, y = torch.randn(2, 2 * ways, 5), torch.arange(ways).repeat(2, 2)
    return TaskBatch(x, y, x, y)


def test_training_goes_on_with_another_number_of_classes():
    """The features keep the optimiser's moments; the last layer's are of other classes."""
    source, own = (_learner(fully_connected(5, ways)) for ways in (3, 2))
    source.step(_batch(3))
    state = source.state_tensors()
    own.load_state_tensors(fitting_head(own, state))
    found = own.state_tensors()
    of_optimiser = {n for n in state if n.startswith("optimiser.")}
    left = {n for n in of_optimiser if n.startswith("optimiser.13.")}
    assert left
    assert {n for n in found if n.startswith("optimiser.")} == of_optimiser - left
    assert all(torch.equal(found[n], state[n]) for n in of_optimiser - left)
    own.step(_batch(2))


def test_a_state_of_another_network_is_told_as_such():
    """A head of class means may have other outputs; another network is another network."""
    learners = [_learner(module) for module in (fully_connected(5, 3), torch.nn.Linear(5, 3))]
    state = learners[0].state_tensors()
    assert fitting_head(learners[1], state) is state
    with pytest.raises(InputError):
        learners[1].load_state_tensors(state)
