"""`torchrun` shares a run among processes; the run is the same."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.cli.main import main
from fewstep.core import learner
from fewstep.experiments import write_up
from fewstep.models.mlp import sinusoid_mlp
from fewstep.training import evaluate, trainer
from tests.processes import in_two

pytestmark = pytest.mark.long

OPTIONS = [
    *("train", "--dataset", "sinusoid", "--tasks", "5", "--chunk-size", "2", "--device", "cpu"),
    *("--val-every", "4", "--val-tasks", "5", "--test-tasks", "5"),
]


def torchrun(*program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run([*command, *program], capture_output=True, text=True, timeout=200)


def of_two(folder: Path, program: Callable[..., int], *arguments: Any) -> str:
    """Run a program in two processes and return what they print; torchrun takes ten seconds."""
    first, second = in_two(folder, program, *arguments)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    return first.stdout + second.stdout


def content(run: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    state = json.loads((run / "state.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return load_file(run / "checkpoints" / state["last"]), losses


def test_a_run_of_two_processes_and_then_one_is_that_of_one(tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "two"
    assert main([*OPTIONS, "--iterations", "12", "--out", str(one)]) == 0
    begun = torchrun("-m", "fewstep", *OPTIONS, "--iterations", "8", "--out", str(other))
    assert begun.returncode == 0, begun.stderr
    printed = begun.stdout
    assert printed.count("run folder:") == printed.count("iteration 8: validation") == 1
    resumed = of_two(tmp_path, main, ["resume", str(other), "--iterations", "10"])
    assert resumed.count("next: fewstep resume") == 0
    assert main(["resume", str(other), "--iterations", "12"]) == 0

    starts = [json.loads(line) for line in (other / "starts.jsonl").read_text().splitlines()]
    about = [(start["iteration"], start["iterations"], start["processes"]) for start in starts]
    assert about == [(0, 8, 2), (8, 10, 2), (10, 12, 1)]

    (tensors, losses), (wanted, wanted_losses) = content(other), content(one)
    assert losses == pytest.approx(wanted_losses, rel=1e-4)
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_what_has_no_checkpoint_yet_starts_from_the_same_parameters(tmp_path):
    """One process and two, of a run that was killed when it had its settings alone."""
    torch.manual_seed(1)
    save_file(sinusoid_mlp().state_dict(), tmp_path / "initial.safetensors")
    initial = ["--iterations", "2", "--initial", str(tmp_path / "initial.safetensors")]
    whole = tmp_path / "whole"
    assert main([*OPTIONS, *initial, "--out", str(whole)]) == 0
    for name in ("one", "two"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        shutil.copy(whole / "config.toml", tmp_path / name)
    assert main(["resume", str(tmp_path / "one")]) == 0
    of_two(tmp_path, main, ["resume", str(tmp_path / "two")])
    wanted, losses = content(whole)
    for name in ("one", "two"):
        tensors, found = content(tmp_path / name)
        assert found == pytest.approx(losses, rel=1e-4)
        for tensor, value in wanted.items():
            torch.testing.assert_close(tensors[tensor], value, rtol=1e-4, atol=1e-5)
    (tmp_path / "initial.safetensors").unlink()  # which a run with a checkpoint needs no more
    of_two(tmp_path, main, ["resume", str(tmp_path / "two"), "--iterations", "3"])


def notes_its_tests(note: Path, arguments: list[str]) -> int:
    """Run a command that writes down the numbers of the tasks it tests."""
    rank, usual = os.environ["RANK"], learner.adapt_and_query

    def noted(loop, episodes, numbers, *rest, **options):
        with Path(f"{note}{rank}").open("a") as file:
            file.write(f"{numbers.start}-{numbers.stop} ")
        return usual(loop, episodes, numbers, *rest, **options)

    learner.adapt_and_query = noted
    return main(arguments)


def test_processes_share_the_tests(tmp_path):
    run, note = tmp_path / "run", tmp_path / "note"
    train = [*OPTIONS, "--iterations", "4", "--keep-best", "2", "--val-every", "2",
             "--test-tasks", "7", "--chunk-size", "8", "--out", str(run)]  # fmt: skip
    printed = of_two(tmp_path, notes_its_tests, note, train)
    assert printed.count("test: loss") == printed.count("ensemble of 2: loss") == 1
    # Two validations, the test, and of the ensemble a chunk through each of two checkpoints.
    assert (tmp_path / "note0").read_text() == "0-2 0-2 0-3 0-3 0-3 "
    assert (tmp_path / "note1").read_text() == "2-5 2-5 3-7 0-4 0-4 "

    evaluate = ["evaluate", str(run), "--tasks", "9", "--device", "cpu"]
    assert of_two(tmp_path, notes_its_tests, note, evaluate).count("test: loss") == 1
    assert (tmp_path / "note1").read_text().endswith(" 4-9 ")
    (file,) = run.glob("evaluation-test-best-*-tasks-9.json")
    found = json.loads(file.read_text())
    assert main(evaluate) == 0
    wanted = json.loads(file.read_text())
    assert (found["environment"]["processes"], wanted["environment"]["processes"]) == (2, 1)
    assert found["num_tasks"] == wanted["num_tasks"] == 9
    assert found["curve"] == pytest.approx(wanted["curve"], rel=1e-5)
    assert found["per_task"] == pytest.approx(wanted["per_task"], rel=1e-4)


def first_writes(arguments: list[str]) -> int:
    """Run a command whose second process cannot write."""
    if os.environ["RANK"] != "0":
        for module in (evaluate, write_up):
            assert callable(module.write_json)
            module.write_json = None
    return main(arguments)


def test_processes_share_the_runs_of_a_table(tmp_path):
    def ablation(folder):
        return [
            *("reproduce", "maml++-ablation", "--dataset", "glyphs", "--ways", "2", "--seeds", "1"),
            *("--variants", "MAML", "MAML++", "--iterations", "2", "--tasks", "2", "--filters"),
            *("2", "--val-every", "1", "--val-tasks", "4", "--test-tasks", "5", "--device", "cpu"),
            *("--out", str(tmp_path / folder)),
        ]

    printed = of_two(tmp_path, main, ablation("two"))
    assert printed.count("done: ") == 2
    assert printed.count("wrote table.md") == 1
    assert main(ablation("one")) == 0
    for run in ("maml-seed0", "maml++-seed0"):
        (tensors, losses), (wanted, wanted_losses) = (
            content(tmp_path / folder / run) for folder in ("two", "one")
        )
        assert losses == pytest.approx(wanted_losses, rel=1e-3)
        assert tensors.keys() == wanted.keys()
        for file in (tmp_path / "one" / run).glob("evaluation-*.json"):
            found = json.loads((tmp_path / "two" / run / file.name).read_text())
            assert found["mean"] == pytest.approx(json.loads(file.read_text())["mean"])
            assert found["environment"]["processes"] == 2
    # Nothing is left to do, neither training nor tests: it is read by all.
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "two").glob("*/*.json")}
    assert of_two(tmp_path, main, ablation("two")).count("done: ") == 2
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "two").glob("*/*.json")} == files
    (tmp_path / "two" / "maml-seed0" / "evaluation-test-ensemble-5-steps.json").unlink()
    of_two(tmp_path, first_writes, ablation("two"))  # one test is missing
    changed = [f.name for f, at in files.items() if f.stat().st_mtime_ns != at]
    assert changed == ["evaluation-test-ensemble-5-steps.json"]


FIRST_IS_LATE = """
import os, sys, time
from fewstep.cli.main import main
time.sleep(1 if os.environ["RANK"] == "0" else 0)
sys.exit(main(sys.argv[1:]))
"""


def test_the_first_process_says_what_is_wrong_though_another_failed_before(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FIRST_IS_LATE)
    done = torchrun(str(script), "train", "--iterations", "0")
    assert done.stderr.count("iterations=0 must be at least 1") == 1


def reads_in_the_second_alone(arguments: list[str]) -> int:
    """Run a command whose first process looks at no number before it has to."""
    trainer._Unread.is_due = lambda self: os.environ["RANK"] == "1"
    return main(arguments)


def test_processes_stop_alike_at_a_loss_that_is_not_finite(tmp_path):
    train = [*OPTIONS, "--iterations", "100", "--val-every", "100", "--inner-lr", "1e20",
             "--out", str(tmp_path / "run")]  # fmt: skip
    first, second = in_two(tmp_path, reads_in_the_second_alone, train)
    assert "training stopped: iteration 1: the" in first.stderr
    assert (first.code, second.code) == (1, 1)
