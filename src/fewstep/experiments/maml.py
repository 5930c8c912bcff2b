"""MAML's paper: its accuracies on Omniglot and mini-ImageNet, and what to hold beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from rich.console import Console

from fewstep.core.errors import InputError, check_at_least, check_names
from fewstep.core.precision import Precision
from fewstep.data.episodes import Rotations
from fewstep.data.omniglot import Omniglot
from fewstep.experiments.accuracy_table import accuracy_table
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.config import RunConfig
from fewstep.training.episode_options import ClassificationOptions
from fewstep.training.network_options import Conv4Options, FullyConnectedOptions
from fewstep.training.presets import preset


@dataclass(frozen=True)
class _Setting:
    """What a task is, how many are in an iteration, and the paper's steps and inner rate."""

    ways: int
    shots: int
    tasks: int
    num_steps: int
    eval_steps: int
    inner_lr: float


SETTINGS = {
    "omniglot": {
        "5-way 1-shot": _Setting(5, 1, 32, 1, 3, 0.4),
        "5-way 5-shot": _Setting(5, 5, 32, 1, 3, 0.4),
        "20-way 1-shot": _Setting(20, 1, 16, 5, 5, 0.1),
        "20-way 5-shot": _Setting(20, 5, 16, 5, 5, 0.1),
    },
    "mini-imagenet": {
        "5-way 1-shot": _Setting(5, 1, 4, 5, 10, 0.01),
        "5-way 5-shot": _Setting(5, 5, 2, 5, 10, 0.01),
    },
}
NO_CONVOLUTIONS = "MAML without convolutions"
METHODS = ("MAML", "first-order MAML", NO_CONVOLUTIONS)
PROTOTYPES = {"prototypical networks": "prototypes", "Proto-MAML": "proto-maml"}
OMNIGLOT_NETWORK = Conv4Options(downsample="stride", initialisation="finn")
PAPER = {
    "omniglot": {
        "MAML, 5-way 1-shot": "98.7 ± 0.4",
        "MAML, 5-way 5-shot": "99.9 ± 0.1",
        "MAML, 20-way 1-shot": "95.8 ± 0.3",
        "MAML, 20-way 5-shot": "98.9 ± 0.2",
        "MAML without convolutions, 5-way 1-shot": "89.7 ± 1.1",
        "MAML without convolutions, 5-way 5-shot": "97.5 ± 0.6",
        "prototypical networks, 5-way 1-shot": "98.8",
        "prototypical networks, 5-way 5-shot": "99.7",
        "prototypical networks, 20-way 1-shot": "96.0",
        "prototypical networks, 20-way 5-shot": "98.9",
    },
    "mini-imagenet": {
        "MAML, 5-way 1-shot": "48.70 ± 1.84",
        "MAML, 5-way 5-shot": "63.11 ± 0.92",
        "first-order MAML, 5-way 1-shot": "48.07 ± 1.75",
        "first-order MAML, 5-way 5-shot": "63.15 ± 0.91",
        "prototypical networks, 5-way 1-shot": "49.42 ± 0.78",
        "prototypical networks, 5-way 5-shot": "68.20 ± 0.66",
    },
}


@dataclass(frozen=True)
class MamlClassification:
    """The accuracies of MAML's paper, by its authors' settings.

    60,000 iterations by Adam at 0.001, of 32 tasks (Omniglot 5-way, one step), 16 (20-way, five
    steps), or 4 and 2 (mini-ImageNet with 1 and 5 shots, five steps, ten in the test). The inner
    rates are the paper's times the ways, as its code sums over the classes what is a mean here.
    Scale and shift of batch norm are not adapted; the code has no scale. On mini-ImageNet the
    elements of the meta-gradient are clipped at the code's 10, in units of the mean. Prototypical
    networks, whose paper trains them on more ways, and Proto-MAML have all of this but the start of
    the head and its inner rate, 0.01; prototypical networks take no step.
    """

    dataset: Literal["omniglot", "mini-imagenet"] = "omniglot"
    """Where the tasks come from."""
    methods: tuple[str, ...] | None = None
    """Of MAML, "first-order MAML", "MAML without convolutions", "prototypical networks" and
    Proto-MAML; None takes the first three where MAML's paper has them."""
    settings: tuple[str, ...] | None = None
    """Settings of the table, such as "5-way 1-shot"; None takes all that the method's paper has.
    Where both are named, rows that it lacks are there, too."""
    seeds: int = 1
    """Runs of each row."""
    iterations: int = 60_000
    """Outer updates of a run."""
    val_every: int = 2_000
    """Iterations between validations."""
    val_tasks: int = 200
    """Tasks of a validation."""
    test_tasks: int = 600
    """Tasks of the test."""
    precision: Precision = "float32"
    """Precision of matrix products and convolutions."""
    compile: bool = False
    """Without convolutions: hand the recordings to torch.compile (needs a C++ compiler), twice as
    fast."""
    workers: int = 1
    """Runs at once, a single-threaded process each."""
    ray: bool = False
    """Send the runs to a Ray cluster instead."""
    out: Path | None = None
    """Folder of the runs, the table and the figure; a second call goes on where one stopped.
    runs/maml-classification-DATASET if not given."""
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    @property
    def folder(self) -> Path:
        """Folder of the runs, the table and the figures."""
        return self.out or Path(f"runs/maml-classification-{self.dataset}")

    def run(self, console: Console) -> None:
        """Train what is not trained yet; write the table and the figure."""
        check_at_least(1, seeds=self.seeds)
        rows = self.rows()
        if self.compile and all(method != NO_CONVOLUTIONS for method, _ in rows):
            raise InputError(
                f"compile=True is for {NO_CONVOLUTIONS!r}, which no row has; leave it out"
            )
        accuracy_table(
            {
                f"{method}, {setting}": [
                    self.config(method, setting, seed) for seed in range(self.seeds)
                ]
                for method, setting in product((*METHODS, *PROTOTYPES), SETTINGS[self.dataset])
            },
            [", ".join(row) for row in rows],
            PAPER[self.dataset],
            f"{self.dataset}, {self.iterations:,} iterations, {self.precision}",
            self.folder,
            console,
            workers=self.workers,
            ray=self.ray,
            device=self.device,
        )

    def rows(self) -> list[tuple[str, str]]:
        """Return the method and the setting of each row.

        Raises:
            InputError: a name is unknown, or the paper has none of the rows that are left to it.
        """
        known = SETTINGS[self.dataset]
        for what, asked, names in (
            ("method", self.methods, (*METHODS, *PROTOTYPES)),
            ("setting", self.settings, known),
        ):
            if asked is not None:
                check_names(what, asked, names)
        rows = list(product(self.methods or METHODS, self.settings or known))
        if self.methods is None or self.settings is None:
            rows = [row for row in rows if ", ".join(row) in PAPER[self.dataset]]
        if lacking := sorted(set(self.methods or ()) - {method for method, _ in rows}):
            raise InputError(
                f"methods={self.methods}: no paper has {lacking[0]!r} there; name the settings, too"
            )
        return rows

    def config(self, method: str, setting: str, seed: int) -> RunConfig:
        """Return the settings of a run."""
        of = SETTINGS[self.dataset][setting]
        is_mini = self.dataset == "mini-imagenet"
        is_plain = method == NO_CONVOLUTIONS
        base = preset(
            self.dataset,
            network="fully-connected" if is_plain else None,
            recipe=PROTOTYPES.get(method, "maml"),
        )
        takes_steps = base.algorithm.num_steps > 0
        has_prototypes = base.algorithm.start == "prototypes"
        model: Conv4Options | FullyConnectedOptions = FullyConnectedOptions()
        if not is_plain:
            model = Conv4Options(filters=32) if is_mini else OMNIGLOT_NETWORK
        turned: Rotations = "none" if is_mini else "episode"
        queries = 15 if is_mini else of.shots
        # The code clips at 10 the gradient of a loss that is summed over the queries and divided by
        # the shots, ways * queries / shots times the mean.
        clip_value = 10 * of.shots / (of.ways * queries) if is_mini else None
        return replace(
            base,
            data=base.data if is_mini else Omniglot(class_split="finn"),
            episodes=ClassificationOptions(
                ways=of.ways,
                shots=of.shots,
                queries=queries,
                eval_queries=of.shots,
                rotations=turned,
                eval_rotations=turned,
            ),
            model=model,
            algorithm=AlgorithmOptions(
                num_steps=of.num_steps if takes_steps else 0,
                eval_steps=of.eval_steps if takes_steps else 0,
                start=base.algorithm.start,
                inner_lr=base.algorithm.inner_lr if has_prototypes else of.ways * of.inner_lr,
                first_order_epochs=math.inf if method == "first-order MAML" else 0,
                not_adapted=("2.*", "5.*", "8.*", "11.*") if is_plain else ("*.norm.*",),
                clip_value=clip_value,
            ),
            iterations=self.iterations,
            tasks=of.tasks,
            val_every=self.val_every,
            val_tasks=self.val_tasks,
            test_tasks=self.test_tasks,
            keep_best=5,
            precision=self.precision,
            compile=self.compile and is_plain,
            seed=seed,
        )
