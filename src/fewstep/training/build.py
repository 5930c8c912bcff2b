"""From settings to the objects they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from fewstep.core.errors import InputError
from fewstep.core.judge import Loss
from fewstep.core.learner import MetaLearner
from fewstep.core.memory import plan_memory
from fewstep.core.ranks import ALONE, Ranks
from fewstep.core.tasks import Episodes
from fewstep.core.tensors import Tensors
from fewstep.data.augmentation import UNCHANGED
from fewstep.data.drawn_ahead import DrawnAhead
from fewstep.data.episodes import ClassificationEpisodes, classes_of_each
from fewstep.data.labelled import LabelledImages, hold_out
from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.data.store import ClassStore, to_device
from fewstep.training.classes_file import Classes
from fewstep.training.config import RunConfig, SinusoidData
from fewstep.training.environment import commit
from fewstep.training.episode_options import (
    SPLITS,
    ClassificationOptions,
    RegressionOptions,
    Split,
    SupervisedOptions,
)
from fewstep.training.head import fitting_head
from fewstep.training.initial import check_unseen, start_from

EVAL_SEED = 0  # validation and test tasks are the same for every run, so that runs compare


def resolve_device(name: str) -> str:
    """Return the device to use.

    Raises:
        InputError: it does not exist here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); use --device cpu") from error
    return name


@dataclass(frozen=True)
class Problem:
    """Episodes of every split, and what a model needs to know of them."""

    episodes: dict[Split, Episodes]
    input_shape: tuple[int, ...]
    outputs: int  # of a learner that is trained on them
    classes: Classes = field(default_factory=dict)  # of every split, where they have names


@dataclass(frozen=True)
class Experiment:
    """What the settings of a run stand for.

    Args:
        config: The settings.
        problem: The episodes.
        learner: What is trained.
        tester: What is tested: the learner, or one for tasks of other ways.
    """

    config: RunConfig
    problem: Problem
    learner: MetaLearner
    tester: MetaLearner

    @classmethod
    def build(
        cls,
        config: RunConfig,
        ranks: Ranks = ALONE,
        initial: Tensors | None = None,
        splits: Sequence[Split] = SPLITS,
    ) -> Experiment:
        """Load the data and build the learner, for the processes that share each batch.

        Args:
            config: The settings.
            ranks: The processes.
            initial: Parameters of the module to start from, by name; the others are drawn.
            splits: Those that are wanted.

        Raises:
            InputError: the device, the data, the episodes or the model cannot be had, training has
                fewer tasks than processes, or what it starts from was trained on its test classes.
        """
        trains = {"train", "val"} <= {*splits}  # a test has one of them
        if trains:
            for tasks in (config.tasks, config.val_tasks, config.test_tasks):
                ranks.count(tasks)  # refuses now what would be refused after hours
        config = replace(config, device=resolve_device(config.device))
        problem = build_problem(config, config.device, splits)
        if initial is not None and config.initial is not None:
            check_unseen(config.initial, problem.classes)
        shape = problem.input_shape
        learner = build_learner(config, shape, problem.outputs, ranks, initial)
        if config.memory_budget is not None:
            some = problem.episodes[splits[0]].batch(0, config.tasks)
            try:
                plan_memory(learner, some, config.memory_budget, num_iterations=config.iterations)
            except InputError:
                if trains:
                    raise
                learner.chunk_size = 1  # in tests no graph outlives a step
        tester, tests = learner, config.for_tests()
        if tests != config:
            assert isinstance(tests.episodes, ClassificationOptions)
            tester = build_learner(tests, shape, tests.episodes.ways, ranks)
            tester.chunk_size = learner.chunk_size
        return cls(config, problem, learner, tester)

    def current(self) -> MetaLearner:
        """Return the tester with what the learner has learned so far."""
        if self.tester is not self.learner:
            state = fitting_head(self.tester, self.learner.state_tensors())
            self.tester.load_state_tensors(state)
        return self.tester


def build_problem(config: RunConfig, device: str, splits: Sequence[Split] = SPLITS) -> Problem:
    """Load the data and set up the episodes of the splits.

    Raises:
        InputError: the data cannot be had, or do not hold such episodes.
    """
    seeds = {split: config.seed if split == "train" else EVAL_SEED for split in splits}
    if isinstance(config.data, SinusoidData):
        assert isinstance(config.episodes, RegressionOptions)
        points = {"shots": config.episodes.shots, "queries": config.episodes.queries}
        sinusoids: dict[Split, Episodes] = {
            split: SinusoidEpisodes(split, **points, seed=seed, device=device)
            for split, seed in seeds.items()
        }
        return Problem(_drawn_ahead(sinusoids), (1,), 1)
    stores = to_device(config.data.splits(), device)
    classes = {split: store.names for split, store in stores.items()}
    if isinstance(config.episodes, SupervisedOptions):
        return replace(_supervised(config.episodes, stores["train"], seeds), classes=classes)
    of = config.episodes
    assert isinstance(of, ClassificationOptions)
    # The fewest classes first: what these refuse names the most that all splits can have.
    by_classes = sorted(splits, key=lambda split: _num_classes(of, stores, split))
    episodes: dict[Split, Episodes] = {
        split: classification_episodes(of, stores, split, seeds[split]) for split in by_classes
    }
    outputs = of.ways_of("train")
    return Problem(_drawn_ahead(episodes), stores["train"].image_shape, outputs, classes)


def _supervised(options: SupervisedOptions, store: ClassStore, seeds: dict[Split, int]) -> Problem:
    """Set up batches of the training classes, of images held out for val and test."""
    parts = hold_out(store, options.held_out)
    batches = {
        split: LabelledImages(
            parts[split],
            split,
            examples=options.examples,
            rotations=options.rotations,
            augmentation=options if split == "train" else UNCHANGED,
            seed=seed,
        )
        for split, seed in seeds.items()
    }
    some = next(iter(batches.values()))
    episodes: dict[Split, Episodes] = {**batches}
    return Problem(_drawn_ahead(episodes), store.image_shape, some.classes)


def _drawn_ahead(episodes: dict[Split, Episodes]) -> dict[Split, Episodes]:
    return {s: DrawnAhead(each) if s == "train" else each for s, each in episodes.items()}


def classification_episodes(
    options: ClassificationOptions,
    stores: dict[str, ClassStore],
    split: Split,
    seed: int,
) -> ClassificationEpisodes:
    """Set up the episodes of one split, with the training or the evaluation options."""
    is_train, ways = split == "train", options.ways_of(split)
    largest = _num_classes(options, stores, split)
    if is_train and options.train_ways is not None and ways > largest:
        raise InputError(
            f"train_ways={ways} asks for more classes than the {largest} of the train split; ask "
            f"for at most {largest}"
        )
    return ClassificationEpisodes(
        stores[split],
        split,
        ways=ways,
        shots=options.shots,
        queries=options.queries if is_train else options.eval_queries,
        rotations=options.rotations_of(split),
        augmentation=options if is_train else UNCHANGED,
        seed=seed,
    )


def _num_classes(
    options: ClassificationOptions, stores: dict[str, ClassStore], split: Split
) -> int:
    """Return how many classes an episode of a split has to choose from."""
    return len(stores[split]) * classes_of_each(options.rotations_of(split))


def build_learner(
    config: RunConfig,
    input_shape: tuple[int, ...],
    outputs: int,
    ranks: Ranks = ALONE,
    initial: Tensors | None = None,
    support_loss: Loss | None = None,
) -> MetaLearner:
    """Build the model, its initial parameters given or drawn from the seed, and its learner."""
    if config.compile and config.network == "conv4":
        raise InputError(
            "compile=True does not go with network='conv4', whose kernels torch.compile cannot "
            "take; leave it out"
        )
    commit()  # of the code at work; another may be checked out when scores are written
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU: every device starts alike
        torch.default_generator.manual_seed(config.seed)
        module = config.model.build(input_shape, outputs).to(config.device)
    learner = MetaLearner(
        module,
        config.algorithm.build(config.iterations, config.epoch_length),
        F.mse_loss if config.dataset == "sinusoid" else F.cross_entropy,
        support_loss=support_loss,
        chunk_size=config.chunk_size,
        checkpoint_every=config.checkpoint_every,
        replay=config.replay,
        compile=config.compile,
        precision=config.precision,
        ranks=ranks,
    )
    if initial is not None:
        start_from(learner, initial)
    return learner
