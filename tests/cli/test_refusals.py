"""What a command cannot do it says in one line, and what was saved stays."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from fewstep.cli.main import main
from fewstep.training.metrics_file import truncate_metrics
from fewstep.training.run_folder import RunFolder
from tests.cli.conftest import SINUSOID, refused, train_on_images
from tests.data.conftest import deny
from tests.processes import start

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def here(empty_folder, sinusoid_run):
    """A run in the folder of this name."""
    return shutil.copytree(sinusoid_run, empty_folder / "here")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("data shwo", "unknown command 'data shwo'; did you mean 'data show'?"),
        (
            "evaluate run --filters 5",
            "--filters is an option of `fewstep train`, which settles it for a run",
        ),
        ("predict run --query here", "missing: --support PATH; see `fewstep predict --help`"),
        ("predict", "missing: PATH --support PATH --query PATH; see `fewstep predict --help`"),
        ("evaluate", "missing: PATH; see `fewstep evaluate --help`"),
        ("predict run --inner-lr 1", "`fewstep predict` has none"),
        (f"{SINUSOID} --itrations=3", "unknown option '--itrations'; did you mean '--iterations'?"),
        (f"{SINUSOID} --device cuda:99", "device 'cuda:99' cannot be used"),
        (f"{SINUSOID} --num-steps -1", "num_steps=-1 must be a whole number, 0 or more"),
        (f"{SINUSOID} --inner-lr nan", "inner_lr=nan must be a finite number"),
        (f"{SINUSOID} --outer-lr 0", "outer_lr=0.0 must be a positive number"),
        (f"{SINUSOID} --shots 0", "shots=0 must be at least 1"),
        (
            "train --dataset sinusoid --recipe maml++ --inner-clip-norm None",
            "inner_clip_norm is None where the recipe has 10.0, which a run's file cannot say",
        ),
        ("train --ways 1", "ways=1 must be at least 2"),
        ("train --shots 0", "shots=0 must be at least 1"),
        ("train --queries 0", "queries=0 must be at least 1"),
        ("train --eval-queries 0", "eval_queries=0 must be at least 1"),
        (f"{SINUSOID} --not-adapted nothing.*", "pattern 'nothing.*' matches no parameter"),
        ("train --dataset omniglot --root nowhere", "nowhere lacks images_background.zip"),
        ("train --dataset mini-imagenet", "ImageNet's terms allow no download"),
        ("train --dataset folder", "pass --root"),
        ("train --config absent.toml", "cannot read absent.toml"),
        ("evaluate nowhere --tasks 1", "tasks=1 must be at least 2 to give an interval"),
        ("evaluate nowhere", "nowhere holds no run"),
        ("resume nowhere", "nowhere holds no run"),
        ("plot nowhere", "nowhere holds no run"),
        ("plot", "plot needs at least one run folder"),
        ("data show --count 0", "count=0 must be at least 1 episode"),
        ("data show --dataset sinusoid", "dataset 'sinusoid' has no images"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, command, message):
    assert message in refused(capsys, command)
    assert not list(Path("runs").glob("*/checkpoints/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ways 14", "classes than the 3 of the val split; ask for at most 3\n"),
        ("--ways 14 --eval-rotations classes", "classes than the 12 of the val split; ask for at"),
        ("--shots 5", "shots=5 and queries=2 need 7 images of every class, but class c"),
        ("--eval-queries 9", "queries=9 need 10 images of every class, but class c"),
        ("--size 8", "cannot be halved 4 times"),
    ],
)
def test_episodes_that_the_images_cannot_fill(empty_folder, capsys, options, message):
    command = train_on_images(empty_folder / "mine").replace("--rotations episode", "")
    assert message in refused(capsys, f"{command} {options}")


def test_two_runs_in_one_folder(here, capsys):
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.name != "lock"}
    assert "here already holds a run; continue it with" in refused(capsys, f"{SINUSOID} --out here")
    assert {p: p.read_bytes() for p in before} == before


def test_two_runs_in_one_folder_at_once(empty_folder, capsys):
    """The second is refused while the first goes on."""
    first = start(main, f"{SINUSOID} --iterations 100000 --out {empty_folder / 'here'}".split())
    try:
        while not Path("here/metrics.jsonl").exists():
            assert first.is_alive()
            time.sleep(0.01)
        error = refused(capsys, "resume here")
        assert f"here is in use by process {first.pid}" in error
    finally:
        first.kill()
        first.join()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(capsys, monkeypatch, compiled):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    command = f"{SINUSOID} --num-steps 3 --inner-lr 1e30 --compile {compiled} --out here"
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in ("iteration 1: the support loss of task 0 at step 1 is", "iteration 0 is kept"):
        assert part in error
    assert len(list(Path("here/checkpoints").iterdir())) == 1


@pytest.mark.parametrize("file", ["checkpoint", "state", "metrics"])
def test_a_full_disk_keeps_the_old_checkpoint(monkeypatch, capsys, file):
    """A write of iteration 2 meets a full disk; the run goes on from the start's checkpoint."""
    folder = {"checkpoint": "here/checkpoints", "state": "here", "metrics": "here/metrics.jsonl"}
    write, metrics_written = os.fsync, []

    def fills_up(descriptor):
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        name = str(target.parent if target.name.startswith(".new-") else target)
        metrics_written.extend(["yes"] * name.endswith("metrics.jsonl"))
        if metrics_written and name.endswith(folder[file]) and not target.is_dir():
            raise OSError(28, "No space left on device")
        write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        error = refused(capsys, f"{SINUSOID} --out here")
    assert "o space left" in error
    assert "intact" in error
    state = json.loads(Path("here/state.json").read_text())
    assert state["iteration"] == 0
    assert (Path("here/checkpoints") / state["last"]).exists()
    assert not list(Path("here").rglob(".new-*"))
    assert main(["resume", "here"]) == 0


def test_a_state_that_says_nothing(here, capsys):
    state = here / "state.json"
    values = json.loads(state.read_text())
    wrong = [{"best": []}, {"iteration": -4}, {"iteration": "x"}, {"last": 5}]
    for key, value in (("rank", "x"), ("name", None), ("iteration", 1.5)):
        wrong.append({"best": [values["best"][0] | {key: value}]})
    for text in ("[]", "{}", "null", *(json.dumps(values | change) for change in wrong)):
        state.write_text(text)
        for command in ("evaluate here", "resume here", f"{SINUSOID} --initial here"):
            assert "here/state.json is damaged (" in refused(capsys, command)
    state.unlink()
    state.mkdir()  # stands for what may not be read
    assert "cannot read here/state.json: Is a dir" in refused(capsys, "evaluate here")


@pytest.mark.parametrize("damage", ["state.json", "checkpoints"])
def test_a_damaged_run_is_named(here, capsys, damage):
    for file in [here / damage] if damage == "state.json" else (here / damage).iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert "here" in refused(capsys, "evaluate here")


DAMAGE = ["garbage", "[1]", "{}", '{"iteration": "x"}', '{"iteration": 1, "loss": []}', "\0" * 9]


@pytest.mark.parametrize("file", ["starts.jsonl", "metrics.jsonl"])
def test_a_file_that_may_not_be_read_is_named(here, capsys, monkeypatch, file):
    deny(monkeypatch, Path("here") / file)
    told = refused(capsys, "resume here --iterations 6")
    assert f"cannot read here/{file}: Permission denied" in told


def test_a_damaged_line_of_metrics_is_named(here, capsys):
    file = here / "metrics.jsonl"
    lines = file.read_text().splitlines()
    for damage in DAMAGE:
        capsys.readouterr()
        file.write_text("\n".join([*lines[:2], damage, *lines[3:], ""]))
        for command in ("resume here --iterations 5", "plot here"):
            error = refused(capsys, command)
            assert "line 3 of here/metrics.jsonl is damaged; remove the line" in error
        assert main(["evaluate", "here", "--tasks", "3", "--device", "cpu"]) == 0
        [scores] = here.glob("evaluation-test-best*.json")
        assert json.loads(scores.read_text())["training_seconds"] is None


@pytest.mark.parametrize("end", ["\n", "\n{"])
@pytest.mark.parametrize("damage", [*map(str.encode, DAMAGE), b"\xff"])
def test_a_damaged_last_line_of_metrics_is_dropped(empty_folder, damage, end):
    """As a power cut leaves it."""
    run = RunFolder(empty_folder)
    whole = '{"iteration": 1, "loss": NaN}\n'
    run.metrics_file.write_bytes(whole.encode() + damage + end.encode())
    assert [line["iteration"] for line in run.metrics()] == [1]
    truncate_metrics(run.metrics_file, 1)
    assert run.metrics_file.read_text() == whole
