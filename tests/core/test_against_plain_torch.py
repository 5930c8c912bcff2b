"""The learner against a plain loop of `torch.autograd.grad`, for every model."""

import pytest
import torch

from fewstep import MetaLearner, fomaml, maml
from tests.core.reference import MODELS, plain_meta_gradient, relative_error

pytestmark = pytest.mark.usefixtures("float64")

RECIPES = {"maml": maml, "fomaml": fomaml}

every_model = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
WITH_BUFFERS = {name: case for name, case in MODELS.items() if list(case.build().buffers())}


@every_model
@every_recipe
@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_meta_gradient_is_that_of_plain_torch(case, recipe, vectorize):
    module, batch, algorithm = case.build(), case.batch(), recipe(num_steps=3, inner_lr=0.3)
    learner = MetaLearner(module, algorithm, case.loss, vectorize=vectorize)

    gradient, metrics = learner.meta_gradient(batch)

    expected, meta_loss, _ = plain_meta_gradient(module, algorithm, case.loss, batch)
    assert relative_error(gradient, expected) < 1e-9
    torch.testing.assert_close(metrics.loss, meta_loss, rtol=1e-12, atol=0)


@every_model
@every_recipe
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunk_size_changes_no_result(case, recipe, chunk_size):
    module, batch, algorithm = case.build(), case.batch(), recipe(num_steps=2, inner_lr=0.3)

    chunked, seen = MetaLearner(module, algorithm, case.loss, chunk_size=chunk_size).meta_gradient(
        batch
    )
    whole, seen_whole = MetaLearner(module, algorithm, case.loss, chunk_size=8).meta_gradient(batch)

    assert relative_error(chunked, whole) < 1e-12
    torch.testing.assert_close(seen.task_loss, seen_whole.task_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(seen.support_loss, seen_whole.support_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", WITH_BUFFERS.values(), ids=WITH_BUFFERS)
@every_recipe
@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_running_statistics_become_the_mean_over_tasks(case, recipe, vectorize):
    module, batch, algorithm = case.build(), case.batch(), recipe(num_steps=2, inner_lr=0.3)
    *_, expected = plain_meta_gradient(module, algorithm, case.loss, batch)

    MetaLearner(module, algorithm, case.loss, chunk_size=2, vectorize=vectorize).step(batch)

    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer.double(), expected[name], rtol=1e-12, atol=1e-14)


@every_model
def test_first_order_is_another_gradient(case):
    module, batch = case.build(), case.batch()
    first, second = (
        MetaLearner(module, recipe(num_steps=3, inner_lr=0.3), case.loss).meta_gradient(batch)[0]
        for recipe in (fomaml, maml)
    )
    assert relative_error(first, second) > 1e-3


@every_model
def test_both_orders_adapt_to_the_same_parameters(case):
    module, batch = case.build(), case.batch(tasks=1)
    first, second = (
        MetaLearner(module, recipe(num_steps=3), case.loss).meta_gradient(batch)[1]
        for recipe in (fomaml, maml)
    )
    assert torch.equal(first.support_loss, second.support_loss)
    assert torch.equal(first.query_loss, second.query_loss)


@every_recipe
@pytest.mark.parametrize(
    "idle", [{"num_steps": 0, "inner_lr": 0.3}, {"num_steps": 3, "inner_lr": 0.0}], ids=str
)
@every_model
def test_without_adaptation_it_is_the_gradient_of_the_query_loss(case, recipe, idle):
    module, batch = case.build(), case.batch()
    gradient, _ = MetaLearner(module, recipe(**idle), case.loss).meta_gradient(batch)
    expected, *_ = plain_meta_gradient(module, maml(num_steps=0), case.loss, batch)
    assert relative_error(gradient, expected) < 1e-12
