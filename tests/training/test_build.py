from dataclasses import replace

import pytest
import torch

from fewstep.core.errors import InputError
from fewstep.core.ranks import Ranks
from fewstep.data.store import ClassStore, to_device
from fewstep.training.build import Experiment, build_problem, classification_episodes
from fewstep.training.episode_options import ClassificationOptions, SupervisedOptions
from fewstep.training.presets import preset

AS_DRAWN = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8)


@pytest.mark.parametrize(
    "option",
    [{"rotations": "episode"}, {"flips": True}, {"shifts": 1}, {"crops": 0.5}, {"colours": 0.2}],
    ids=str,
)
def test_images_are_changed_in_training_alone(option):
    store = ClassStore.from_counts(AS_DRAWN.repeat(20, 1, 1, 1), [5] * 4, "abcd")
    options = ClassificationOptions(ways=3, queries=2, eval_queries=2, **option)
    stores = dict.fromkeys(("train", "val", "test"), store)
    for split in ("train", "val", "test"):
        batch = classification_episodes(options, stores, split, 0).batch(0, 50)
        as_drawn = (batch.x_support == AS_DRAWN / 255).flatten(2).all(-1)
        if split == "train":
            always = {"crops", "colours"} & option.keys()  # every image is
            assert not as_drawn.any() if always else 0 < as_drawn.double().mean() < 1
        else:
            assert as_drawn.all()


@pytest.mark.parametrize("recipe", ["maml++", "maml++-reference-code", "auto"])
def test_photographs_of_one_s_own_are_learned_as_mini_imagenet_s(recipe):
    own, mini = (preset(dataset, recipe=recipe) for dataset in ("folder", "mini-imagenet"))
    assert own.algorithm == mini.algorithm
    assert (own.episodes, own.iterations, own.tasks) == (mini.episodes, mini.iterations, mini.tasks)


@pytest.mark.parametrize(
    "option", [{"flips": True}, {"shifts": 1}, {"crops": 0.5}, {"colours": 0.2}], ids=str
)
def test_images_of_all_classes_are_changed_in_training_alone(option, monkeypatch):
    store = ClassStore.from_counts(AS_DRAWN.repeat(40, 1, 1, 1), [10] * 4, "abcd")
    config = preset("glyphs", recipe="supervised")
    monkeypatch.setattr(type(config.data), "splits", lambda self: {"train": store})
    options = SupervisedOptions(examples=50, held_out=0.2, **option)
    problem = build_problem(replace(config, episodes=options), "cpu")
    for split, source in problem.episodes.items():
        as_drawn = (source.batch(0, 2).x_query == AS_DRAWN / 255).flatten(2).all(-1)
        assert as_drawn.all() == (split != "train"), split


def test_only_the_splits_that_are_wanted_need_to_fit():
    """A test of 18 shots and 2 queries has room where training with 3 queries has none."""
    config = preset("glyphs")
    episodes = replace(config.episodes, shots=18, queries=3, eval_queries=2)
    config = replace(config, episodes=episodes)
    problem = build_problem(config, "cpu", ["test"])
    assert list(problem.episodes) == ["test"]
    assert problem.episodes["test"].batch(0, 2).x_support.shape[:2] == (2, 90)
    with pytest.raises(InputError, match=r"shots=18 and queries=3 need 21 images.* train split"):
        build_problem(config, "cpu")


def test_a_compiled_conv4_is_refused_before_there_is_a_folder():
    with pytest.raises(InputError, match=r"^compile=True does not go with network='conv4'"):
        Experiment.build(replace(preset("glyphs"), compile=True))


def test_images_that_splits_share_are_moved_once():
    store = ClassStore.from_counts(AS_DRAWN.repeat(20, 1, 1, 1), [5] * 4, "abcd")
    stores = {"train": store.select([0, 1]), "val": store.select([2]), "test": store.select([3])}
    moved = to_device(stores, "meta")
    assert len({id(each.images) for each in moved.values()}) == 1
    for split, each in moved.items():
        assert {t.device.type for t in (each.images, each.starts, each.counts)} == {"meta"}
        assert each.names == stores[split].names


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"num_steps": 3}, "eval_steps=5 is more than the 3 that LayerStepRates"),
        ({"eval_steps": -1}, "eval_steps=-1 must be a whole number, 0 or more"),
    ],
    ids=str,
)
def test_steps_that_a_test_cannot_take_are_refused_before_training(steps, message):
    config = preset("sinusoid", recipe="maml++")
    config = replace(config, algorithm=replace(config.algorithm, **steps))
    with pytest.raises(InputError, match=f"^{message}.*$"):
        Experiment.build(config)


@pytest.mark.parametrize("tasks", ["tasks", "val_tasks", "test_tasks"])
def test_fewer_tasks_than_processes_are_refused_before_training(tasks):
    config = replace(preset("sinusoid"), **{tasks: 2})
    Experiment.build(config, Ranks(0, 2))
    with pytest.raises(InputError, match=r"^2 tasks cannot be shared by 3 processes;"):
        Experiment.build(config, Ranks(0, 3))


def test_maml_plus_plus_learns_sinusoids():
    """Single steep tasks had carried its rates, and then its losses, off to infinity."""
    experiment = Experiment.build(replace(preset("sinusoid", recipe="maml++"), iterations=7000))
    learner, tasks = experiment.learner, experiment.config.tasks
    for iteration in range(450):
        batch = experiment.problem.episodes["train"].batch(iteration * tasks, tasks)
        loss = learner.step(batch).loss
        assert loss < 100, f"iteration {iteration}"
    assert learner.evaluate(experiment.problem.episodes["val"], 50).mean < 1


@pytest.mark.parametrize("dataset", ["sinusoid", "omniglot", "mini-imagenet"])
def test_meta_sgd_is_tested_after_the_steps_that_its_rates_are_for(dataset):
    """Sinusoids have no finite loss after ten steps by rates that one step has learned."""
    parts = preset(dataset, recipe="meta-sgd").algorithm
    assert (parts.learned_rates, parts.eval_steps) == ("element", parts.num_steps)


def test_processes_that_test_alone_need_no_share_of_training():
    config = replace(preset("sinusoid"), tasks=1, device="cpu")
    with pytest.raises(InputError, match="1 tasks cannot be shared by 2 processes"):
        Experiment.build(config, Ranks(0, 2))
    for split in ("test", "train"):
        experiment = Experiment.build(config, Ranks(0, 2), splits=(split,))
        assert list(experiment.problem.episodes) == [split]


def test_a_test_of_training_tasks_fits_any_memory():
    config = replace(preset("glyphs"), memory_budget=1e-3, device="cpu")
    with pytest.raises(InputError, match=r"is below the .* MiB that one task"):
        Experiment.build(config)
    assert Experiment.build(config, splits=["train"]).learner.chunk_size == 1


def test_too_many_ways_of_training_are_called_so():
    store = ClassStore.from_counts(AS_DRAWN.repeat(40, 1, 1, 1), [20] * 4, "abcd")
    stores = dict.fromkeys(("train", "val", "test"), store)
    options = ClassificationOptions(ways=2, train_ways=5)
    with pytest.raises(InputError, match=r"^train_ways=5 asks for more classes than the 4 of the"):
        classification_episodes(options, stores, "train", 0)
    assert classification_episodes(options, stores, "test", 0).ways == 2
    turned = ClassificationOptions(ways=2, train_ways=16, rotations="classes")
    assert classification_episodes(turned, stores, "train", 0).ways == 16


def test_a_seed_draws_parameters_and_training_tasks_and_no_others():
    """Validations and tests of all seeds are on the same tasks, so that they compare."""
    config = preset("glyphs")
    runs = [Experiment.build(replace(config, seed=seed, device="cpu")) for seed in (0, 1)]
    weights = [next(run.learner.module.parameters()) for run in runs]
    assert not torch.equal(*weights)
    for split in ("train", "val", "test"):
        tasks = [run.problem.episodes[split].batch(0, 2).x_support for run in runs]
        assert torch.equal(*tasks) == (split != "train"), split
    again = Experiment.build(replace(config, seed=1, device="cpu"))
    assert torch.equal(next(again.learner.module.parameters()), weights[1])
