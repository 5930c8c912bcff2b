"""An iteration reads no number off the device and sends none to it, so nothing waits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import MetaLearner
from fewstep.cli.main import main
from fewstep.data.augmentation import Augmentation
from fewstep.data.episodes import ClassificationEpisodes
from fewstep.data.store import ClassStore
from fewstep.training.config import Recipe
from fewstep.training.presets import preset
from fewstep.training.trainer import Trainer, _Unread

WAITING = {
    "aten::_local_scalar_dense",  # .item(), bool() and the like
    "aten::lift_fresh",  # torch.tensor([...])
    "aten::nonzero",
    "aten::masked_select",
}


class NoWaiting(TorchDispatchMode):
    """Fails at an operation that would wait for a GPU, but for tensors that are on the CPU always.

    Args:
        on_host: Adam's counts of steps.
    """

    def __init__(self, on_host: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_host = {id(t) for t in on_host}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if id(args[0]) not in self._on_host:
            assert func.name().split(".")[0] not in WAITING, func
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: str, optimiser: torch.optim.Optimizer) -> Iterator[None]:
    if device == "cpu":
        is_adam = isinstance(optimiser, torch.optim.Adam)
        with NoWaiting([s["step"] for s in optimiser.state.values() if is_adam]):
            yield
        return
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def learner_and_episodes(
    recipe: Recipe, device: str, *, replay: bool
) -> tuple[MetaLearner, ClassificationEpisodes]:
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    store = ClassStore.from_counts(images, [4] * 10, [f"class {i}" for i in range(10)])
    changes = Augmentation(flips=True, shifts=2, crops=0.5, colours=0.2)
    episodes = ClassificationEpisodes(
        store.to(device),
        "train",
        ways=3,
        shots=1,
        queries=2,
        rotations="episode",
        augmentation=changes,
    )
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU())
    module.add_module("head", nn.Linear(8, 3))
    module.to(device)
    algorithm = preset("glyphs", recipe=recipe).algorithm.build(iterations=10, epoch_length=1)
    return MetaLearner(module, algorithm, F.cross_entropy, replay=replay), episodes


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
        ),
    ],
)
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("recipe", get_args(Recipe))
def test_an_iteration_waits_for_nothing(recipe: Recipe, replay: bool, device: str) -> None:
    learner, episodes = learner_and_episodes(recipe, device, replay=replay)
    learner.step(episodes.batch(0, 4))
    learner.step(episodes.batch(4, 4))  # state of the optimiser exists
    with no_waiting(device, learner.optimiser):
        learner.step(episodes.batch(8, 4), check_finite=False)
        learner.hypergradient_rates()


def test_a_check_waits() -> None:
    learner, episodes = learner_and_episodes("maml", "cpu", replay=False)
    with (
        pytest.raises(AssertionError, match="_local_scalar_dense"),
        no_waiting("cpu", learner.optimiser),
    ):
        learner.step(episodes.batch(0, 4))


def test_what_is_unread_is_due_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, episodes = learner_and_episodes("maml", "cpu", replay=False)
    metrics = learner.step(episodes.batch(0, 4))
    now = 100.0
    monkeypatch.setattr("fewstep.training.trainer.time.perf_counter", lambda: now)
    unread = _Unread()
    due = []
    for iteration in range(4):
        now += 0.2
        unread.add(iteration, metrics, {})
        due.append(unread.is_due())
    assert due == [False, False, True, True]
    rows = list(unread.take())
    assert [iteration for iteration, *_ in rows] == [0, 1, 2, 3]
    assert [seconds for *_, seconds in rows] == pytest.approx([0.2] * 4)
    assert not unread.is_due()


def test_validation_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate, clock = Trainer._validate, time.perf_counter
    spent = 0.0

    def slow(self: Trainer, *rest: Any) -> Any:
        nonlocal spent
        spent += 1000
        return validate(self, *rest)

    monkeypatch.setattr(Trainer, "_validate", slow)
    monkeypatch.setattr("fewstep.training.trainer.time.perf_counter", lambda: clock() + spent)
    few = "--tasks 3 --iterations 4 --val-every 2 --val-tasks 4 --test-tasks 4 --device cpu"
    assert main(f"train --dataset sinusoid {few} --out {tmp_path}/run".split()) == 0
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    seconds = {line["iteration"]: line["seconds"] for line in lines if "seconds" in line}
    assert max(seconds[3], seconds[4]) < 500
