"""Interrupts of runs side by side."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.usefixtures("signals_heard")

SWEEP = """
import signal, sys
from dataclasses import replace
from pathlib import Path
from rich.console import Console
from fewstep.experiments.sweep import complete_all
from fewstep.training.presets import preset

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as in fewstep.cli.main
    config = replace(preset("sinusoid"), iterations=10**6, val_every=10**6, tasks=2, device="cpu")
    plan = {Path(sys.argv[1], str(i)): config for i in range(4)}
    complete_all(plan, (), Console(quiet=True), workers=2)
"""

STUBBORN = """
import signal, sys, time
from pathlib import Path
from rich.console import Console
from fewstep.experiments.pool import each

def stubborn(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        Path(path).write_text(str(time.time()))
        time.sleep(0.05)

if __name__ == "__main__":
    jobs = {i: (f"{sys.argv[1]}/{i}",) for i in range(3)}
    list(each(stubborn, jobs, workers=2, ray=False, console=Console(stderr=True)))
"""

DYING = """
import os, sys
from rich.console import Console
from fewstep.experiments.pool import each

if __name__ == "__main__":
    jobs = {i: (3,) for i in range(3)}
    list(each(os._exit, jobs, workers=2, ray=False, console=Console(quiet=True)))
"""


def _start(folder, text):
    script = folder / "script.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, script, folder], stderr=subprocess.PIPE, start_new_session=True
    )


def _wait(command, condition):
    while not condition():
        assert command.poll() is None
        time.sleep(0.05)


@pytest.fixture
def started():
    commands = []

    def start(*arguments):
        commands.append(_start(*arguments))
        return commands[-1]

    yield start
    for command in commands:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
        command.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_workers_write_a_checkpoint_and_start_no_other_run(tmp_path, started, number):
    """Where all hear it, as of Ctrl-C, workers are told again by their parent."""
    command = started(tmp_path, SWEEP)
    metrics = [tmp_path / str(i) / "metrics.jsonl" for i in range(2)]
    _wait(command, lambda: all(m.exists() and m.read_text() for m in metrics))
    os.killpg(command.pid, number)
    assert command.wait(60) != 0
    for file in metrics:
        last = json.loads(file.read_text().splitlines()[-1])
        state = json.loads((file.parent / "state.json").read_text())
        assert state["iteration"] == last["iteration"] > 0
    assert not any((tmp_path / str(i)).exists() for i in (2, 3))


def test_a_second_interrupt_kills_the_workers(tmp_path, started):
    command = started(tmp_path, STUBBORN)
    files = [tmp_path / str(i) for i in range(2)]
    _wait(command, lambda: all(f.exists() for f in files))
    os.killpg(command.pid, signal.SIGINT)
    answer = b"stopping the workers (another Ctrl-C kills them); the same command goes on\n"
    assert command.stderr.readline() == answer
    time.sleep(0.5)
    assert command.poll() is None  # waits for them
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait(60) != 0
    before = [f.read_text() for f in files]
    time.sleep(0.3)
    assert [f.read_text() for f in files] == before


def test_a_worker_that_dies_ends_the_command(tmp_path, started):
    command = started(tmp_path, DYING)
    _, said = command.communicate(timeout=120)
    assert b"exit code 3" in said
