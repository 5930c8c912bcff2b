"""MAML++ that starts from a classifier of the training classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.core.norm import Use
from fewstep.core.precision import Precision
from fewstep.core.ranks import Ranks
from fewstep.data.mini_imagenet import MiniImageNet
from fewstep.data.omniglot import Omniglot
from fewstep.data.views import Views
from fewstep.experiments.accuracy_table import plot_validation
from fewstep.experiments.maml_plus_plus import PAPER, MamlPlusPlusAblation
from fewstep.experiments.seeds import percent
from fewstep.experiments.sweep import check_plan, complete
from fewstep.experiments.write_up import write_up
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.build import build_problem, resolve_device
from fewstep.training.config import RunConfig
from fewstep.training.display import say
from fewstep.training.episode_options import ClassificationOptions, SupervisedOptions
from fewstep.training.evaluate import Scoring
from fewstep.training.network_options import Conv4Options
from fewstep.training.presets import preset
from fewstep.training.run_folder import RunFolder


@dataclass(frozen=True)
class MamlPlusPlusFromClassifier:
    """Train a classifier of the training classes, then MAML++ from its features.

    Not the paper's recipe: MAML++ takes a twelfth of the tasks then, or fewer. On Omniglot every
    quarter turn of a character is a class, and then each of their mirror images too. On
    mini-ImageNet the classifier sees images of 42 pixels first, at a third of the cost, then those
    of 84, by Adam and then by SGD with momentum and decay, cropped and then shifted; the head gets
    the spatial mean of the last map, scaled to unit length. MAML++ maps the features by what the
    classifier's head knows of them first; on mini-ImageNet with one shot it normalises by the
    classifier's running statistics and goes on with them, as five support images have poor ones.

    The classifier is for one process; under torchrun, the same command shares MAML++'s tasks among
    processes once it is trained.
    """

    dataset: Literal["omniglot", "mini-imagenet"] = "mini-imagenet"
    """Where the tasks come from."""
    ways: int | None = None
    """Classes of a task; None takes 20 for Omniglot, 5 for mini-ImageNet."""
    shots: int = 1
    """Support images of each class."""
    classifier_iterations: int | None = None
    """Batches of the classifier; None takes 33,000 for Omniglot, 9 in 33 by Adam and 24 by SGD, and
    36,000 for mini-ImageNet: 7 in 36 small, 8 by Adam, 9 by SGD, and 12 by SGD of images that are
    shifted, not cropped."""
    iterations: int | None = None
    """Outer updates of MAML++; None takes 8,000 for Omniglot, 1,200 for mini-ImageNet."""
    tasks: int = 4
    """Tasks of an iteration."""
    filters: int = 64
    """Channels of every block."""
    val_tasks: int = 200
    """Tasks of a validation, of which there are eight or fewer."""
    test_tasks: int = 600
    """Tasks of the test."""
    seed: int = 0
    """Seed of all runs."""
    precision: Precision = "float32"
    """Precision of matrix products and convolutions."""
    out: Path | None = None
    """Folder of the classifiers, and in 5-way-1-shot (and so on) of MAML++'s run, the table and the
    figure; a second call goes on where one stopped, another kind of task with the same classifiers.
    runs/maml++-from-classifier-DATASET if not given."""
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def run(self, console: Console) -> None:
        """Train what is not trained yet; write the table and the figure."""
        device = resolve_device(self.device)
        ranks = Ranks.of_torchrun(device)
        if not ranks.is_first:
            console = Console(quiet=True)
        stages = self.stages()
        check_plan({self.path_of(name): config for name, config in stages.items()})
        build_problem(stages["maml++"], device)  # refuses now what would be refused after hours
        found: dict[str, list[dict[str, Any]]] = {}
        for name, config in stages.items():
            tests = tuple(self._tests(name).values())
            path = self.path_of(name)
            scores = complete(path, replace(config, device=device), tests, console, ranks)
            if scores is None:
                say(console, f"{path} is not done yet; the same command goes on")
                break
            found[name] = scores
            say(console, f"done: {path} ({len(found)} of {len(stages)})")
        ranks.close()
        if len(found) < len(stages) or not ranks.is_first:
            return
        few_shot = self.path_of("maml++")
        folder = few_shot.parent
        plot_validation({"MAML++": [RunFolder(few_shot)]}, folder / "curves.png")
        table, numbers = self._markdown(found), ("table.json", {"runs": found})
        write_up(folder, device, console, numbers, table=table, pictures=["curves.png"])
        name = quote(str(few_shot))
        say(console, f"next: fewstep predict {name} --support FOLDER --query FOLDER")

    def stages(self) -> dict[str, RunConfig]:
        """Return the settings of the runs, by the names of their folders, in their order."""
        if self._batches < (least := 4 if self._is_mini else 2):
            raise InputError(f"classifier_iterations={self._batches} must be at least {least}")
        classifiers = self._mini_imagenet() if self._is_mini else self._omniglot()
        *_, last = classifiers
        few_shot = self._few_shot(classifiers[last])
        stages = {**classifiers, "maml++": replace(few_shot, initial=self.folder / last)}
        return {name: config.placed() for name, config in stages.items()}

    @property
    def folder(self) -> Path:
        """Folder of the runs, the table and the figures."""
        return self.out or Path(f"runs/maml++-from-classifier-{self.dataset}")

    def path_of(self, name: str) -> Path:
        """Return the folder of a run; few-shot tasks of one kind have one of their own around."""
        tasks = f"{self._ways}-way-{self.shots}-shot"
        return self.folder / (f"{tasks}/{name}" if name == "maml++" else name)

    @property
    def _is_mini(self) -> bool:
        return self.dataset == "mini-imagenet"

    @property
    def _statistics(self) -> Use:
        return "running" if self._is_mini and self.shots == 1 else "batch"

    @property
    def _other(self) -> Use:
        return "batch" if self._statistics == "running" else "running"

    @property
    def _ways(self) -> int:
        return (5 if self._is_mini else 20) if self.ways is None else self.ways

    @property
    def _batches(self) -> int:
        given = self.classifier_iterations
        return (36_000 if self._is_mini else 33_000) if given is None else given

    def _tests(self, name: str) -> dict[str, Scoring]:
        """Return the tests of a run, by their rows' names; {} stands for how many models."""
        if name != "maml++":
            return {"images of the training classes held out": Scoring("best")}
        views: Views = "mirrored" if self._is_mini else "turned"
        return {
            "one model": Scoring("best"),
            "ensemble of {}": Scoring("ensemble"),
            "by support statistics": Scoring("best", statistics="support"),
            f"by {self._other} statistics": Scoring("best", statistics=self._other),
            f"one model, {views} views": Scoring("best", views=views),
            f"ensemble of {{}}, {views} views": Scoring("ensemble", views=views),
        }

    def _omniglot(self) -> dict[str, RunConfig]:
        model = Conv4Options(filters=self.filters, activation="leaky-relu")
        base = self._classifier(model)
        first = replace(
            base,
            data=Omniglot(class_split="maml++"),
            iterations=max(1, self._batches * 9 // 33),
        )
        sgd = replace(
            first,
            initial=self.folder / "classifier",
            episodes=SupervisedOptions(rotations="mirrored-classes", shifts=1),
            algorithm=_by_sgd(base.algorithm),
            iterations=self._batches - first.iterations,
        )
        return {"classifier": first, "classifier-sgd": sgd}

    def _mini_imagenet(self) -> dict[str, RunConfig]:
        model = Conv4Options(
            filters=self.filters, activation="leaky-relu", spatial_mean=True, unit_features=True
        )
        base = self._classifier(model)
        small = replace(
            base,
            data=MiniImageNet(size=42),
            episodes=SupervisedOptions(flips=True, crops=0.4, colours=0.2),
            algorithm=replace(base.algorithm, outer_lr=2e-3, final_outer_lr=5e-4),
            iterations=max(1, self._batches * 7 // 36),
            val_every=1_000,
        )
        large = replace(
            base,
            initial=self.folder / "classifier-42",
            episodes=SupervisedOptions(flips=True, crops=0.5, colours=0.2),
            algorithm=replace(base.algorithm, outer_lr=1.5e-3),
            iterations=max(1, self._batches * 8 // 36),
            val_every=1_000,
        )
        sgd = replace(
            large,
            initial=self.folder / "classifier-84",
            algorithm=_by_sgd(large.algorithm),
            iterations=max(1, self._batches * 9 // 36),
        )
        earlier = {"classifier-42": small, "classifier-84": large, "classifier-84-sgd": sgd}
        shifted = replace(
            sgd,
            initial=self.folder / "classifier-84-sgd",
            episodes=SupervisedOptions(flips=True, shifts=8, colours=0.4),
            iterations=self._batches - sum(config.iterations for config in earlier.values()),
        )
        return {**earlier, "classifier-84-shifts": shifted}

    def _classifier(self, model: Conv4Options) -> RunConfig:
        base = preset(self.dataset, recipe="supervised")
        return replace(base, model=model, precision=self.precision, seed=self.seed)

    def _few_shot(self, classifier: RunConfig) -> RunConfig:
        iterations = 1_200 if self._is_mini else 8_000
        base = MamlPlusPlusAblation(
            dataset=self.dataset,
            ways=self._ways,
            shots=self.shots,
            iterations=iterations if self.iterations is None else self.iterations,
            tasks=self.tasks,
            val_tasks=self.val_tasks,
            test_tasks=self.test_tasks,
            precision=self.precision,
        ).config("MAML++", self.seed)
        assert isinstance(classifier.model, Conv4Options)
        assert isinstance(base.episodes, ClassificationOptions)
        if not self._is_mini:
            episodes = replace(base.episodes, queries=3, rotations="mirrored-classes")
            algorithm = replace(base.algorithm, first_order_epochs=0, clip_value=0.05)
        elif self._statistics == "running":
            episodes = replace(base.episodes, queries=8, flips=True, shifts=8, colours=0.4)
            algorithm = replace(base.algorithm, inner_lr=0.02, outer_lr=1e-4, clip_value=0.2)
        else:
            episodes = replace(base.episodes, queries=8, flips=True, crops=0.6, colours=0.2)
            algorithm = replace(base.algorithm, inner_lr=0.05, outer_lr=4e-4, clip_value=0.2)
        return replace(
            base,
            model=replace(classifier.model, initialisation="zero-head", projection=True),
            episodes=episodes,
            algorithm=replace(algorithm, multi_step_epochs=0, statistics=self._statistics),
            val_every=-(-base.iterations // 8),
        )

    def _markdown(self, found: Mapping[str, list[dict[str, Any]]]) -> str:
        lines = [
            f"{self.dataset} {self._ways}-way {self.shots}-shot, Conv4-{self.filters}, seed "
            f"{self.seed}, {self.precision}, {self.test_tasks} test tasks.",
            f"Accuracy in % ± 95% interval; MAML++ by {self._statistics} statistics if not said.",
            "",
            "| | accuracy | training |",
            "|---|---|---|",
        ]
        for name, scores in found.items():
            seconds = scores[0]["training_seconds"]
            minutes = "-" if seconds is None else f"{seconds / 60:.0f} min"
            rows = self._tests(name)
            for row, score in zip(rows, scores, strict=True):
                row = row.format(len(score["iterations"]))
                lines.append(f"| {name}, {row} | {percent(score)} | {minutes} |")
        paper = PAPER.get((self.dataset, self._ways, self.shots), {}).get("MAML++", "-")
        lines.append(f"| paper, from drawn parameters | {paper} | |")
        return "\n".join(lines) + "\n"


def _by_sgd(algorithm: AlgorithmOptions) -> AlgorithmOptions:
    return replace(algorithm, outer="sgd", outer_lr=0.1, momentum=0.9, weight_decay=5e-4)
