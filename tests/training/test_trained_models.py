"""The trained models in results/ load, and tell apart characters of a kind they have never seen."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fewstep import MetaLearner, maml
from fewstep.core.errors import InputError
from fewstep.data.episodes import ClassificationEpisodes
from fewstep.data.glyphs import Glyphs
from fewstep.training.initial import read_initial, start_from
from fewstep.training.load import load_learner
from fewstep.training.parse import load_config
from fewstep.training.run_folder import RunFolder

RESULTS = Path(__file__).parents[2] / "results"
RUNS = sorted(RESULTS.glob("*/run"))
WEIGHTS = sorted(RESULTS.glob("*/weights.safetensors"))
OF_CHARACTERS = [path for path in RUNS if RunFolder.open(path).settings()["dataset"] == "omniglot"]


def test_there_are_some():
    assert WEIGHTS
    assert OF_CHARACTERS
    assert set(RUNS) > set(OF_CHARACTERS)


@pytest.mark.parametrize("path", OF_CHARACTERS, ids=lambda path: path.parent.name)
def test_a_trained_model_learns_drawn_characters(path):
    ways = RunFolder.open(path).settings()["episodes"]["ways"]
    store = Glyphs().splits()["test"]
    episodes = ClassificationEpisodes(store, "test", ways=ways, shots=1, queries=1)
    scores = load_learner(path, device="cpu").evaluate(episodes, 10)
    assert scores.mean > 0.9


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_a_trained_model_can_be_trained_on(path):
    state = RunFolder.open(path).state()
    assert state is not None
    learner = load_learner(path, checkpoint="last", device="cpu")
    assert learner.iteration == state.iteration
    assert learner.optimiser.state


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.parent.name)
def test_a_run_can_start_from_trained_weights(path):
    config = load_config(path.parent / "config.toml")
    initial = read_initial(path)
    has_projection = "blocks.projection.weight" in initial  # in place of the classifier's head
    model = replace(config.model, projection=has_projection)
    module = model.build(config.data.image_shape, 5)
    drawn = {name: p.clone() for name, p in module.named_parameters()}
    start_from(MetaLearner(module, maml(inner_lr=0.1), F.cross_entropy), initial)
    kept = [name for name, p in module.named_parameters() if torch.equal(p, drawn[name])]
    assert kept == ["head.weight", "head.bias"]


def test_only_one_checkpoint_is_loaded():
    with pytest.raises(InputError, match=r"^unknown checkpoint 'ensemble'; valid are best, last$"):
        load_learner(RUNS[0], checkpoint="ensemble")
