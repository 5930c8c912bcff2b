"""A table of accuracies, a row for each method, and the validation curves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from fewstep.core.ranks import Ranks
from fewstep.experiments.seeds import (
    earlier_rows,
    mean_seconds,
    over_seeds,
    percent,
    rounded,
    seed_folder,
    spread,
)
from fewstep.experiments.sweep import complete_all, finished
from fewstep.experiments.write_up import write_up
from fewstep.report.figure import draw_band, legend_below, new_figure, save_figure
from fewstep.training.build import resolve_device
from fewstep.training.config import RunConfig
from fewstep.training.display import say
from fewstep.training.evaluate import Scoring
from fewstep.training.run_folder import RunFolder

TESTS = {
    "single": Scoring("best"),
    "ensemble": Scoring("ensemble"),
    "support": Scoring("best", statistics="support"),
    "running": Scoring("best", statistics="running"),
}


def accuracy_table(
    rows: Mapping[str, Sequence[RunConfig]],
    asked: Collection[str],
    paper: Mapping[str, str],
    title: str,
    out: Path,
    console: Console,
    *,
    workers: int,
    ray: bool,
    device: str,
) -> None:
    """Train and test what is not yet; write table.md, table.json and curves.png.

    Rows that an earlier call has finished in the folder by the same settings are there, too.

    Args:
        rows: Settings of a run for each seed, by the name of the row: all that there may be.
        asked: Names of those to train.
        paper: The paper's accuracies, by the name of the row.
        title: What the rows have in common.
        out: Folder of the runs, the table and the figure.
        console: Where to print.
        workers: Runs at once.
        ray: Send the runs to a Ray cluster.
        device: Where they are computed.

    Raises:
        InputError: the device cannot be used, or a folder holds a run with other settings.
    """
    device = resolve_device(device)
    ranks = Ranks.of_torchrun(device)
    if not ranks.is_first:
        console = Console(quiet=True)
    of_seeds = next(iter(rows.values()))
    runs = {
        name: {seed_folder(out, name, config.seed): replace(config, device=device) for config in of}
        for name, of in rows.items()
    }
    plan = {  # all rows of a seed before the next seed
        path: config
        for seed in zip(*(runs[name].items() for name in asked), strict=True)
        for path, config in seed
    }
    found = complete_all(
        plan, tuple(TESTS.values()), console, workers=workers, ray=ray, ranks=ranks
    )
    ranks.close()
    if len(found) < len(plan) or not ranks.is_first:
        return
    title += f", {len(of_seeds)} seed{'s' * (len(of_seeds) > 1)}"
    title += f", {of_seeds[0].test_tasks} test tasks"
    told = earlier_rows(
        {name: runs[name] for name in rows if name not in asked},
        lambda path, config: finished(path, config, tuple(TESTS.values())),
        console,
    )
    told |= {name: [found[path] for path in runs[name]] for name in asked}
    numbers = {
        name: _row(told[name]) | {"paper": paper.get(name, "")} for name in rows if name in told
    }
    folders = {name: list(runs[name]) for name in numbers}
    _write(title, numbers, folders, out, device, console)


def best_of(rows: Mapping[str, dict[str, Any]]) -> str:
    """Return the name of the row with the highest accuracy."""
    return max(rows, key=lambda name: float(rows[name]["single"]["mean"]))


def _write(
    title: str,
    numbers: Mapping[str, dict[str, Any]],
    folders: Mapping[str, list[Path]],
    out: Path,
    device: str,
    console: Console,
) -> None:
    runs = {name: [RunFolder(path) for path in paths] for name, paths in folders.items()}
    plot_validation(runs, out / "curves.png")
    written = "table.json", {"schedule": title, "rows": numbers}
    table = _markdown(title, numbers)
    write_up(out, device, console, written, table=table, pictures=["curves.png"])
    run = quote(str(folders[best_of(numbers)][0]))
    say(console, f"next: fewstep predict {run} --support FOLDER --query FOLDER   # yours")


def _row(runs: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what the runs of a row gave in the tests."""
    tests = dict(zip(TESTS, zip(*runs, strict=True), strict=True))
    found = {name: over_seeds(t["per_task"] for t in of_seeds) for name, of_seeds in tests.items()}
    models = [len(test["iterations"]) for test in tests["ensemble"]]
    return {
        "single": found["single"],
        "ensemble": found["ensemble"] | {"models": models},
        "statistics": {use: found[use] for use in ("support", "running")},
        "seconds_per_run": mean_seconds(runs),
    }


def _markdown(title: str, rows: Mapping[str, dict[str, Any]]) -> str:
    counts = {count for row in rows.values() for count in row["ensemble"]["models"]}
    models = " or ".join(map(str, sorted(counts)))
    seeds = max(len(row["single"]["seeds"]) for row in rows.values())
    lines = [
        f"{title}.",
        f"Accuracy in % ± 95% interval over the test tasks, the same for all seeds{spread(seeds)}.",
        "Transductive batch statistics but in the last two columns.",
        "",
        f"| method | accuracy | ensemble of {models} | paper | s per run | by support "
        "| by running |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        by = row["statistics"]
        cells = [
            name, percent(row["single"]), percent(row["ensemble"]), row["paper"] or "-",
            rounded(row["seconds_per_run"]), percent(by["support"]), percent(by["running"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_validation(runs: Mapping[str, Sequence[RunFolder]], path: Path) -> None:
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
    legend_below(figure, axes, columns=max(1, 100 // (8 + max(map(len, runs)))))  # by characters
    save_figure(figure, path)
