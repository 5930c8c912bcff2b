"""A run that is killed and resumed is the run that was not."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from fewstep.cli.main import main
from tests.data.conftest import write_images
from tests.processes import start

ITERATIONS = 60
KILLS = {"images": 20, "sinusoid": 5}

PROBLEMS = {
    "sinusoid": "--dataset sinusoid --tasks 3 --chunk-size 2",
    # running statistics, learned rates and rows of steps are part of the state
    "images": "--dataset folder --size 16 --network fully-connected --tasks 2 --chunk-size 2 "
    "--ways 2 --queries 2 --eval-queries 2 --recipe maml++ --num-steps 2 --eval-steps 2",
}


pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.long]


def _train(run: Path, problem: str, iterations: int = ITERATIONS) -> list[str]:
    common = f"--iterations {iterations} --val-every 9 --val-tasks 4 --test-tasks 4 --device cpu"
    data = ""
    if problem == "images":
        data = f"--root {run.parent / 'images'}"
        write_images(run.parent / "images", {f"c{i:02d}": 4 for i in range(12)})
    return f"train {PROBLEMS[problem]} {data} {common} --out {run}".split()


def _last_iteration(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["iteration"] if lines else 0


def _digest(file: Path) -> str:
    """Stand for a file's bytes, whose differences pytest takes minutes to tell."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _content(run: Path) -> dict[str, object]:
    """Return all that a run computed, without the seconds it took."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads(next(run.glob("evaluation-test-*.json")).read_text())
    return {
        "state": (run / "state.json").read_bytes(),
        "checkpoints": {p.name: _digest(p) for p in (run / "checkpoints").iterdir()},
        "metrics": [{k: v for k, v in m.items() if k != "seconds"} for m in metrics],
        "curve": scores["curve"],
    }


@pytest.mark.parametrize("problem", PROBLEMS)
def test_killed_at_random_and_resumed_is_byte_for_byte_the_same(tmp_path, problem):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(main, _train(whole, problem))
    reference.join()
    assert reference.exitcode == 0

    draw = random.Random(0)
    for target in sorted(draw.sample(range(1, ITERATIONS), KILLS[problem])):
        is_new = not (killed / "config.toml").exists()
        process = start(main, _train(killed, problem) if is_new else ["resume", str(killed)])
        while _last_iteration(killed) < target:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = start(main, ["resume", str(killed)])
    last.join()
    assert last.exitcode == 0
    assert _content(killed) == _content(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_run_writes_a_checkpoint_and_resumes_alike(tmp_path, number):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    reference, process = (start(main, _train(run, "sinusoid")) for run in (whole, stopped))
    while _last_iteration(stopped) < 30:
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join()
    reference.join()
    assert process.exitcode == 0
    state = json.loads((stopped / "state.json").read_text())
    assert state["iteration"] == _last_iteration(stopped) < ITERATIONS
    again = start(main, ["resume", str(stopped)])
    again.join()
    assert again.exitcode == 0
    assert _content(stopped) == _content(whole)


def _main_into(pipe: str, arguments: list[str]) -> int:
    sys.stdout = Path(pipe).open("w")  # noqa: SIM115 - of the process, to its end
    return main(arguments)


def test_a_validation_is_kept_though_nobody_reads_of_it(tmp_path):
    """As under `| head -1`."""
    run, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start(_main_into, str(pipe), _train(run, "sinusoid"))
    with pipe.open() as reader:
        assert reader.readline().startswith("run folder")
    process.join()
    assert process.exitcode == 1
    assert json.loads((run / "state.json").read_text())["iteration"] == 9


def test_training_goes_on_where_its_lines_cannot_be_written(tmp_path):
    run = tmp_path / "run"
    process = start(main, _train(run, "sinusoid", 9), output="/dev/full")
    process.join()
    assert process.exitcode == 0
    assert json.loads((run / "state.json").read_text())["iteration"] == 9


def test_more_iterations_go_on_from_the_end(tmp_path):
    whole, extended = tmp_path / "whole", tmp_path / "extended"
    assert main(_train(whole, "sinusoid", 20)) == 0
    assert main(_train(extended, "sinusoid", 9)) == 0
    assert main(["resume", str(extended), "--iterations", "8"]) == 2
    assert main(["resume", str(extended)]) == 0  # nothing left to train: tests again
    assert main(["resume", str(extended), "--iterations", "20"]) == 0
    starts = [json.loads(line) for line in (extended / "starts.jsonl").read_text().splitlines()]
    assert [(s["iteration"], s["iterations"]) for s in starts] == [(0, 9), (9, 20)]
    assert all(s["command"] and s["commit"] and s["hardware"] for s in starts)
    assert [s["settings"]["iterations"] for s in starts] == [9, 20]
    assert _content(extended) == _content(whole)
