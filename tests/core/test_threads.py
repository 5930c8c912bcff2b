"""Learners in several threads go by their own statistics and leave the process as it was."""

import copy
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewstep import InputError, MetaLearner, NormStatistics, TaskBatch, maml
from fewstep.core.normalise import OF_BATCH, NormaliseBy, Statistics
from fewstep.core.precision import fp32_products
from fewstep.core.process_wide import ProcessWide

pytestmark = pytest.mark.usefixtures("float64")


def flags() -> tuple[bool, ...]:
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )


@pytest.mark.parametrize("replay", [False, True], ids=["plain", "replay"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_two_learners_in_two_threads(device, replay):
    x, y = torch.randn(2, 3, 4, 3, device=device), torch.randn(2, 3, 4, 2, device=device)
    batch, before = TaskBatch(x[0], y[0], x[1], y[1]), flags()
    learners = []
    for use in ("support", "running"):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        algorithm = replace(maml(2, 0.1), norm_statistics=NormStatistics(use))
        learners.append(MetaLearner(module.to(device), algorithm, F.mse_loss, replay=replay))
    expected = [copy.deepcopy(learner).predict(batch, 3) for learner in learners]
    together = Barrier(2)

    def predict(learner: MetaLearner) -> list[torch.Tensor]:
        together.wait()
        return [learner.predict(batch, 3) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(predict, learners), expected, strict=True):
            assert all(torch.equal(each, wanted) for each in found)
    assert NormaliseBy.innermost() is OF_BATCH
    assert flags() == before


def test_two_precisions_at_once_are_refused():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with ThreadPoolExecutor(1) as pool:

        def other(precision):
            with fp32_products(precision):
                return matmul.fp32_precision

        with fp32_products("tf32"):
            with pytest.raises(InputError, match=r"^precision='float32' was asked for while"):
                pool.submit(other, "float32").result()
            assert pool.submit(other, "tf32").result() == "tf32"
            assert matmul.fp32_precision == "tf32"
        with fp32_products("bfloat16"):
            assert pool.submit(other, "float32").result() == "ieee"
            with pytest.raises(InputError, match=r"^precision='tf32' was asked for while"):
                pool.submit(other, "tf32").result()
            assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == before


def test_statistics_are_a_thread_s_own():
    with NormaliseBy(Statistics(running=True)), ThreadPoolExecutor(1) as pool:
        assert NormaliseBy.innermost() == Statistics(running=True)
        assert pool.submit(NormaliseBy.innermost).result() is OF_BATCH


def test_a_setting_of_the_process_is_left_by_the_last():
    course = []
    variable = ContextVar("variable", default=False)

    class Setting:
        def __enter__(self) -> None:
            course.append("set")
            self.before = variable.set(True)

        def __exit__(self, *error: object) -> None:
            variable.reset(self.before)  # refuses another context
            course.append("unset")

    setting = ProcessWide(Setting)
    with ThreadPoolExecutor(1) as pool:
        setting.__enter__()
        pool.submit(setting.__enter__).result()
        setting.__exit__()
        assert course == ["set"]
        pool.submit(setting.__exit__).result()
    assert course == ["set", "unset"]
    with setting:
        assert course == ["set", "unset", "set"]
    assert course[3:] == ["unset"]


@pytest.mark.parametrize("replay", [False, True], ids=["plain", "replay"])
def test_one_learner_in_several_threads(replay):
    """A call puts other tensors in the place of the module's parameters."""
    x, y = torch.randn(2, 4, 4, 3), torch.randn(2, 4, 4, 2)
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    learner = MetaLearner(module, maml(3, 0.1), F.mse_loss, chunk_size=1, replay=replay)
    wanted = learner.predict(batch, 4)
    together = Barrier(4)

    def adapt(task: int) -> None:
        together.wait()
        for _ in range(10):
            assert torch.equal(learner.predict(batch, 4), wanted)
            adapted = learner.adapt(batch.x_support[task], batch.y_support[task])
            torch.testing.assert_close(adapted(batch.x_query[task]), wanted[task, -1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(adapt, range(4)))


def test_nobody_predicts_by_the_states_of_another_s_ensemble(monkeypatch):
    x, y = torch.randn(2, 3, 4, 3), torch.randn(2, 3, 4, 2)
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    learner = MetaLearner(nn.Linear(3, 2), maml(1, 0.1), F.mse_loss)
    expected = learner.predict(batch, 3)
    other = {n: t + 1 if n.startswith("model.") else t for n, t in learner.state_tensors().items()}
    load, pool, waiting = learner._meta.load, ThreadPoolExecutor(1), []

    def load_and_be_asked(state):
        load(state)
        if not waiting:  # the other state is in place
            waiting.append(pool.submit(learner.predict, batch, 3))
            assert not wait(waiting, timeout=0.3).done

    monkeypatch.setattr(learner._meta, "load", load_and_be_asked)
    with pool:
        learner.evaluate_ensemble([other], batch, 3)
        assert torch.equal(waiting[0].result(), expected)
