"""Signals that end a training."""

import os
import signal
from threading import Thread

from rich.console import Console

from fewstep.training import trainer
from fewstep.training.display import Display


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
