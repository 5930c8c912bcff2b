"""Two processes that share the tasks do what one process does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fewstep
from fewstep import InputError, MetaLearner, Ranks, TaskBatch
from fewstep.core.hypergradient import HypergradientRates
from fewstep.core.rates import LearnedRate
from fewstep.models import Conv4
from tests.core.reference import numbers
from tests.processes import in_two

WAYS, TASKS = 3, 5  # an odd number, so that the shares differ
ALGORITHMS = {
    "maml": fewstep.maml(2, 0.1),
    "maml++": fewstep.maml_plus_plus(2, 0.1),
    "sum": replace(fewstep.maml(2, 0.1), task_reduction="sum"),
    "cheap": replace(
        fewstep.maml(2, 0.1),
        inner_rate=LearnedRate(0.1),
        rate_update=HypergradientRates(1e-3, exact=False),
    ),
}


def batch(dtype: torch.dtype) -> TaskBatch:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, TASKS, WAYS, 1, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.arange(WAYS).expand(TASKS, WAYS)
    return TaskBatch(x[0], y, x[1], y)


def work(name: str, dtype: torch.dtype, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Train for two iterations, then evaluate; return all that came of it."""
    torch.manual_seed(0)
    module: nn.Module = Conv4(1, WAYS, 16, filters=4).to(dtype)
    learner = MetaLearner(module, ALGORITHMS[name], F.cross_entropy, chunk_size=2, ranks=ranks)
    tasks = batch(dtype)
    found = {}
    for i in range(2):
        metrics = learner.step(tasks)
        found |= {f"{i} {k}": t for k, t in enumerate(numbers(metrics))}
    scores = learner.evaluate(tasks, TASKS)
    states = [learner.state_tensors(), learner.state_tensors()]
    ensemble = learner.evaluate_ensemble(
        states, tasks, TASKS, views=[torch.Tensor.neg, torch.Tensor.exp]
    )
    found |= {"loss": scores.loss, "metric": scores.metric, "ensemble": ensemble.loss}
    found["outputs"] = learner.predict(tasks, TASKS)
    return found | learner.state_tensors()


def process(out: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.of_torchrun()
    found = {
        (name, dtype): work(name, dtype, ranks)
        for name in ALGORITHMS
        for dtype in (torch.float32, torch.float64)
    }
    found["any"] = [ranks.any(ranks.rank == 1), ranks.any(False)]
    found["first"] = ranks.broadcast({"rank": ranks.rank})
    torch.save(found, out / f"{ranks.rank}.pt")
    ranks.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    assert [(done.code, done.stderr) for done in in_two(out, process, out)] == [(0, "")] * 2
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_two_processes_are_one(two, name, dtype, tolerance):
    one = work(name, dtype, Ranks())
    first, second = (found[name, dtype] for found in two)
    assert first.keys() == second.keys() == one.keys()
    for key, wanted in one.items():
        assert torch.equal(first[key], second[key]), key
        wanted = wanted.to(torch.float64)
        error = (first[key].to(torch.float64) - wanted).norm()
        assert error <= tolerance * max(1.0, float(wanted.norm())), key


def test_all_get_what_the_first_has(two):
    assert [found["first"] for found in two] == [{"rank": 0}] * 2


def test_a_wish_of_one_is_known_to_all(two):
    assert [found["any"] for found in two] == [[True, False]] * 2


@pytest.mark.parametrize(("size", "tasks"), [(1, 1), (2, 2), (3, 8), (4, 5)])
def test_shares_are_all_tasks_in_order(size, tasks):
    shares = [Ranks(rank, size).span(tasks) for rank in range(size)]
    numbers = [list(range(tasks))[share] for share in shares]
    assert [n for share in numbers for n in share] == list(range(tasks))
    assert [Ranks(rank, size).count(tasks) for rank in range(size)] == [len(n) for n in numbers]
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_sums_of_several_types_are_asked_for_in_their_order(kinds, monkeypatch):
    """As in all other processes, however each of them hashes."""
    asked = []

    def all_reduce(t):
        asked.append(t.dtype)
        t.mul_(2)  # of two that have the same

    monkeypatch.setattr("fewstep.core.ranks.dist.all_reduce", all_reduce)
    kinds = (*kinds, torch.int64)
    tensors = [torch.full((i + 1,), i, dtype=kinds[i % 3]) for i in range(6)]
    sums = Ranks(0, 2).all_reduce(tensors)
    assert asked == list(kinds)
    assert all(torch.equal(s, 2 * t) for s, t in zip(sums, tensors, strict=True))


def test_fewer_tasks_than_processes_are_refused():
    with pytest.raises(InputError, match=r"^2 tasks cannot be shared by 3 processes; .*$"):
        Ranks(0, 3).span(2)


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert Ranks.of_torchrun() == Ranks(0, 1)
    assert Ranks().is_first


def test_a_process_takes_its_own_gpu_before_it_joins(monkeypatch):
    calls = []
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda by: calls.append(by))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    assert Ranks.of_torchrun("cuda") == Ranks(5, 8)
    assert calls == [1, "cpu:gloo,cuda:nccl"]
