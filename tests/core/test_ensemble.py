"""Ensembles of trained states and of views of a task."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fewstep import InputError, maml_plus_plus
from tests.core.test_maml_plus_plus import CASE, learner_of

pytestmark = pytest.mark.usefixtures("float64")


def test_an_ensemble_takes_the_mean_of_the_outputs():
    learner, batch = learner_of(maml_plus_plus(2, version="reference_code")), CASE.batch(tasks=5)
    states, predictions = [], []
    for _ in range(3):
        learner.step(batch)
        states.append(learner.state_tensors())
        predictions.append(learner.predict(batch, 5))
    one = learner.evaluate_ensemble(states[2:], batch, 5)
    alone = learner.evaluate(batch, 5, every_step=False)
    torch.testing.assert_close(one.metric, alone.metric)
    torch.testing.assert_close(one.loss, alone.loss)
    assert one.after == alone.after == (2,)
    scores = learner.evaluate_ensemble(states, batch, 5)
    mean = sum(predictions)[:, -1:] / 3
    expected = (mean.argmax(-1) == batch.y_query[:, None]).double().mean(-1)
    torch.testing.assert_close(scores.metric, expected)
    loss = F.cross_entropy(mean.flatten(0, 2), batch.y_query.flatten(), reduction="none")
    torch.testing.assert_close(scores.loss[:, 0], loss.view(5, -1).mean(1))
    for name, tensor in learner.state_tensors().items():
        assert torch.equal(tensor, states[2][name])
    with pytest.raises(InputError, match="ensemble of 0 states"):
        learner.evaluate_ensemble([], batch, 5)


def test_an_ensemble_of_views_adapts_to_each():
    learner, batch = learner_of(maml_plus_plus(2, version="reference_code")), CASE.batch(tasks=5)

    def negative(x):
        return -x

    def doubled(x):
        return 2 * x

    states = [learner.state_tensors()]
    learner.step(batch)
    states.append(learner.state_tensors())
    outputs = []
    for state in states:
        learner.load_state_tensors(state)
        for view in (negative, doubled):
            seen = replace(batch, x_support=view(batch.x_support), x_query=view(batch.x_query))
            outputs.append(learner.predict(seen, 5)[:, -1])
    scores = learner.evaluate_ensemble(states, batch, 5, views=[negative, doubled])
    expected = F.cross_entropy(
        (sum(outputs) / 4).flatten(0, 1), batch.y_query.flatten(), reduction="none"
    )
    torch.testing.assert_close(scores.loss[:, 0], expected.view(5, -1).mean(1))
    with pytest.raises(InputError, match="0 views"):
        learner.evaluate_ensemble(states, batch, 5, views=[])
