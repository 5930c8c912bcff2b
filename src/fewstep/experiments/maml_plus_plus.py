"""MAML++'s ablation: MAML, MAML with each part alone, and all parts together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fewstep.core.errors import InputError, check_name, check_some
from fewstep.core.precision import Precision
from fewstep.core.ranks import Ranks
from fewstep.data.omniglot import Omniglot
from fewstep.experiments.seeds import over_seeds
from fewstep.experiments.sweep import Test, complete_all
from fewstep.experiments.write_up import write_up
from fewstep.report.figure import draw_band, new_figure, save_figure
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.build import resolve_device
from fewstep.training.config import ClassificationOptions, RunConfig
from fewstep.training.display import say
from fewstep.training.network_options import Conv4Options
from fewstep.training.presets import preset
from fewstep.training.run_folder import RunFolder

MSL: dict[str, Any] = {"multi_step_epochs": 10}
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
PAPER = {
    ("omniglot", 20, 1): {
        "MAML": "91.27 ± 1.07",
        "MAML+MSL": "91.53 ± 0.69",
        "MAML+DA": "92.3 ± 0.55",
        "MAML+CA": "93.03 ± 0.44",
        "MAML+BNWB+BNRS": "95.35 ± 0.23",
        "MAML+LSLR": "95.77 ± 0.38",
        "MAML++": "97.65 ± 0.05",
    },
    ("omniglot", 5, 1): {"MAML++": "99.47"},
    ("mini-imagenet", 5, 1): {"MAML": "48.25 ± 0.62", "MAML++": "52.15 ± 0.26"},
    ("mini-imagenet", 5, 5): {"MAML": "64.39 ± 0.31", "MAML++": "68.32 ± 0.44"},
}
TESTS = (
    Test("best"),
    Test("ensemble"),
    Test("best", statistics="support"),
    Test("best", statistics="running"),
)


@dataclass(frozen=True)
class MamlPlusPlusAblation:
    """The ablation table and the validation curves of MAML++.

    The default is the authors' length: 100 epochs of 500 iterations of 8 tasks, or 2 for
    mini-ImageNet. Fewer iterations shorten the epochs, so that every schedule keeps its shape.
    The inner rate starts at 0.1, or 0.01 for mini-ImageNet, as in the authors' settings, which
    their code ignores. MAML++ has all six parts; those settings leave out DA, and on
    mini-ImageNet CA.
    """

    dataset: Literal["omniglot", "mini-imagenet", "glyphs"] = "omniglot"
    """Where the tasks come from."""
    ways: int = 20
    """Classes of a task."""
    shots: int = 1
    """Support images of each class."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Rows of the table."""
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
    """What products round their factors to."""
    workers: int = 1
    """Runs at once, a single-threaded process each."""
    ray: bool = False
    """Send the runs to a Ray cluster instead."""
    out: Path = Path("runs/maml++-ablation")
    """Folder of the runs, the table and the figure; a second call goes on where one stopped."""
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def run(self, console: Console) -> None:
        """Train what is not trained yet; write the table and the figure."""
        check_some("variants", self.variants)
        for variant in self.variants:
            check_name("variant", variant, VARIANTS)
        if self.seeds < 1:
            raise InputError(f"seeds={self.seeds} must be at least 1")
        device = resolve_device(self.device)
        ranks = Ranks.of_torchrun(device)
        if not ranks.is_first:
            console = Console(quiet=True)
        plan = {
            self.out / f"{variant.lower()}-seed{seed}": replace(
                self.config(variant, seed), device=device
            )
            for seed in range(self.seeds)
            for variant in self.variants
        }
        found = complete_all(plan, TESTS, console, workers=self.workers, ray=self.ray, ranks=ranks)
        ranks.part()
        if len(found) < len(plan):
            say(console, f"{len(found)} of {len(plan)} runs are done; the same command goes on")
            return
        if not ranks.is_first:
            return
        rows = {v: self._row(v, found) for v in self.variants}
        plot_validation({v: self._folders(v) for v in self.variants}, self.out / "curves.png")
        numbers = "table.json", {"schedule": self._schedule(), "rows": rows}
        table = self._markdown(rows)
        write_up(self.out, device, console, numbers, table=table, pictures=["curves.png"])

    def _folders(self, variant: str) -> list[RunFolder]:
        names = [f"{variant.lower()}-seed{seed}" for seed in range(self.seeds)]
        return [RunFolder(self.out / name) for name in names]

    def config(self, variant: str, seed: int) -> RunConfig:
        """Return the settings of a run."""
        base = preset(self.dataset)
        is_mini = self.dataset == "mini-imagenet"
        parts = VARIANTS[variant]
        if is_mini and "multi_step_epochs" in parts:
            parts = parts | {"multi_step_epochs": 15}
        return replace(
            base,
            recipe="maml++-reference-code" if variant == "MAML++" else "maml",
            data=Omniglot(class_split="maml++") if self.dataset == "omniglot" else base.data,
            episodes=ClassificationOptions(
                ways=self.ways,
                shots=self.shots,
                queries=15 if is_mini else 1,
                eval_queries=15 if is_mini else 1,
                rotations="none" if is_mini else "episode",
            ),
            model=Conv4Options(filters=self._filters, activation="leaky-relu"),
            algorithm=AlgorithmOptions(
                inner_lr=0.01 if is_mini else 0.1,
                not_adapted=("*.norm.*",),
                clip_value=10.0 if is_mini else None,
                **parts,
            ),
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
    def _tasks(self) -> int:
        return (2 if self.dataset == "mini-imagenet" else 8) if self.tasks is None else self.tasks

    @property
    def _filters(self) -> int:
        return (
            (48 if self.dataset == "mini-imagenet" else 64)
            if self.filters is None
            else self.filters
        )

    def _row(self, variant: str, found: Mapping[Path, list[dict[str, Any]]]) -> dict[str, Any]:
        runs = [found[run.path] for run in self._folders(variant)]
        best, ensemble, support, running = zip(*runs, strict=True)
        seconds = [tests[0]["training_seconds"] for tests in runs]
        return {
            "single": over_seeds(t["per_task"] for t in best),
            "ensemble": over_seeds(t["per_task"] for t in ensemble)
            | {"models": [len(test["iterations"]) for test in ensemble]},
            "statistics": {
                "batch": over_seeds(t["per_task"] for t in best),
                "support": over_seeds(t["per_task"] for t in support),
                "running": over_seeds(t["per_task"] for t in running),
            },
            "seconds_per_run": statistics.mean(seconds),
            "paper": PAPER.get((self.dataset, self.ways, self.shots), {}).get(variant, ""),
        }

    def _schedule(self) -> str:
        return (
            f"{self.dataset} {self.ways}-way {self.shots}-shot, Conv4-{self._filters}, "
            f"{self.iterations:,} iterations of {self._tasks} tasks, {self.precision}, "
            f"{self.seeds} seed{'s' * (self.seeds > 1)}, {self.test_tasks} test tasks"
        )

    def _markdown(self, rows: Mapping[str, dict[str, Any]]) -> str:
        counts = {count for row in rows.values() for count in row["ensemble"]["models"]}
        models = " or ".join(map(str, sorted(counts)))
        spread = " (standard deviation over the seeds)" * (self.seeds > 1)
        lines = [
            f"{self._schedule()}.",
            f"Accuracy in % ± 95% interval over the test tasks, the same for all seeds{spread}.",
            "Transductive batch statistics but in the last two columns.",
            "",
            f"| method | accuracy | ensemble of {models} | paper | s per run | by support "
            "| by running |",
            "|---|---|---|---|---|---|---|",
        ]
        for variant, row in rows.items():
            by = row["statistics"]
            cells = [
                variant, cell(row["single"]), cell(row["ensemble"]), row["paper"] or "-",
                f"{row['seconds_per_run']:.0f}", cell(by["support"]), cell(by["running"]),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def cell(value: Mapping[str, Any]) -> str:
    """Return an accuracy in % with its interval and, of several seeds, their deviation."""
    text = f"{100 * value['mean']:.2f} ± {100 * value['ci95']:.2f}"
    if "std_over_seeds" in value:
        text += f" ({100 * value['std_over_seeds']:.2f})"
    return text


def plot_validation(runs: Mapping[str, list[RunFolder]], path: Path) -> None:
    """Draw the mean validation accuracy over seeds, with the range of the seeds.

    Args:
        runs: Runs of each curve, by its name.
        path: PNG file to write.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for number, (name, folders) in enumerate(runs.items()):
        series = [
            {m["iteration"]: 100 * m["val_accuracy"] for m in run.metrics() if "val_accuracy" in m}
            for run in folders
        ]
        draw_band(axes, series, name, f"C{number}")
    axes.set(xlabel="iteration", ylabel="validation accuracy (%)")
    if any(len(folders) > 1 for folders in runs.values()):
        axes.set_title("mean over seeds, band from the lowest to the highest")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
