"""Signals that end a training."""

import errno
import io
import os
import re
import signal
from pathlib import Path
from threading import Thread

import pytest
import torch
from rich.console import Console

import fewstep
from fewstep.cli.main import main
from fewstep.core.learner import MetaLearner
from fewstep.training import trainer
from fewstep.training.display import Display, say
from fewstep.training.run_folder import RunFolder


def test_a_signal_that_comes_twice_at_once_is_answered_once(monkeypatch, capsys):
    """As a worker hears it: from the terminal, and from its parent."""

    class Interrupted(Thread):
        def start(self):
            os.kill(os.getpid(), signal.SIGTERM)
            super().start()

    monkeypatch.setattr(trainer, "Thread", Interrupted)
    display = Display(Console(), total=4, done=0, tasks=2)
    with trainer._stop_signals(display) as received:
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM] * 2
    assert capsys.readouterr().out.count("stopping after this iteration") == 1


@pytest.mark.usefixtures("signals_heard")
@pytest.mark.parametrize("number", trainer._STOPS)
def test_every_stop_signal_is_a_wish_to_stop(number, capsys):
    with trainer._stop_signals(Display(Console(), total=4, done=0, tasks=2)) as received:
        os.kill(os.getpid(), number)
    assert received == [number]


def test_what_was_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with trainer._stop_signals(Display(Console(), total=4, done=0, tasks=2)) as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


class Closed(io.StringIO):
    """A file that cannot be written to."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_terminal_that_was_closed_ends_nothing(number):
    console = Console(file=Closed(number))
    say(console, "nobody sees this")
    say(console, "nor this")


def test_who_left_the_pipe_ends_it_after_the_checkpoint(tmp_path, monkeypatch):
    def leave(self, text):
        if "validation" in text:
            raise BrokenPipeError

    monkeypatch.setattr(Display, "print", leave)
    run = tmp_path / "run"
    options = ["--iterations", "4", "--val-every", "2", "--val-tasks", "2", "--tasks", "2"]
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # the test's own output stays
    assert main(["train", "--dataset", "sinusoid", *options, "--out", str(run)]) == 1
    assert RunFolder.open(run).state().iteration == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    ],
)
def test_out_of_memory_is_one_line_with_its_remedies(error, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(MetaLearner, "step", fail)
    options = ["--iterations", "2", "--tasks", "2", "--out", str(tmp_path / "run")]
    assert main(["train", "--dataset", "sinusoid", *options]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("fewstep: out of memory (")
    assert "give a smaller --chunk-size, --checkpoint-every 1, or --memory-budget" in line


def test_commands_to_go_on_with_can_be_pasted_whole():
    """What is said beside a command is a comment of the shell's."""
    source = Path(fewstep.__file__).parent
    said = [line for path in source.rglob("*.py") for line in path.read_text().splitlines()]
    commands = [line for line in said if re.search(r'f?"(next: |      )fewstep [a-z]', line)]
    assert len(commands) > 8
    assert not [line for line in commands if re.search(r"   \(", line)]
