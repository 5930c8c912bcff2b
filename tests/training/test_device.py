"""All tensors of an iteration are on the model's device; "meta" stands in for one.

A meta tensor does not mix with the CPU's and has no value to read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep import AdamStep, MetaLearner, TaskBatch, maml
from fewstep.core.hypergradient import HypergradientAdam
from fewstep.core.metrics import Metrics
from fewstep.data.augmentation import Augmentation
from fewstep.data.drawn_ahead import DrawnAhead
from fewstep.data.episodes import ClassificationEpisodes, Rotations
from fewstep.data.labelled import LabelledImages
from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.data.store import ClassStore
from fewstep.models import sinusoid_mlp
from fewstep.training.config import Recipe
from fewstep.training.presets import preset
from tests.core.reference import WAYS, batch_norm_cnn, two_blocks

CHANGES = Augmentation(flips=True, shifts=2, crops=0.5, colours=0.2)

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoints": {"checkpoint_every": 1},
    "loop": {"vectorize": False, "chunk_size": 1},
    "replay": {"replay": True},
}


class OnDevice(TorchDispatchMode):
    """Fails at an operation that reads or makes a tensor elsewhere: a copy, which would wait."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        assert all(t.is_meta for t in tensors), func
        return out


@pytest.fixture(autouse=True)
def _autocast_knows_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def enabled(device: str) -> bool:
        return device != "meta" and is_enabled(device)

    def cast(device: str, *rest: Any, **options: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device == "meta" else autocast(device, *rest, **options)

    monkeypatch.setattr(torch, "is_autocast_enabled", enabled)
    monkeypatch.setattr(torch, "autocast", cast)


def ten_classes() -> ClassStore:
    pixels = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
    return ClassStore.from_counts(pixels, [4] * 10, [f"class {i}" for i in range(10)])


def images(rotations: Rotations) -> ClassificationEpisodes:
    store = ten_classes()
    episodes = ClassificationEpisodes(
        store, "train", ways=3, shots=1, queries=2, rotations=rotations, augmentation=CHANGES
    )
    episodes.store = store.to("meta")
    return episodes


@pytest.mark.parametrize(
    ("recipe", "mode"),
    [
        *((recipe, "replay") for recipe in get_args(Recipe)),
        *(("maml++", mode) for mode in MODES if mode != "replay"),
    ],
)
def test_classification(recipe: Recipe, mode: str) -> None:
    options = replace(preset("glyphs", recipe=recipe).algorithm, num_steps=2, eval_steps=2)
    algorithm = options.build(iterations=10, epoch_length=1)
    module = two_blocks().to("meta")
    learner = MetaLearner(module, algorithm, F.cross_entropy, **MODES[mode])
    episodes = DrawnAhead(images("episode"))
    # Of 10 iterations, one in every phase of the schedules, which other recipes have not.
    for iteration in (0, 4, 9) if "++" in recipe or recipe == "auto" else (0,):
        learner.iteration = iteration
        metrics = learner.step(episodes.batch(2 * iteration, 2), check_finite=False)
    with OnDevice():
        batch = episodes.batch(0, 2)
        gradients, _ = learner.meta_gradient(batch)
    found = [
        metrics.loss,
        metrics.metric,
        metrics.gradient_norm,
        *learner.hypergradient_rates().values(),
    ]
    assert all(t.is_meta for t in [*batch.tensors(), *gradients.values(), *found])
    assert learner.predict(episodes, 4).is_meta
    adapted = learner.adapt(batch.x_support[0], batch.y_support[0])
    assert all(p.is_meta for p in adapted.parameters())


class LearnedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WAYS, 2)

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.layer(outputs).square().mean() + F.cross_entropy(outputs, y)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_remembers_and_a_loss_that_is_learned(mode: str) -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, WAYS)).to("meta")
    x = torch.randn(2, 2, 6, 4, device="meta")
    y = torch.zeros(2, 2, 6, dtype=torch.long, device="meta")
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    algorithm = replace(maml(3), inner_step=AdamStep())
    learner = MetaLearner(
        module, algorithm, F.cross_entropy, support_loss=LearnedLoss().to("meta"), **MODES[mode]
    )
    learner.step(batch, check_finite=False)
    with OnDevice():
        gradients, _ = learner.meta_gradient(batch)
    assert gradients["support_loss.layer.weight"].is_meta


class OfWords(nn.Module):
    """An embedding and a recurrent layer, both of which something stands in for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, padding_idx=0)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0][:, -1])


@pytest.mark.parametrize(("kind", "replay"), [("images", False), ("images", True), ("words", True)])
def test_any_module(kind: str, replay: bool) -> None:
    if kind == "images":
        x = torch.randn(2, 3, 6, 1, 6, 6, device="meta")
        module = batch_norm_cnn()
    else:
        x = torch.zeros(2, 3, 6, 5, dtype=torch.long, device="meta")
        module = OfWords()
    y = torch.zeros(2, 3, 6, dtype=torch.long, device="meta")
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    learner = MetaLearner(module.to("meta"), maml(2), F.cross_entropy, replay=replay)
    for _ in range(2):
        learner.step(batch, check_finite=False)
        with OnDevice():
            learner.meta_gradient(batch)
    assert learner.predict(batch, 3).is_meta


@pytest.mark.parametrize("rotations", get_args(Rotations))
def test_drawing_images(rotations: Rotations) -> None:
    assert all(t.is_meta for t in images(rotations).batch(0, 4).tensors())


def test_drawing_labelled_images() -> None:
    store = ten_classes().to("meta")
    labelled = LabelledImages(store, "train", examples=5, rotations="classes", augmentation=CHANGES)
    assert all(t.is_meta for t in labelled.batch(0, 4).tensors())


def test_sinusoids() -> None:
    episodes = DrawnAhead(SinusoidEpisodes("train", shots=5, queries=5, device="meta"))
    algorithm = preset("sinusoid", recipe="maml").algorithm.build(10, 1)
    learner = MetaLearner(sinusoid_mlp().to("meta"), algorithm, F.mse_loss)
    for iteration in range(3):
        metrics = learner.step(episodes.batch(2 * iteration, 2), check_finite=False)
    assert metrics.loss.is_meta


def test_a_count_of_steps_goes_on_where_the_parameters_are() -> None:
    """PyTorch leaves what is called "step" where it was saved, on the CPU."""
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimiser = HypergradientAdam(0.1, 0.01)([p])
    saved = {"step": torch.tensor(3.0), "m": torch.ones(2), "v": torch.ones(2)}
    optimiser.load_state_dict(
        {"state": {0: saved}, "param_groups": optimiser.state_dict()["param_groups"]}
    )
    assert all(t.is_meta for t in optimiser.state[p].values())


def test_tasks_on_their_way_to_the_cpu_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from a GPU that nothing waits for is read before it is there."""
    told, to = [], Tensor.to

    def noted(self: Tensor, device: Any, **options: Any) -> Tensor:
        told.append((str(device), options["non_blocking"]))
        return to(self, device)

    monkeypatch.setattr(Tensor, "to", noted)
    batch = TaskBatch(*(torch.zeros(1, 2, 3) for _ in range(4)))
    for device in ("cpu", torch.device("cpu"), "meta"):
        batch.to(device)
    assert told == [("cpu", False)] * 8 + [("meta", True)] * 4


@pytest.mark.parametrize("bad", ["support_loss", "query_loss", "gradient_norm"])
def test_whether_all_is_finite_is_a_number_on_the_device(bad: str) -> None:
    numbers = {
        "task_loss": torch.ones(2), "task_metric": torch.ones(2), "support_loss": torch.ones(2, 3),
        "query_loss": torch.ones(2, 1), "gradient_norm": torch.ones(()),
    }  # fmt: skip
    assert Metrics("loss", **numbers).is_finite
    with_nan = numbers[bad].clone()
    with_nan.view(-1)[-1] = torch.nan
    metrics = Metrics("loss", **(numbers | {bad: with_nan}))
    assert not metrics.is_finite
    with pytest.raises(FloatingPointError):
        metrics.check_finite()
