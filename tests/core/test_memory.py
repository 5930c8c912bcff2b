"""What graphs hold, and plans that stay within a budget."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fewstep
from fewstep import DerivativeAnnealing, InputError, MetaLearner, MultiStepLoss, TaskBatch
from fewstep.core.memory import GraphMemory, plan_memory
from fewstep.core.ranks import Ranks
from fewstep.models import Conv4
from tests.core.reference import relative_error

pytestmark = pytest.mark.usefixtures("float64")


def test_graph_memory_counts_what_is_held_once():
    x = torch.randn(100, requires_grad=True)
    with GraphMemory() as memory:
        y = x * x  # holds x twice
        assert memory.now == 800
        z = y.exp().sum()  # holds exp(y)
        assert memory.now == 1600
        z.backward()
        assert memory.now == 0
        with torch.no_grad():
            x.exp()
    assert memory.peak == 1600


def learner_and_batch(tasks: int, **options) -> tuple[MetaLearner, TaskBatch]:
    torch.manual_seed(0)
    x, y = torch.rand(2, tasks, 3, 1, 16, 16), torch.arange(3).expand(tasks, 3)
    learner = MetaLearner(
        Conv4(1, 3, 16, filters=8), fewstep.maml(4, 0.1), F.cross_entropy, **options
    )
    return learner, TaskBatch(x[0], y, x[1], y)


def peak_mib(learner: MetaLearner, batch: TaskBatch) -> float:
    with GraphMemory() as memory:
        learner.meta_gradient(batch)
    return memory.peak / 2**20


@pytest.mark.parametrize(
    ("share", "chunk_size", "checkpoint_every"),
    [(1.01, 6, None), (0.99, 5, None), (0.7, 4, None), (0.6, 6, 1), (0.2, 3, 1)],
)
def test_plans_fit_and_change_no_gradient(share, chunk_size, checkpoint_every):
    learner, batch = learner_and_batch(6)
    whole, _ = learner.meta_gradient(batch)
    budget = share * 1.5 * peak_mib(learner, batch)
    plan = plan_memory(learner, batch, budget)
    assert (plan.chunk_size, plan.checkpoint_every) == (chunk_size, checkpoint_every)
    assert (learner.chunk_size, learner.checkpoint_every) == (chunk_size, checkpoint_every)
    assert plan.mib <= budget
    assert 1.5 * peak_mib(learner, batch) == pytest.approx(plan.mib, rel=0.1)
    assert relative_error(learner.meta_gradient(batch)[0], whole) < 1e-12


def test_the_worst_phase_of_the_schedules_is_planned_for():
    """Second order with all query losses: after first order, before the last loss alone."""
    learner, batch = learner_and_batch(4)
    algorithm = replace(
        learner.algorithm,
        derivative_order=DerivativeAnnealing(2),
        query_weights=MultiStepLoss(5),
        iterations_per_epoch=3,
    )
    scheduled = MetaLearner(learner.module, algorithm, F.cross_entropy)
    peaks = []
    for scheduled.iteration in range(20):
        peaks.append(peak_mib(scheduled, batch))
    scheduled.iteration = 0
    assert max(peaks[:5] + peaks[15:]) < 0.9 * max(peaks)
    plan = plan_memory(scheduled, batch, 1e3, num_iterations=20)
    assert plan.mib == pytest.approx(1.5 * max(peaks), rel=0.1)


def test_one_task_needs_no_second_to_plan():
    learner, batch = learner_and_batch(1)
    assert plan_memory(learner, batch, 1e3).chunk_size == 1


def test_a_plan_is_the_same_whoever_shares_the_tasks_and_however_many_went_at_once():
    plan = plan_memory(*learner_and_batch(4), 1e3)
    assert plan_memory(*learner_and_batch(4, chunk_size=1), 1e3) == plan
    assert plan_memory(*learner_and_batch(4, ranks=Ranks(0, 3)), 1e3) == plan


def test_a_budget_below_one_task_is_refused():
    learner, batch = learner_and_batch(2)
    before = learner.chunk_size, learner.checkpoint_every
    with pytest.raises(InputError, match=r"^memory budget of 0.001 MiB is below the .* MiB.*$"):
        plan_memory(learner, batch, 0.001)
    assert (learner.chunk_size, learner.checkpoint_every) == before


@pytest.mark.parametrize("budget", [float("inf"), float("nan")])
def test_a_budget_that_is_no_number_is_refused(budget):
    with pytest.raises(InputError, match=f"memory budget of {budget} MiB must be finite"):
        plan_memory(*learner_and_batch(2), budget)


def test_a_plan_is_the_same_whether_or_not_a_recording_is_at_hand():
    learner, batch = learner_and_batch(2, replay=True)
    learner.meta_gradient(batch)
    assert plan_memory(learner, batch, 1e3) == plan_memory(*learner_and_batch(2), 1e3)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations within it make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for t in tree_leaves(outputs):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return outputs

    def _end(self, key: int, size: int) -> None:
        self._seen.remove(key)
        self.now -= size


@pytest.mark.parametrize("replay", [False, True])
def test_a_chunk_leaves_its_sum_behind_and_not_its_gradient(replay):
    x, y = torch.rand(2, 24, 5, 10), torch.arange(5).expand(24, 5)
    batch = TaskBatch(x[0], y, x[1], y)
    module = torch.nn.Sequential(torch.nn.Linear(10, 2000), torch.nn.Linear(2000, 5))
    learner = MetaLearner(
        module, fewstep.maml(1, 0.1), F.cross_entropy, chunk_size=1, replay=replay
    )
    peaks = []
    for tasks in (3, 24):
        few = batch.batch(0, tasks)
        learner.meta_gradient(few)  # records
        with LiveMemory() as memory:
            learner.meta_gradient(few)
        peaks.append(memory.peak)
    parameters = 8 * sum(p.numel() for p in module.parameters())
    assert peaks[0] > 2 * parameters
    assert peaks[1] < peaks[0] + parameters
