"""Memory of a gradient is that of its own process."""

from dataclasses import replace

import pytest
import torch

from memory import Options, cases_of, peak
from meta_gradient import CASES
from peak import Memory

CASE = replace(CASES["omniglot-5-way"], tasks=1, num_steps=1)


def test_what_the_parent_once_held_does_not_count():
    before = peak("plain loop", CASE)
    torch.ones(1024 * 2**18)  # 1024 MiB, freed at once
    after = peak("plain loop", CASE)
    # what threads and the allocator keep differs by some MiB from process to process
    assert before["mib"] > 10
    assert after["mib"] == pytest.approx(before["mib"], abs=100)
    assert after["first_mib"] == pytest.approx(before["first_mib"], abs=100)


@pytest.mark.parametrize("steps", [(1, 5), (20,)])
def test_every_case_is_measured_once(steps):
    cases = cases_of(Options(cases=("omniglot-5-way",), steps=steps))
    assert len({replace(case, name="") for case in cases}) == len(cases)
    assert {c.name for c in cases if (c.tasks, c.size) == (8, 28)} == {"omniglot-5-way"}


def test_an_earlier_peak_does_not_count():
    memory = Memory()
    first = memory.most(lambda: torch.ones(512 * 2**18))
    second = memory.most(lambda: torch.ones(64 * 2**18))
    assert first["mib"] == pytest.approx(512, abs=30)
    assert second["mib"] == pytest.approx(64, abs=30)
