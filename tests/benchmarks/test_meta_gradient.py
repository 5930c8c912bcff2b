"""A table of times is of ways whose gradients were checked."""

from dataclasses import replace

import pytest
import torch

import meta_gradient
from meta_gradient import CASES, Turns, rows_of

CASE = CASES["omniglot-5-way"]
WAYS = ("fewstep", "plain loop", "fewstep, replay")


@pytest.fixture
def failing(monkeypatch):
    """Name (way, question) that fails."""
    found = []

    class Process:
        def __init__(self, case, way, threads):
            self.way, self.failed = way, None

        def ask(self, question, case=None):
            if (self.way, question) in found:
                self.failed = "no kernel"
                return None
            answers = {"gradient": torch.ones(3), "first": {"first_s": 1.0}, "time": 0.5}
            return answers.get(question, 8)

        def end(self):
            pass

    monkeypatch.setattr(meta_gradient, "Process", Process)
    return found


def test_a_way_that_fails_in_float64_is_not_measured(failing, capsys):
    failing.append(("fewstep, replay", "gradient"))
    rows = rows_of([CASE, replace(CASE, num_steps=5)], Turns(ways=WAYS, repeats=1))
    assert [row["way"] for row in rows] == [*WAYS, *WAYS]
    assert [row.get("failed") for row in rows[:3]] == [None, None, "not checked in float64"]
    assert "seconds" not in rows[2]
    assert rows[0]["ratio"] == 1
    assert "fewstep, replay failed in float64: no kernel" in capsys.readouterr().out


@pytest.mark.parametrize("question", ["gradient", "first"])
def test_nothing_is_compared_with_what_fails(failing, question):
    failing.append(("fewstep", question))
    with pytest.raises(SystemExit, match=r"fewstep failed in .*: no kernel"):
        rows_of([CASE], Turns(ways=WAYS, repeats=1))
