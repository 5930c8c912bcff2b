"""What must not matter, and what must stay untouched."""

import pytest
import torch
from torch import nn

from fewstep import MetaLearner, TaskBatch, fomaml, maml
from tests.core.reference import MODELS, WAYS, Case, relative_error

pytestmark = pytest.mark.usefixtures("float64")

CASE = MODELS["batch norm"]
RECIPES = {"maml": maml, "fomaml": fomaml}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def learner_for(case: Case = CASE, recipe=maml, **options) -> MetaLearner:
    return MetaLearner(case.build(), recipe(2, 0.3), case.loss, **options)


def dropout_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, WAYS)
    )


@every_recipe
def test_order_of_tasks(recipe):
    learner, batch = learner_for(recipe=recipe, chunk_size=2), CASE.batch(tasks=4)
    other = TaskBatch(*(t[[2, 0, 3, 1]] for t in batch.tensors()))
    gradient, _ = learner.meta_gradient(batch)
    assert relative_error(learner.meta_gradient(other)[0], gradient) < 1e-12


@every_recipe
def test_order_of_examples(recipe):
    learner, batch = learner_for(recipe=recipe), CASE.batch()
    there = torch.randperm(batch.x_support.shape[1])
    other = TaskBatch(*(t[:, there] for t in batch.tensors()))
    gradient, _ = learner.meta_gradient(batch)
    assert relative_error(learner.meta_gradient(other)[0], gradient) < 1e-10


@every_recipe
def test_gradient_of_a_batch_is_the_mean_of_those_of_its_tasks(recipe):
    learner, batch = learner_for(recipe=recipe), CASE.batch()
    single = [learner.meta_gradient(task)[0] for task in batch.split(1)]
    mean = {name: torch.stack([g[name] for g in single]).mean(0) for name in single[0]}
    assert relative_error(learner.meta_gradient(batch)[0], mean) < 1e-12


def test_order_of_tasks_does_not_change_running_statistics():
    batch = CASE.batch(tasks=4)
    other = TaskBatch(*(t[[2, 0, 3, 1]] for t in batch.tensors()))
    one, two = learner_for(), learner_for()
    two.load_state_tensors(one.state_tensors())
    one.step(batch)
    two.step(other)
    for (name, a), (_, b) in zip(
        one.module.named_buffers(), two.module.named_buffers(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


def snapshot(learner: MetaLearner) -> dict[str, object]:
    return {
        **{name: t.numpy().tobytes() for name, t in learner.state_tensors().items()},
        "gradients": [p.grad for p in learner.module.parameters()],
        "random state": torch.get_rng_state().numpy().tobytes(),
        "training": [m.training for m in learner.module.modules()],
    }


ACTIONS = {
    "evaluate": lambda learner, batch: learner.evaluate(batch, len(batch)),
    "adapt": lambda learner, batch: learner.adapt(batch.x_support[0], batch.y_support[0]),
    "meta_gradient": lambda learner, batch: learner.meta_gradient(batch),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@every_recipe
@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_nothing_changes_but_by_a_step(action, recipe, vectorize):
    learner, batch = learner_for(recipe=recipe, vectorize=vectorize), CASE.batch()
    learner.step(batch)
    learner.module[1].eval()  # flags of all kinds must come back
    before = snapshot(learner)
    action(learner, batch)
    assert snapshot(learner) == before
    learner.step(batch)
    assert snapshot(learner) != before


@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_evaluation_leaves_dropout_out(vectorize):
    case = Case(dropout_net, (4,))
    learner, batch = learner_for(case, vectorize=vectorize), case.batch()
    before = snapshot(learner)
    scores = learner.evaluate(batch, 3)
    assert snapshot(learner) == before
    learner.module[3].p = 0.0
    assert torch.equal(scores.loss, learner.evaluate(batch, 3).loss)


def test_training_draws_another_dropout_for_every_task():
    case = Case(dropout_net, (4,))
    task = case.batch(tasks=1)
    twice = TaskBatch(*(t.expand(2, *t.shape[1:]) for t in task.tensors()))
    _, metrics = learner_for(case).meta_gradient(twice)
    assert metrics.task_loss[0] != metrics.task_loss[1]


def test_training_flags_come_back_after_an_error():
    learner = learner_for()
    learner.module[1].eval()
    unfit = Case(CASE.build, (2, 6, 6)).batch()
    before = snapshot(learner)
    with pytest.raises(RuntimeError, match="channels"):
        learner.meta_gradient(unfit)
    assert snapshot(learner) == before


@every_recipe
def test_chunks_of_an_evaluation_change_no_score(recipe):
    learner, batch = learner_for(recipe=recipe), CASE.batch(tasks=5)
    whole = learner.evaluate(batch, 5)
    learner.chunk_size = 2
    torch.testing.assert_close(learner.evaluate(batch, 5).loss, whole.loss, rtol=1e-12, atol=0)


@every_recipe
def test_training_resumes_to_the_bit(recipe):
    first, second = CASE.batch(), CASE.batch()
    whole = learner_for(recipe=recipe)
    whole.step(first)
    state = whole.state_tensors()
    whole.step(second)

    resumed = learner_for(recipe=recipe)
    resumed.load_state_tensors(state)
    resumed.step(second)
    assert snapshot(resumed) == snapshot(whole)
