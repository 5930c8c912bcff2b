import math
from itertools import permutations

import pytest
import torch

from fewstep.data.counter_random import (
    _mix,
    key_from_name,
    random_bits,
    random_normal,
    random_subset,
    random_uniform,
)

KEY = key_from_name(0, "test")


def chi_square(counts: torch.Tensor) -> float:
    """Return how many deviations the statistic lies from its mean, if all are equally likely."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_finaliser_is_that_of_splitmix64():
    # The first numbers of the reference implementation seeded with 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + i * gamma) % 2**64 for i in range(5)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [z % 2**64 for z in _mix(signed).tolist()] == published


def test_streams_do_not_change():
    """Golden values: a change here changes every episode anybody ever drew."""
    i = torch.arange(3)
    assert key_from_name(0, "train/classes") == 3060388678980757413
    assert random_bits(KEY, i).tolist() == [
        7942116023652747030,
        7262435082058475278,
        2481601522295324548,
    ]
    assert random_bits(KEY, i, torch.tensor(7)).tolist() == [
        6419265113691358580,
        5833709342345310210,
        26994113852873226,
    ]
    population = torch.tensor([10])
    assert random_subset(KEY, 4, population, i, largest=10).tolist() == [
        [4, 2, 9, 6],
        [1, 5, 8, 6],
        [7, 8, 9, 2],
    ]


@pytest.mark.parametrize(
    "other", [key_from_name(1, "test"), key_from_name(0, "tests"), key_from_name(-1, "test")]
)
def test_seed_and_name_both_count(other):
    i = torch.arange(1000)
    assert not (random_bits(KEY, i) == random_bits(other, i)).any()


def test_order_of_coordinates_counts():
    i = torch.arange(30)
    there, back = random_bits(KEY, i[:, None], i), random_bits(KEY, i, i[:, None])
    assert ((there == back) == torch.eye(30, dtype=torch.bool)).all()


def test_draws_do_not_depend_on_how_they_are_cut():
    i, j = torch.arange(100), torch.arange(7)
    whole = random_bits(KEY, i[:, None], j)
    assert torch.equal(random_bits(KEY, i[40:60, None], j[2:5]), whole[40:60, 2:5])
    assert random_bits(KEY, torch.tensor(41), torch.tensor(3)) == whole[41, 3]


def test_bits_are_63_and_fair():
    bits = random_bits(KEY, torch.arange(20_000))
    assert bits.min() >= 0
    ones = torch.stack([(bits >> k) & 1 for k in range(63)]).double().sum(1)
    deviations = (ones - 10_000) / math.sqrt(20_000 / 4)
    assert deviations.abs().max() < 4.5


@pytest.mark.parametrize("axis", ["last", "first"])
def test_uniform_numbers_are_uniform(axis):
    i, zero = torch.arange(100_000), torch.tensor(0)
    u = random_uniform(KEY, zero, i) if axis == "last" else random_uniform(KEY, i, zero)
    assert 0 <= u.min() <= u.max() < 1
    assert abs(chi_square(torch.histc(u, 1000, 0, 1))) < 4


def test_neighbours_are_independent():
    i = torch.arange(300)
    u = random_uniform(KEY, i[:, None], i)
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        pairs = torch.bincount((10 * a).long().flatten() * 10 + (10 * b).long().flatten())
        assert abs(chi_square(pairs.double())) < 4


def test_float32_holds_uniform_numbers_exactly():
    i = torch.arange(10_000)
    single = random_uniform(KEY, i).float()
    assert torch.equal(single.double(), random_uniform(KEY, i))
    assert single.max() < 1


def test_subsets_hold_no_item_twice():
    subsets = random_subset(KEY, 20, torch.tensor([25]), torch.arange(1000), largest=25)
    ordered = subsets.sort().values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert (subsets.min(), subsets.max()) == (0, 24)


def test_subsets_keep_to_their_own_population():
    population = torch.tensor([3, 5, 20])
    subsets = random_subset(
        KEY, 3, population, torch.arange(2000)[:, None], torch.arange(3), largest=20
    )
    assert subsets.shape == (2000, 3, 3)
    assert subsets.amax((0, 2)).tolist() == [2, 4, 19]
    assert (subsets[:, 0].sort().values == torch.arange(3)).all()


def test_a_larger_bound_changes_nothing():
    population, i = torch.tensor([10]), torch.arange(100)
    narrow = random_subset(KEY, 5, population, i, largest=10)
    assert torch.equal(narrow, random_subset(KEY, 5, population, i, largest=30))


def test_ordered_subsets_are_equally_likely():
    subsets = random_subset(KEY, 2, torch.tensor([5]), torch.arange(50_000), largest=7)
    counts = torch.bincount(subsets[:, 0] * 5 + subsets[:, 1], minlength=25)
    outcomes = [5 * a + b for a, b in permutations(range(5), 2)]
    assert counts[outcomes].sum() == 50_000
    assert abs(chi_square(counts[outcomes].double())) < 4


def test_normal_numbers_are_normal():
    drawn = random_normal(KEY, torch.arange(200)[:, None], torch.arange(1000)).flatten()
    share = 0.5 * (1 + torch.erf(drawn / math.sqrt(2)))  # uniform, if drawn is normal
    assert abs(chi_square(torch.histc(share, bins=100, min=0, max=1))) < 4
    pairs = torch.histogramdd(
        torch.stack([share[:-1], share[1:]], 1), bins=[20, 20], range=[0.0, 1.0, 0.0, 1.0]
    ).hist
    assert abs(chi_square(pairs)) < 4


def test_normal_numbers_do_not_change():
    i = torch.arange(3)
    found = random_normal(KEY, i, torch.tensor(7)).tolist()
    assert found == pytest.approx([0.0835861951699, 0.4627418466374, 1.7928992624946], abs=1e-12)
    assert random_normal(KEY, i[2:], torch.tensor(7)).item() == found[2]


@pytest.mark.parametrize(("first", "size"), [(0, 0.0), (1 - 2.0**-24, 5.768)])
def test_normal_numbers_are_finite_at_both_ends(first, size, monkeypatch):
    pair = torch.tensor([first, 0.0], dtype=torch.float64)
    monkeypatch.setattr("fewstep.data.counter_random.random_uniform", lambda *_: pair)
    assert random_normal(KEY, torch.tensor(0)).item() == pytest.approx(size, abs=1e-3)
