"""`fewstep compare`, as a person types it."""

import json
import shutil
from pathlib import Path

import pytest

from fewstep import paired_difference
from fewstep.cli.main import main
from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.training.load import load_learner
from tests.cli.conftest import refused

SINUSOID = (
    "train --dataset sinusoid --iterations 40 --val-every 40 --val-tasks 3 --test-tasks 30 "
    "--tasks 4 --device cpu"
)
TASKS = {
    "metric": "accuracy",
    "mean": 0.5,
    "ci95": 0.1,
    "num_tasks": 3,
    "split": "test",
    "seed": 0,
    "dataset": "omniglot",
    "data": {"class_split": "vinyals", "size": 28},
    "episodes": {
        "ways": 5, "shots": 1, "queries": 5, "eval_queries": 15, "rotations": "classes",
        "eval_rotations": "none", "flips": False,
    },
    "per_task": [0.25, 0.5, 0.75],
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for recipe in ("maml", "meta-sgd"):
        assert main(f"{SINUSOID} --recipe {recipe} --out {folder / recipe}".split()) == 0
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """Two runs, in folders named as their recipes."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


def _write(name: str, **changes: object) -> None:
    episodes = {"episodes": TASKS["episodes"] | changes.pop("episodes", {})}
    Path(name).write_text(json.dumps(TASKS | episodes | changes))


def test_runs_are_compared_on_the_tasks_of_their_tests(runs, capsys):
    assert main(["compare", "maml", "meta-sgd", "maml", "--out", "differences.json"]) == 0
    out = capsys.readouterr().out
    assert "30 tasks, the same for all" in out
    assert "next: fewstep evaluate RUN --tasks 120" in out  # a run and itself are not told apart
    episodes = SinusoidEpisodes("test", shots=10, queries=10)
    losses = [
        load_learner(run, device="cpu").evaluate(episodes, 30, num_steps=steps).metric[:, -1]
        for run, steps in (("meta-sgd", 1), ("maml", 10))
    ]
    wanted = paired_difference(*losses)
    saved = json.loads(Path("differences.json").read_text())
    found = saved["minus_the_first"]["meta-sgd"]
    assert found["mean"] == pytest.approx(wanted.mean, rel=1e-4)
    assert found["ci95"] == pytest.approx(wanted.ci95, rel=1e-4)
    assert found["above"] == wanted.above > 0
    assert saved["minus_the_first"]["maml"]["ci95"] == 0
    assert saved["tasks"]["num_tasks"] == 30
    assert f"{wanted.mean:+.4g} ± {wanted.ci95:.2g}" in out


def test_a_file_that_cannot_be_written_is_refused_first(capsys):
    _write("a.json")
    assert "b.toml must end in .json; rename" in refused(
        capsys, "compare a.json a.json --out b.toml"
    )
    missing = refused(capsys, "compare a.json a.json --out none/b.json")
    assert "there is no folder none for b.json; make it first" in missing


def test_what_changes_no_task_of_a_test_may_differ(capsys):
    _write("a.json")
    _write("b.json", seed=1, episodes={"rotations": "none", "flips": True, "queries": 9},
           data={"class_split": "vinyals", "size": 28, "root": "elsewhere"},
           per_task=[0.5, 0.75, 1.0], mean=0.75)  # fmt: skip
    assert main(["compare", "a.json", "b.json"]) == 0
    out = capsys.readouterr().out
    assert "50.00% ± 10.00" in out
    assert "+25.00% ± 0.00" in out
    assert "3, 0" in out
    assert "next:" not in out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "loss"}, "metric='loss'"),
        ({"num_tasks": 4}, "num_tasks=4"),
        ({"split": "val"}, "split='val'"),
        ({"dataset": "glyphs"}, "dataset='glyphs'"),
        ({"data": {"class_split": "finn", "size": 28}}, "class_split='finn'"),
        ({"episodes": {"ways": 20}}, "ways=20"),
        ({"episodes": {"shots": 5}}, "shots=5"),
        ({"episodes": {"eval_queries": 1}}, "queries=1"),
        ({"episodes": {"eval_rotations": "classes"}}, "rotations='classes'"),
    ],
)
def test_scores_of_other_tasks_are_refused(changes, says, capsys):
    _write("a.json")
    _write("b.json", **changes)
    error = refused(capsys, "compare a.json b.json")
    assert f"b.json has {says}, a.json" in error
    assert "only scores of the same tasks compare" in error


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"examples": 64}, "examples=64"),
        ({"held_out": 0.1}, "held_out=0.1"),
        ({"rotations": "classes"}, "rotations='classes'"),
    ],
)
def test_scores_of_a_classifier_are_of_its_own_images(changes, says, capsys):
    batches = {"examples": 128, "held_out": 0.05, "rotations": "none", "shifts": 8}
    for name, episodes in (("a", {}), ("b", {"shifts": 0}), ("c", changes)):
        values = TASKS | {"episodes": batches | episodes}
        Path(f"{name}.json").write_text(json.dumps(values))
    assert main(["compare", "a.json", "b.json"]) == 0
    capsys.readouterr()
    assert f"c.json has {says}, a.json" in refused(capsys, "compare a.json c.json")


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"episodes": {"flips": True}}, {"episodes": {"rotations": "none"}}]
)
def test_tasks_of_training_follow_from_the_seed_and_its_own_options(changes, capsys):
    _write("a.json", split="train")
    _write("b.json", split="train", **changes)
    assert "only scores of the same tasks" in refused(capsys, "compare a.json b.json")


def test_folders_of_images_are_told_apart_by_where_they_are(capsys):
    for name in ("a", "b"):
        _write(f"{name}.json", dataset="folder", data={"root": name, "size": 28})
    assert "root='b'" in refused(capsys, "compare a.json b.json")


def test_what_cannot_be_compared_is_refused_in_one_line(runs, capsys):
    assert "needs two runs" in refused(capsys, "compare maml")
    assert "cannot read nothing.json" in refused(capsys, "compare maml nothing.json")
    Path("empty").mkdir()
    assert "holds no run" in refused(capsys, "compare maml empty")
    Path("torn.json").write_text("{")
    assert "torn.json is not JSON" in refused(capsys, "compare maml torn.json")
    Path("torn.json").write_text('{"per_task": [1, 2]}')
    assert "torn.json lacks metric" in refused(capsys, "compare maml torn.json")
    shutil.copytree("maml", "old")
    file = Path("old/evaluation-test-best-10-steps.json")
    values = json.loads(file.read_text())
    del values["per_task"]
    file.write_text(json.dumps(values))
    assert "`fewstep evaluate RUN` writes one" in refused(capsys, "compare maml old")
    file.unlink()
    assert "`fewstep evaluate old --tasks 30`" in refused(capsys, "compare maml old")
    settings = Path("old/config.toml").read_text()
    assert "eval_steps = 10\n" in settings  # the default, to every command
    Path("old/config.toml").write_text(settings.replace("eval_steps = 10\n", ""))
    assert "`fewstep evaluate old --tasks 30`" in refused(capsys, "compare maml old")


def test_a_run_trained_on_has_no_score_until_it_is_tested_again(runs, capsys):
    shutil.copytree("maml", "longer")
    assert main(["resume", "longer", "--iterations", "80"]) == 0
    assert main(["compare", "maml", "longer"]) == 0
    file = Path("longer/evaluation-test-best-10-steps.json")
    values = json.loads(file.read_text())
    assert values["iterations"] == [80]
    shutil.copy("maml/evaluation-test-best-10-steps.json", file)  # as if stopped before the test
    capsys.readouterr()
    error = refused(capsys, "compare maml longer")
    assert "longer has no test of its best checkpoint" in error
    assert main(["evaluate", "longer", "--tasks", "30"]) == 0
    assert json.loads(file.read_text())["per_task"] == values["per_task"]
    file.write_text("{")
    assert "longer has no test of its best checkpoint" in refused(capsys, "compare maml longer")
    Path("maml/state.json").unlink()  # as of a folder of results, without the checkpoints
    assert main(["compare", "maml", "maml"]) == 0
