"""MAML++'s ablation: MAML, with each part alone, with all of them, and from prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fewstep.core.errors import InputError, check_at_least, check_names
from fewstep.core.precision import Precision
from fewstep.data.episodes import Rotations
from fewstep.data.omniglot import Omniglot
from fewstep.experiments.accuracy_table import accuracy_table
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.config import Recipe, RunConfig
from fewstep.training.episode_options import ClassificationOptions
from fewstep.training.network_options import Conv4Options
from fewstep.training.presets import HEADS, preset

MSL: dict[str, Any] = {"multi_step_epochs": 10}  # of Omniglot
DA: dict[str, Any] = {"first_order_epochs": 50}
CA: dict[str, Any] = {"outer_schedule": "cosine", "final_outer_lr": 1e-5}
NORM: dict[str, Any] = {"per_step_affine": True, "per_step_statistics": True}
LSLR: dict[str, Any] = {"learned_rates": "tensor"}
VARIANTS: dict[str, dict[str, Any]] = {
    "MAML": {},
    "MAML+MSL": MSL,
    "MAML+DA": DA,
    "MAML+CA": CA,
    "MAML+BNWB+BNRS": NORM,
    "MAML+LSLR": LSLR,
    "MAML++": {**MSL, **DA, **CA, **NORM, **LSLR},
}
PROTOTYPES: dict[str, Any] = {"start": "prototypes"}
BESIDE: dict[str, dict[str, Any]] = {
    "first-order MAML": {"first_order_epochs": math.inf},
    "ANIL": {"adapted": HEADS["conv4"], "not_adapted": ()},
    "Meta-SGD": {"learned_rates": "element", "num_steps": 1, "eval_steps": 1},
    "prototypical networks": {**PROTOTYPES, **CA, "num_steps": 0, "eval_steps": 0},
    "Proto-MAML": PROTOTYPES,
    "Proto-MAML++": {**PROTOTYPES, **VARIANTS["MAML++"]},
}
RECIPES: dict[str, Recipe] = {
    "first-order MAML": "fomaml",
    "ANIL": "anil",
    "Meta-SGD": "meta-sgd",
    "MAML++": "maml++-reference-code",
    "prototypical networks": "prototypes",
    "Proto-MAML": "proto-maml",
    "Proto-MAML++": "maml++-reference-code",
}
# The rows beside MAML++'s as other papers have them, by other settings: first-order MAML as
# Reptile's (Omniglot) and MAML's do, the others as their own.
PAPER = {
    ("omniglot", 20, 1): {
        "MAML": "91.27 ± 1.07",
        "MAML+MSL": "91.53 ± 0.69",
        "MAML+DA": "92.3 ± 0.55",
        "MAML+CA": "93.03 ± 0.44",
        "MAML+BNWB+BNRS": "95.35 ± 0.23",
        "MAML+LSLR": "95.77 ± 0.38",
        "MAML++": "97.65 ± 0.05",
        "first-order MAML": "89.4 ± 0.5",
        "ANIL": "96.2 ± 0.5",
        "Meta-SGD": "95.93 ± 0.38",
        "prototypical networks": "96.0",
    },
    ("omniglot", 5, 1): {
        "MAML++": "99.47",
        "first-order MAML": "98.3 ± 0.5",
        "Meta-SGD": "99.53 ± 0.26",
        "prototypical networks": "98.8",
    },
    ("omniglot", 20, 5): {"MAML++": "99.33 ± 0.03"},
    ("omniglot", 5, 5): {"MAML++": "99.93"},
    ("mini-imagenet", 5, 1): {
        "MAML": "48.25 ± 0.62",
        "MAML++": "52.15 ± 0.26",
        "first-order MAML": "48.07 ± 1.75",
        "ANIL": "46.7 ± 0.4",
        "Meta-SGD": "50.47 ± 1.87",
        "prototypical networks": "49.42 ± 0.78",
    },
    ("mini-imagenet", 5, 5): {
        "MAML": "64.39 ± 0.31",
        "MAML++": "68.32 ± 0.44",
        "first-order MAML": "63.15 ± 0.91",
        "ANIL": "61.5 ± 0.5",
        "Meta-SGD": "64.03 ± 0.94",
        "prototypical networks": "68.20 ± 0.66",
    },
}


@dataclass(frozen=True)
class _Authors:
    """What the authors set by the data set; of Omniglot if nothing is said."""

    tasks: int = 8
    filters: int = 64
    queries: int = 1
    rotations: Rotations = "episode"
    inner_lr: float = 0.1
    clip_value: float | None = None
    multi_step_epochs: int = 10


AUTHORS = {
    "mini-imagenet": _Authors(
        tasks=2, filters=48, queries=15, rotations="none", inner_lr=0.01, clip_value=10.0,
        multi_step_epochs=15,
    )
}  # fmt: skip


@dataclass(frozen=True)
class MamlPlusPlusAblation:
    """The ablation table and the validation curves of MAML++.

    The default is the authors' length: 100 epochs of 500 iterations of 8 tasks, or 2 for
    mini-ImageNet. Fewer iterations shorten the epochs, so that every schedule keeps its shape.
    The inner rate starts at 0.1, or 0.01 for mini-ImageNet, as in the authors' settings, which
    their code ignores. MAML++ has all six parts; those settings leave out DA, and on
    mini-ImageNet CA. Beside the paper's rows there are "first-order MAML", "ANIL" and "Meta-SGD"
    (one step), and "prototypical networks" (with CA), "Proto-MAML" and "Proto-MAML++", whose tasks
    start with a head of class means.
    """

    dataset: Literal["omniglot", "mini-imagenet", "glyphs"] = "omniglot"
    """Where the tasks come from."""
    ways: int = 20
    """Classes of a task."""
    shots: int = 1
    """Support images of each class."""
    train_ways: int | None = None
    """Classes of a task in training, of rows that start from prototypes; None takes the ways."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Rows of the table: the paper's, or those beside them."""
    seeds: int = 3
    """Runs of each row."""
    iterations: int = 50_000
    """Outer updates of a run."""
    tasks: int | None = None
    """Tasks of an iteration; None takes the authors' 8, or 2 for mini-ImageNet."""
    filters: int | None = None
    """Channels of every block; None takes the authors' 64, or 48 for mini-ImageNet."""
    val_every: int = 500
    """Iterations between validations."""
    val_tasks: int = 600
    """Tasks of a validation."""
    test_tasks: int = 600
    """Tasks of the test."""
    precision: Precision = "float32"
    """Precision of matrix products and convolutions."""
    workers: int = 1
    """Runs at once, a single-threaded process each."""
    ray: bool = False
    """Send the runs to a Ray cluster instead."""
    out: Path | None = None
    """Folder of the runs, the table and the figure; a second call goes on where one stopped.
    runs/maml++-ablation-omniglot-20-way-1-shot, and so on, if not given."""
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    @property
    def folder(self) -> Path:
        """Folder of the runs, the table and the figures."""
        tasks = f"{self.dataset}-{self.ways}-way-{self.shots}-shot"
        return self.out or Path(f"runs/maml++-ablation-{tasks}")

    def run(self, console: Console) -> None:
        """Train what is not trained yet; write the table and the figure."""
        check_names("variant", self.variants, VARIANTS | BESIDE)
        check_at_least(1, seeds=self.seeds)
        possible = [
            name
            for name, parts in (VARIANTS | BESIDE).items()
            if self.train_ways is None or "start" in parts
        ]
        if others := [v for v in self.variants if v not in possible]:
            raise InputError(
                f"train_ways={self.train_ways}: {others[0]} learns its last layer for {self.ways} "
                "classes; name variants that start from prototypes, or leave it out"
            )
        accuracy_table(
            {v: [self.config(v, seed) for seed in range(self.seeds)] for v in possible},
            self.variants,
            PAPER.get((self.dataset, self.ways, self.shots), {}),
            f"{self.dataset} {self.ways}-way {self.shots}-shot, Conv4-{self._filters}, "
            f"{self.iterations:,} iterations of {self._tasks} tasks"
            + ("" if self.train_ways is None else f" of {self.train_ways} classes")
            + f", {self.precision}",
            self.folder,
            console,
            workers=self.workers,
            ray=self.ray,
            device=self.device,
        )

    def config(self, variant: str, seed: int) -> RunConfig:
        """Return the settings of a run."""
        base, authors = preset(self.dataset), self._authors
        usual: dict[str, Any] = {
            "inner_lr": authors.inner_lr,
            "not_adapted": ("*.norm.*",),
            "clip_value": authors.clip_value,
        }
        parts = usual | (VARIANTS | BESIDE)[variant]
        if "multi_step_epochs" in parts:
            parts["multi_step_epochs"] = authors.multi_step_epochs
        return replace(
            base,
            recipe=RECIPES.get(variant, "maml"),
            data=Omniglot(class_split="maml++") if self.dataset == "omniglot" else base.data,
            episodes=ClassificationOptions(
                ways=self.ways,
                train_ways=self.train_ways,
                shots=self.shots,
                queries=authors.queries,
                eval_queries=authors.queries,
                rotations=authors.rotations,
            ),
            model=Conv4Options(filters=self._filters, activation="leaky-relu"),
            algorithm=AlgorithmOptions(**parts),
            iterations=self.iterations,
            tasks=self._tasks,
            val_every=self.val_every,
            val_tasks=self.val_tasks,
            test_tasks=self.test_tasks,
            keep_best=5,
            precision=self.precision,
            seed=seed,
        )

    @property
    def _authors(self) -> _Authors:
        return AUTHORS.get(self.dataset, _Authors())

    @property
    def _tasks(self) -> int:
        return self._authors.tasks if self.tasks is None else self.tasks

    @property
    def _filters(self) -> int:
        return self._authors.filters if self.filters is None else self.filters
