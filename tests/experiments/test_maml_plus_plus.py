"""The ablation, on a few tiny images."""

import json
import statistics
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.experiments import accuracy_table
from fewstep.experiments.accuracy_table import best_of
from fewstep.experiments.from_classifier import MamlPlusPlusFromClassifier
from fewstep.experiments.maml import MamlClassification
from fewstep.experiments.maml_plus_plus import PAPER, MamlPlusPlusAblation
from fewstep.experiments.navigation import MamlNavigation
from fewstep.experiments.running import MamlAnt, MamlHalfCheetah
from fewstep.training.metrics_file import json_line
from fewstep.training.run_folder import RunFolder
from fewstep.training.trainer import Trainer

VARIANTS = ("MAML", "MAML++")


@pytest.fixture
def ablation(tmp_path, monkeypatch, images):
    usual = MamlPlusPlusAblation.config

    def config(self, variant, seed):
        return replace(usual(self, variant, seed), dataset="folder", data=images)

    monkeypatch.setattr(MamlPlusPlusAblation, "config", config)
    return MamlPlusPlusAblation(
        dataset="glyphs", ways=2, variants=VARIANTS, seeds=2, iterations=4, tasks=2, filters=4,
        val_every=2, val_tasks=3, test_tasks=3, out=tmp_path / "out",
    )  # fmt: skip


@pytest.mark.pictures
def test_the_table_and_the_figure(ablation, monkeypatch, capsys):
    ablation.run(Console(soft_wrap=True))
    printed = capsys.readouterr().out
    table = json.loads((ablation.out / "table.json").read_text())
    assert list(table["rows"]) == list(VARIANTS)
    row = table["rows"]["MAML++"]
    runs = [ablation.out / f"maml++-seed{seed}" for seed in range(2)]
    tests = [json.loads((r / "evaluation-test-best-5-steps.json").read_text()) for r in runs]
    assert row["single"]["seeds"] == pytest.approx([test["mean"] for test in tests])
    assert row["single"]["mean"] == pytest.approx(sum(test["mean"] for test in tests) / 2)
    of_tasks = [statistics.mean(two) for two in zip(*(t["per_task"] for t in tests), strict=True)]
    assert row["single"]["ci95"] == pytest.approx(
        4.302652729696142 * statistics.stdev(of_tasks) / 3**0.5
    )
    wordings = {
        "support": "evaluation-test-best-5-steps-statistics-support.json",
        "running": "evaluation-test-best-5-steps-statistics-running.json",
    }
    for use, file in wordings.items():
        means = [json.loads((run / file).read_text())["mean"] for run in runs]
        assert row["statistics"][use]["seeds"] == pytest.approx(means)
    best = best_of(table["rows"])
    assert f"next: fewstep predict {ablation.out / best.lower()}-seed0 --support" in printed
    low, high = row["single"]["seeds"]
    assert row["single"]["std_over_seeds"] == pytest.approx(abs(high - low) / 2**0.5)
    lines = (ablation.out / "table.md").read_text().splitlines()
    assert any(line.startswith("| MAML++ |") for line in lines)
    assert "| method | accuracy | ensemble of 2 | paper |" in "\n".join(lines)
    with Image.open(ablation.out / "curves.png") as picture:
        assert picture.size > (400, 200)

    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained again"))
    ablation.run(Console(quiet=True))
    again = json.loads((ablation.out / "table.json").read_text())
    assert again["rows"] == table["rows"]
    with pytest.raises(InputError, match=r"holds a run with iterations=4, but iterations=5"):
        replace(ablation, iterations=5).run(Console(quiet=True))

    for config in ablation.out.glob("*/config.toml"):  # as of a version without this setting
        config.write_text(config.read_text().replace('precision = "float32"\n', ""))
    ablation.run(Console(quiet=True))
    with pytest.raises(InputError, match="precision='float32', but precision='bfloat16'"):
        replace(ablation, precision="bfloat16").run(Console(quiet=True))


@pytest.mark.parametrize(
    ("ways", "shots", "accuracy"),
    [(20, 1, "97.65 ± 0.05"), (20, 5, "99.33 ± 0.03"), (5, 1, "99.47"), (5, 5, "99.93")],
)
def test_the_paper_s_settings_of_omniglot_have_its_number(ways, shots, accuracy):
    assert PAPER["omniglot", ways, shots]["MAML++"] == accuracy


def test_validation_curves_are_in_percent(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(accuracy_table, "draw_band", lambda axes, series, *_: drawn.append(series))
    lines = [{"iteration": 1, "loss": 2.0}, {"iteration": 2, "val_accuracy": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(map(json_line, lines)))
    accuracy_table.plot_validation({"MAML": [RunFolder(tmp_path)]}, tmp_path / "curves.png")
    assert drawn == [[{2: 25.0}]]


def test_the_best_row_is_the_one_with_the_highest_accuracy():
    means = {"a": 0.1, "b": 0.3, "c": 0.2}
    assert best_of({name: {"single": {"mean": mean}} for name, mean in means.items()}) == "b"


def test_rows_from_prototypes_may_be_trained_on_more_ways(ablation):
    replace(ablation, variants=("Proto-MAML",), seeds=1, train_ways=3).run(Console(quiet=True))
    assert "glyphs 2-way" in (table := (ablation.out / "table.md").read_text())
    assert "4 iterations of 2 tasks of 3 classes" in table
    trained = tomllib.loads((ablation.out / "proto-maml-seed0" / "config.toml").read_text())
    assert trained["episodes"]["train_ways"] == 3


@pytest.mark.pictures
def test_rows_of_an_earlier_call_stay_in_the_table_in_order(ablation, monkeypatch, capsys):
    short = replace(ablation, seeds=1, variants=("MAML++",))
    drawn = []
    monkeypatch.setattr(accuracy_table, "draw_band", lambda *a: drawn.append(a[2]))
    short.run(Console(quiet=True))
    first = json.loads((ablation.out / "table.json").read_text())["rows"]["MAML++"]
    replace(short, variants=("MAML",)).run(Console(quiet=True))
    rows = json.loads((ablation.out / "table.json").read_text())["rows"]
    assert list(rows) == ["MAML", "MAML++"]
    assert rows["MAML++"] == first
    assert "| MAML++ |" in (ablation.out / "table.md").read_text()
    assert drawn == ["MAML++", "MAML", "MAML++"]
    replace(short, variants=("ANIL",), test_tasks=4).run(Console(soft_wrap=True))
    assert list(json.loads((ablation.out / "table.json").read_text())["rows"]) == ["ANIL"]
    left = "left out of the table: MAML++, not finished or of other settings"
    assert left in capsys.readouterr().out


def test_one_seed_has_no_deviation(ablation):
    replace(ablation, variants=("MAML",), seeds=1).run(Console(quiet=True))
    assert "std_over_seeds" not in (ablation.out / "table.json").read_text()
    table = (ablation.out / "table.md").read_text()
    assert "1 seed," in table
    assert "(" not in table.split("| MAML |")[1]


def test_an_interrupted_ablation_goes_on(ablation, monkeypatch, capsys):
    ablation = replace(ablation, variants=("MAML",), seeds=3)
    train, calls = Trainer.train, []

    def stops_in_the_second_run(self):
        calls.append(self.run.path.name)
        state, is_done = train(self)
        return state, is_done and len(calls) != 2

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stops_in_the_second_run)
        ablation.run(Console())
    assert calls == ["maml-seed0", "maml-seed1"]
    assert "1 of 3 runs are done; the same command goes on" in capsys.readouterr().out
    assert not (ablation.out / "table.json").exists()
    ablation.run(Console(quiet=True))
    assert (ablation.out / "table.json").exists()


def test_a_run_of_other_settings_is_refused_before_another_is_trained(ablation, monkeypatch):
    replace(ablation, variants=("MAML++",), seeds=1).run(Console(quiet=True))
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained"))
    with pytest.raises(InputError, match="but val_tasks=4 is asked for"):
        replace(ablation, val_tasks=4).run(Console(quiet=True))


def test_what_never_began_is_no_run_of_other_settings(ablation, monkeypatch):
    """A command that was refused, as for its data, must not stand in the way of a better one."""
    one = replace(ablation, variants=("MAML",), seeds=1)
    with pytest.raises(InputError, match="ways=2000 asks for more classes"):
        replace(one, ways=2000).run(Console(quiet=True))
    assert (one.out / "maml-seed0" / "config.toml").exists()
    one.run(Console(quiet=True))
    settings = one.out / "maml-seed0" / "config.toml"
    settings.write_text(begun := settings.read_text() + "# mine\n")
    one.run(Console(quiet=True))
    assert settings.read_text() == begun  # a run that has begun keeps its own
    with pytest.raises(InputError, match="holds a run with ways=2"):
        replace(one, ways=3).run(Console(quiet=True))


def test_a_run_trained_on_is_tested_again(ablation):
    short = replace(ablation, variants=("MAML++",), seeds=1)
    short.run(Console(quiet=True))
    path = ablation.out / "maml++-seed0"
    settings = (path / "config.toml").read_text()  # what `fewstep resume --iterations 8` changes
    (path / "config.toml").write_text(settings.replace("iterations = 4\n", "iterations = 8\n"))
    replace(short, iterations=8).run(Console(quiet=True))
    kept = [best["iteration"] for best in json.loads((path / "state.json").read_text())["best"]]
    assert sorted(kept) == [2, 4, 6, 8]
    for file in path.glob("evaluation-*.json"):
        tested = json.loads(file.read_text())["iterations"]
        assert tested == (kept if "ensemble" in file.name else kept[:1])


def test_the_parts_of_the_rows(ablation):
    def algorithm(variant):
        return ablation.config(variant, 0).algorithm.build(iterations=100)

    plain = algorithm("MAML")
    full = algorithm("MAML++")
    for variant, slots in {
        "MAML+MSL": ["query_weights"],
        "MAML+DA": ["derivative_order"],
        "MAML+CA": ["outer_schedule"],
        "MAML+BNWB+BNRS": ["norm_affine", "norm_statistics"],
        "MAML+LSLR": ["inner_rate"],
        "first-order MAML": ["derivative_order"],
        "ANIL": ["adapted"],
        "Meta-SGD": ["inner_rate", "num_steps"],
        "Proto-MAML": ["inner_start"],
    }.items():
        changed = algorithm(variant)
        assert replace(plain, **{slot: getattr(changed, slot) for slot in slots}) == changed
        assert all(getattr(plain, slot) != getattr(changed, slot) for slot in slots)
        if variant.startswith("MAML+"):
            assert all(getattr(full, slot) == getattr(changed, slot) for slot in slots)


@pytest.mark.parametrize(
    ("dataset", "tasks", "filters", "queries", "multi_step_epochs", "clip_value", "inner_lr"),
    [("omniglot", 8, 64, 1, 10, None, 0.1), ("mini-imagenet", 2, 48, 15, 15, 10.0, 0.01)],
)
def test_the_length_is_the_authors(
    dataset, tasks, filters, queries, multi_step_epochs, clip_value, inner_lr
):
    config = MamlPlusPlusAblation(dataset=dataset).config("MAML++", 0)
    assert (config.tasks, config.model.filters) == (tasks, filters)
    assert config.iterations == 50_000
    assert (config.episodes.queries, config.episodes.eval_queries) == (queries, queries)
    turned = "episode" if dataset == "omniglot" else "none"
    assert (config.episodes.rotations, config.episodes.eval_rotations) == (turned, "none")
    assert (config.model.activation, config.model.downsample) == ("leaky-relu", "max-pool")
    if dataset == "omniglot":
        assert config.data.class_split == "maml++"
    assert config.algorithm.multi_step_epochs == multi_step_epochs
    assert config.algorithm.clip_value == clip_value
    assert config.algorithm.inner_lr == inner_lr
    assert config.algorithm.first_order_epochs == 50  # DA and CA are parts of MAML++; see the page
    assert (config.algorithm.outer_schedule, config.algorithm.final_outer_lr) == ("cosine", 1e-5)
    own = MamlPlusPlusAblation(dataset=dataset, tasks=3, filters=16).config("MAML", 0)
    assert (own.tasks, own.model.filters) == (3, 16)
    assert own.algorithm.multi_step_epochs == 0
    assert own.algorithm.clip_value == clip_value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("MAML+LSRL",)}, "did you mean 'MAML\\+LSLR'"),
        ({"seeds": 0}, "seeds=0 must be"),
        ({"workers": 0}, "workers=0 must be"),
        ({"train_ways": 3}, "MAML learns its last layer for 2 classes; name variants that"),
    ],
)
def test_bad_input(ablation, changes, message):
    with pytest.raises(InputError, match=message):
        replace(ablation, **changes).run(Console(quiet=True))


def test_other_tasks_have_other_folders():
    """One command after another is not refused for what the first has left."""
    experiments = [
        MamlPlusPlusAblation(),
        MamlPlusPlusAblation(ways=5),
        MamlPlusPlusAblation(ways=5, shots=5),
        MamlPlusPlusAblation(dataset="mini-imagenet", ways=5),
        MamlClassification(),
        MamlClassification(dataset="mini-imagenet"),
        MamlPlusPlusFromClassifier(),
        MamlPlusPlusFromClassifier(dataset="omniglot"),
        MamlNavigation(),
        MamlHalfCheetah(),
        MamlHalfCheetah(goal="velocity"),
        MamlAnt(),
    ]
    folders = [str(each.folder) for each in experiments]
    assert len(set(folders)) == len(folders)
    assert folders[0] == "runs/maml++-ablation-omniglot-20-way-1-shot"
    assert folders[-2] == "runs/maml-half-cheetah-velocity"
    assert replace(experiments[0], out=Path("mine")).folder == Path("mine")
