import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fewstep import InputError, MetaLearner, Scores, TaskBatch, maml, paired_difference
from fewstep.core.accuracy import accuracy
from fewstep.core.scores import t95
from tests.core.reference import MODELS

pytestmark = pytest.mark.usefixtures("float64")

T3 = 3.182446305284263  # Student's t of 3 degrees of freedom
TASKS = [[0.0, 0.25], [0.5, 1.0], [0.25, 0.5], [0.25, 0.75]]


def scores(metric_name: str = "accuracy") -> Scores:
    metric = torch.tensor(TASKS)
    return Scores(metric_name, metric, 2 * metric, "batch (transductive)", after=(0, 1))


def test_a_task_is_drawn_once():
    case, drawn = MODELS["mlp"], []
    batch = case.batch(tasks=7)

    class Counted:
        def batch(self, start, count):
            drawn.extend(range(start, start + count))
            return TaskBatch(*(t[start : start + count] for t in batch.tensors()))

    learner = MetaLearner(case.build(), maml(1), case.loss, chunk_size=3)
    assert learner.evaluate(Counted(), 7).metric_name == "accuracy"
    assert drawn == list(range(7))


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (14, 2.145), (29, 2.045), (30, 2.042),
        (99, 1.9842), (599, 1.9639), (100_000, 1.9600),
    ],
)  # fmt: skip
def test_quantiles_of_student_s_t(degrees, quantile):
    assert t95(degrees) == pytest.approx(quantile, abs=5e-4 if degrees < 99 else 5e-5)


def test_few_tasks_have_no_interval():
    assert math.isnan(t95(0))
    assert t95(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)  # closed form
    assert t95(1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-12)


def test_mean_and_interval_of_every_step():
    for step, column in enumerate(zip(*TASKS, strict=True)):
        assert scores().curve[step] == pytest.approx(statistics.mean(column))
        half_width = T3 * statistics.stdev(column) / math.sqrt(4)
        assert scores().curve_ci95[step] == pytest.approx(half_width)
    assert (scores().mean, scores().ci95) == (scores().curve[1], scores().curve_ci95[1])
    assert (scores().num_tasks, scores().num_steps) == (4, 1)


def test_summary_says_how_it_was_measured():
    assert str(scores()) == (
        "accuracy 62.50% ± 51.36 (95% interval; 4 tasks; 1 inner steps; "
        "normalisation statistics: batch (transductive))"
    )


def test_dict_holds_plain_values():
    assert scores().as_dict() == {
        "metric": "accuracy",
        "mean": 0.625,
        "ci95": pytest.approx(T3 * math.sqrt(0.3125 / 3) / 2),
        "num_tasks": 4,
        "num_steps": 1,
        "after": [0, 1],
        "curve": [0.25, 0.625],
        "curve_ci95": pytest.approx([T3 * math.sqrt(v / 3) / 2 for v in (0.125, 0.3125)]),
        "loss_curve": [0.5, 1.25],
        "statistics": "batch (transductive)",
        "per_task": [0.25, 1.0, 0.5, 0.75],
    }


def test_a_paired_difference_is_that_of_the_tasks_differences():
    ours, theirs = torch.tensor(TASKS)[:, 1], torch.tensor([0.5, 0.5, 0.25, 0.75])
    of_tasks = [-0.25, 0.5, 0.25, 0.0]
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(statistics.mean(of_tasks))
    assert found.ci95 == pytest.approx(T3 * statistics.stdev(of_tasks) / math.sqrt(4))
    assert (found.above, found.below) == (2, 1)
    assert not found.is_significant


def test_tasks_of_one_difficulty_for_both_hide_no_difference():
    difficulty = torch.linspace(0, 1, 50)
    found = paired_difference(difficulty + 0.01, difficulty)
    assert found.mean == pytest.approx(0.01)
    assert found.ci95 < 1e-6
    assert found.is_significant
    assert paired_difference(difficulty, difficulty + 0.01).is_significant  # for the worse, too
    assert not paired_difference(difficulty, difficulty).is_significant


def test_two_tasks_are_enough_to_compare():
    found = paired_difference(torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.25]))
    assert found.mean == 0.5
    assert (found.above, found.below) == (2, 0)


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((1,), (1,)), ((3, 2), (3, 2))])
def test_scores_of_other_tasks_do_not_compare(shapes):
    ours, theirs = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(InputError, match="score both on as many"):
        paired_difference(ours, theirs)


def test_rank_is_high_for_the_better():
    assert scores("accuracy").rank == scores("accuracy").mean
    assert scores("top-5 accuracy").rank == scores("accuracy").mean
    assert scores("loss").rank == -scores("loss").mean


@pytest.mark.parametrize(
    ("model", "metric", "name", "statistics"),
    [
        ("mlp", None, "accuracy", "none (no batch norm)"),
        ("batch norm", None, "accuracy", "batch (transductive)"),
        ("sinusoid MLP", None, "loss", "none (no batch norm)"),
        ("sinusoid MLP", F.l1_loss, "l1_loss", "none (no batch norm)"),
    ],
)
def test_learner_names_what_it_measured(model, metric, name, statistics):
    case = MODELS[model]
    batch = case.batch()
    learner = MetaLearner(case.build(), maml(1), case.loss, metric=metric)
    measured = learner.evaluate(batch, 3)
    assert (measured.metric_name, measured.statistics) == (name, statistics)
    assert learner.meta_gradient(batch)[1].metric_name == name


def test_the_last_step_alone_calls_on_the_query_sets_once():
    case, queries = MODELS["mlp"], 0
    tasks = case.batch(tasks=3)
    batch = replace(tasks, x_query=tasks.x_query[:, :4], y_query=tasks.y_query[:, :4])

    def count(module, inputs):
        nonlocal queries
        queries += inputs[0].shape[-2] == 4

    module = case.build()
    module.register_forward_pre_hook(count)
    learner = MetaLearner(module, maml(2, 0.1), case.loss)
    every = learner.evaluate(batch, 3)
    assert (queries, every.after, every.num_steps) == (3, (0, 1, 2), 2)
    last = learner.evaluate(batch, 3, every_step=False)
    assert (queries, last.after, last.num_steps) == (4, (2,), 2)
    assert torch.equal(last.metric, every.metric[:, 2:])
    assert (last.mean, last.ci95) == (every.mean, every.ci95)


def test_metric_is_taken_on_the_query_set():
    case = MODELS["sinusoid MLP"]
    module, batch = case.build(), case.batch(tasks=2)
    learner = MetaLearner(module, maml(0), case.loss, metric=F.l1_loss)
    expected = torch.stack(
        [F.l1_loss(module(x), y) for x, y in zip(batch.x_query, batch.y_query, strict=True)]
    ).detach()
    torch.testing.assert_close(learner.evaluate(batch, 2).metric[:, 0], expected)
    torch.testing.assert_close(learner.meta_gradient(batch)[1].task_metric, expected)


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 3, 5)], ids=["last", "as cross_entropy has them"])
def test_classes_lie_along_the_dimension_that_is_not_the_targets(shape):
    dim = shape.index(3)
    targets = torch.randint(3, (4, 5))
    guesses = torch.where(torch.arange(20).view(4, 5) < 15, targets, (targets + 1) % 3)
    outputs = F.one_hot(guesses, 3).double().movedim(-1, dim)
    assert accuracy(outputs, targets).item() == 0.75
    padded = targets.clone()
    padded[2:] = -100  # 10 are left, all of them right
    assert accuracy(outputs, padded).item() == 1.0


def test_classes_along_either_of_two_dimensions_are_refused():
    with pytest.raises(InputError, match=r"\(4, 3, 3\) do not give each of the targets \(4, 3\)"):
        accuracy(torch.zeros(4, 3, 3), torch.zeros(4, 3))
