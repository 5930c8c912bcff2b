"""The settings of a run: one definition for the command line, the run's file and the docs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fewstep.core.algorithm import ExtraSteps
from fewstep.core.errors import InputError, check_at_least, check_name
from fewstep.core.precision import Precision
from fewstep.data.folder import ImageFolder
from fewstep.data.glyphs import Glyphs
from fewstep.data.mini_imagenet import MiniImageNet
from fewstep.data.omniglot import Omniglot
from fewstep.data.on_disk import OnDisk
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.episode_options import (
    ClassificationOptions,
    EpisodeOptions,
    RegressionOptions,
    SupervisedOptions,
)
from fewstep.training.network_options import (
    NETWORKS,
    Conv4Options,
    FullyConnectedOptions,
    OwnNetworkOptions,
    SinusoidMLPOptions,
)

Recipe = Literal[
    "maml", "fomaml", "anil", "maml++", "maml++-reference-code", "meta-sgd", "alpha-maml", "auto",
    "prototypes", "proto-maml", "supervised",
]  # fmt: skip
Images = Glyphs | Omniglot | MiniImageNet | ImageFolder


@dataclass(frozen=True)
class SinusoidData:
    """Sinusoid regression; needs no files."""


@dataclass(frozen=True)
class RunConfig:
    """Every setting of a training run."""

    dataset: Literal["glyphs", "omniglot", "mini-imagenet", "folder", "sinusoid"] = "glyphs"
    """What to learn; sets the defaults of everything below."""
    network: Literal["conv4", "fully-connected", "sinusoid-mlp", "own"] = "conv4"
    """The model; "own" is what --factory makes."""
    recipe: Recipe = "maml"
    """The method; sets the defaults of its parts. "supervised" tells all training classes apart,
    for another run to start from."""
    data: Images | SinusoidData = field(default_factory=Glyphs)
    """Where the data come from."""
    episodes: EpisodeOptions = field(default_factory=ClassificationOptions)
    """What a task is."""
    model: Conv4Options | FullyConnectedOptions | SinusoidMLPOptions | OwnNetworkOptions = field(
        default_factory=Conv4Options
    )
    """Options of the network."""
    algorithm: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    """The parts of the method."""
    initial: Path | None = None
    """Run, or safetensors file, whose parameters to start from; a last layer of other outputs is
    made anew. Data set and network are then those of the run, if nothing else is said."""
    iterations: int = 1000
    """Outer updates."""
    epoch_length: int | None = None
    """Iterations of an epoch, the unit of the schedules; a hundredth of all if not given."""
    tasks: int = 8
    """Tasks of an iteration (meta-batch)."""
    chunk_size: int = 8
    """Tasks that go through the model at once; bounds memory, changes no result but rounding."""
    checkpoint_every: int | None = None
    """Inner steps whose graph is kept at once, in the second order; 1 takes least memory,
    about twice the time with 5 steps and three times with 20, and changes no result but
    rounding. All of them if not given."""
    memory_budget: float | None = None
    """MiB for the graphs of a meta-gradient; chunk_size and checkpoint_every are then chosen by
    measuring."""
    replay: bool = True
    """Record the operations of training and testing once and replay them: the same numbers,
    sooner."""
    compile: bool = False
    """Hand the recording to torch.compile (needs a C++ compiler): small networks are several times
    faster, after some ten seconds; Conv4 is refused."""
    precision: Precision = "float32"
    """Precision of matrix products and convolutions: tf32 on GPUs that have it, bfloat16 by
    autocast; all else stays float32. See docs/speed.md for what it costs in accuracy."""
    val_every: int = 250
    """Iterations between validations; each writes a checkpoint."""
    val_tasks: int = 200
    """Tasks of a validation."""
    test_tasks: int = 600
    """Tasks of the final test."""
    keep_best: int = 1
    """Checkpoints to keep, those with the best validation scores; several make an ensemble."""
    seed: int = 0
    """Seed of the initial parameters and of the training episodes."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" takes a GPU where there is one."""

    def __post_init__(self) -> None:
        check_at_least(1, iterations=self.iterations, tasks=self.tasks, val_every=self.val_every)
        check_at_least(1, chunk_size=self.chunk_size, keep_best=self.keep_best)
        check_at_least(1, "iteration", epoch_length=self.epoch_length)
        check_at_least(1, "step", checkpoint_every=self.checkpoint_every)
        check_at_least(2, val_tasks=self.val_tasks, test_tasks=self.test_tasks)
        if self.memory_budget is not None and not 0 < self.memory_budget < math.inf:
            raise InputError(
                f"memory_budget={self.memory_budget} must be positive and finite, in MiB"
            )
        if not -(2**63) <= self.seed < 2**64:  # what torch.manual_seed takes
            raise InputError(f"seed={self.seed} must be between {-(2**63)} and {2**64 - 1}")
        self._check_parts()
        self._check_inner_loop()

    def _check_parts(self) -> None:
        """Check that data, episodes and network go together."""
        is_supervised = self.recipe == "supervised"
        of_classes = {
            f"recipe={self.recipe!r}": is_supervised,
            f"start={self.algorithm.start!r}": self.algorithm.start == "prototypes",
        }
        for what, is_asked in of_classes.items():
            if is_asked and self.dataset == "sinusoid":
                raise InputError(f"{what} learns classes, and dataset='sinusoid' has none")
        wanted = (
            ("dataset", "data", SOURCES[self.dataset]),
            ("recipe", "episodes", SupervisedOptions)
            if is_supervised
            else ("dataset", "episodes", _episode_options(self.dataset)),
            ("network", "model", NETWORKS[self.network]),
        )
        for tag, part, expected in wanted:
            if not isinstance(getattr(self, part), expected):
                raise InputError(
                    f"{tag}={getattr(self, tag)!r} goes with {part} of type {expected.__name__}, "
                    f"not {type(getattr(self, part)).__name__}"
                )
        fits = (self.dataset == "sinusoid") == (self.network == "sinusoid-mlp")
        if not fits and self.network != "own":
            raise InputError(
                f"network={self.network!r} does not fit dataset={self.dataset!r}; sinusoid takes "
                "sinusoid-mlp, images take conv4 or fully-connected, and both 'own'"
            )

    def _check_inner_loop(self) -> None:
        """Check that the method's parts have something to do, in such episodes."""
        of = self.algorithm
        adapts = of.num_steps > 0 or of.eval_steps > 0 or of.start == "prototypes"
        if self.recipe == "supervised" and (adapts or of.statistics == "support"):
            raise InputError(
                "recipe='supervised' has no support set to adapt to or to normalise by; leave out "
                "num_steps, eval_steps, start and statistics='support'"
            )
        train_ways = getattr(self.episodes, "train_ways", None)
        if train_ways is not None and not self.takes_any_ways:
            raise InputError(
                f"train_ways={train_ways}: the last layer, or its inner rates, are learned for as "
                "many classes as tests have; leave it out, or train with --start prototypes and no "
                "--learned-rates element"
            )

    def placed(self) -> RunConfig:
        """Return the settings with paths that lead to the same files from any folder."""
        initial = None if self.initial is None else self.initial.absolute()
        root = getattr(self.data, "root", None)
        data = self.data if root is None else replace(self.data, root=root.absolute())
        model = self.model.placed() if isinstance(self.model, OwnNetworkOptions) else self.model
        return replace(self, initial=initial, data=data, model=model)

    def with_root(self, root: Path | None) -> RunConfig:
        """Return the settings with the data in another place; None leaves them.

        Raises:
            InputError: the data are read from no folder.
        """
        if root is None:
            return self
        if not isinstance(self.data, OnDisk):
            raise InputError(f"root={root}: dataset={self.dataset!r} has no files; leave it out")
        return replace(self, data=replace(self.data, root=root.absolute()))

    @property
    def takes_any_ways(self) -> bool:
        """Whether tasks may have any number of classes, as no part is of a certain class."""
        return self.algorithm.start == "prototypes" and self.algorithm.learned_rates != "element"

    def for_tests(self, ways: int | None = None) -> RunConfig:
        """Return the settings for tasks of so many classes, in each split; None takes the tests'.

        Raises:
            InputError: the last layer is one of other classes, which tasks start from.
        """
        if not isinstance(self.episodes, ClassificationOptions):
            if ways is not None:
                raise InputError(f"ways={ways}: the run's tasks have no classes; leave it out")
            return self
        own = self.episodes.ways
        ways = own if ways is None else ways
        if ways != own and not self.takes_any_ways:
            raise InputError(
                f"ways={ways}: the last layer, or its inner rates, were learned for {own} classes; "
                "leave it out, or train with --start prototypes and no --learned-rates element"
            )
        return replace(self, episodes=replace(self.episodes, ways=ways, train_ways=None))

    def with_extra_steps(self, extra_steps: ExtraSteps | None) -> RunConfig:
        """Return the settings for tests of more steps than trained; None leaves them."""
        if extra_steps is None:
            return self
        return replace(self, algorithm=replace(self.algorithm, extra_steps=extra_steps))


SOURCES: dict[str, type] = {
    "glyphs": Glyphs,
    "omniglot": Omniglot,
    "mini-imagenet": MiniImageNet,
    "folder": ImageFolder,
    "sinusoid": SinusoidData,
}


def _episode_options(dataset: str) -> type:
    return RegressionOptions if dataset == "sinusoid" else ClassificationOptions


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain values; what is None is left out, as TOML asks."""
    plain: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            plain[f.name] = to_dict(value)
        elif isinstance(value, Path):
            plain[f.name] = str(value)
        elif isinstance(value, tuple):
            plain[f.name] = list(value)
        elif value is not None:
            plain[f.name] = value
    return plain


def option_arguments(values: Mapping[str, Any], default: Any) -> list[str]:
    """Turn a file's values into command-line arguments, so that one parser reads both.

    Args:
        values: Nested values, as `to_dict` gives and TOML holds.
        default: The configuration whose fields they must name.

    Raises:
        InputError: an unknown key, with the nearest valid one.
    """
    arguments: list[str] = []
    for key, value in values.items():
        names = [f.name for f in fields(default)]
        if not names:
            raise InputError(f"unknown key {key!r}; its section has no settings here, so remove it")
        check_name("key", key, names)
        held = getattr(default, key)
        if isinstance(value, Mapping) != is_dataclass(held):
            kind = "a section" if is_dataclass(held) else "a value, not a section"
            raise InputError(f"{key!r} must be {kind}; see the config.toml of a run")
        if isinstance(value, Mapping):
            arguments += option_arguments(value, held)
            continue
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, str) and value.startswith("-"):
            arguments.append(f"{option}={value}")  # apart it would be an option
            continue
        words = value if isinstance(value, list) else [value]
        for word in words:
            if isinstance(word, str) and word.startswith("-"):
                raise InputError(
                    f"{key} has {word!r}, which reads as an option; write its hyphen as '[-]'"
                )
        arguments += [option, *map(str, words)]
    return arguments
