import math

import pytest
import torch

from fewstep import InputError
from fewstep.data.sinusoid import SinusoidEpisodes


def source(split="train", shots=10, queries=20, seed=0) -> SinusoidEpisodes:
    return SinusoidEpisodes(split, shots=shots, queries=queries, seed=seed)


def test_an_episode_depends_on_its_number_only():
    whole, part = source().batch(0, 8).batch(3, 2), source().batch(3, 2)
    for a, b in zip(whole.tensors(), part.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "test"}], ids=str)
def test_another_seed_or_split_draws_other_episodes(other):
    one, two = source().batch(0, 5), source(**other).batch(0, 5)
    assert not torch.isclose(one.x_support, two.x_support, rtol=1e-5).all(1).any()
    assert not torch.isclose(source().curve(0, 5)[0], source(**other).curve(0, 5)[0]).any()


def test_points_lie_on_the_curve():
    batch, (amplitude, phase) = source().batch(5, 100), source().curve(5, 100)
    for x, y in ((batch.x_support, batch.y_support), (batch.x_query, batch.y_query)):
        assert x.dtype == y.dtype == torch.float32
        curve = amplitude[:, None, None] * torch.sin(x.double() - phase[:, None, None])
        torch.testing.assert_close(y.double(), curve, rtol=0, atol=5e-6)
    assert batch.x_support.shape == batch.y_support.shape == (100, 10, 1)
    assert batch.x_query.shape == batch.y_query.shape == (100, 20, 1)


def test_support_and_query_are_other_points():
    batch = source().batch(0, 100)
    assert not (batch.x_support == batch.x_query.mT).any(2).double().mean() > 1e-3


def test_ranges_are_those_of_the_paper():
    amplitude, phase = source().curve(0, 20_000)
    x = source().batch(0, 1000).x_query.double()
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi), (x, -5.0, 5.0)):
        unit = (values.flatten() - low) / (high - low)
        assert 0 <= unit.min() < 1e-3
        assert 1 - 1e-3 < unit.max() <= 1
        sorted_unit = unit.sort().values
        even = torch.linspace(0, 1, len(unit), dtype=torch.float64)
        assert (sorted_unit - even).abs().max() < 1.95 / len(unit) ** 0.5  # Kolmogorov-Smirnov


def test_amplitude_and_phase_are_independent():
    assert torch.corrcoef(torch.stack(source().curve(0, 20_000)))[0, 1].abs() < 0.03


@pytest.mark.parametrize("name", ["shots", "queries"])
def test_refuses_no_points(name):
    with pytest.raises(InputError, match=f"^{name}=0 must be at least 1 point$"):
        source(**{name: 0})
