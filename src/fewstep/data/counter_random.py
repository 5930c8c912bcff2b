"""Counter-based random numbers: every draw is a pure function of its coordinates.

z = mix(...mix(mix(seed) + c_1)... + c_n), with mix the finaliser of SplitMix64. There is no state
to save or to share: workers, devices, chunking and resumption cannot change a draw. 64-bit
integer arithmetic wraps alike on every device, so CPU and GPU draw the same numbers.

Reference: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """Return the int64 with the same bits as the unsigned 64-bit `word`."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = z + _GAMMA
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def key_from_name(seed: int, name: str) -> int:
    """Return a 64-bit key for the stream `name` under `seed`.

    >>> key_from_name(0, "train") == key_from_name(0, "val")
    False
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def random_bits(key: int, *coordinates: Tensor) -> Tensor:
    """Return 63 random bits for every point of the broadcast integer coordinates.

    Args:
        key: 64-bit stream key, from `key_from_name`.
        coordinates: int64 tensors, broadcast against each other; each coordinate is mixed in
            after the ones before it, so order matters.

    Returns:
        int64 tensor of the broadcast shape, uniform on [0, 2^63).
    """
    z = _mix(torch.full((), key, dtype=torch.int64, device=coordinates[0].device))
    for coordinate in coordinates:
        z = _mix(z + coordinate)
    return _shift_right(z, 1)


def random_uniform(key: int, *coordinates: Tensor) -> Tensor:
    """Return uniform numbers on [0, 1), one for every point, in float64.

    They are multiples of 2^-24, which float32 holds exactly, too.

    Args:
        key: 64-bit stream key, from `key_from_name`.
        coordinates: as in `random_bits`.
    """
    return (random_bits(key, *coordinates) >> 39).double() * 2.0**-24


def random_normal(key: int, *coordinates: Tensor) -> Tensor:
    """Return normal numbers of mean 0 and variance 1, one for every point, in float64.

    sqrt(-2 log u) cos(2 pi u'), by Box and Muller; none is beyond 5.8 in size.

    Args:
        key: 64-bit stream key, from `key_from_name`.
        coordinates: as in `random_bits`.
    """
    device = coordinates[0].device
    pair = torch.arange(2, device=device)
    u = random_uniform(key, *(c.unsqueeze(-1) for c in coordinates), pair)
    radius = torch.sqrt(-2 * torch.log1p(-u[..., 0]))  # 1 - u is never 0
    return radius * torch.cos(2 * math.pi * u[..., 1])


def random_subset(
    key: int, size: int, population: Tensor, *coordinates: Tensor, largest: int
) -> Tensor:
    """Draw ordered subsets without replacement, uniformly, one for every point.

    Args:
        key: 64-bit stream key, from `key_from_name`.
        size: Members of each subset.
        population: int64, broadcasts with the coordinates: how many items, 0 .. population - 1,
            each point draws from. At least `size`, which is the caller's to check.
        coordinates: as in `random_bits`.
        largest: An upper bound on `population`, known on the host.

    Returns:
        int64 tensor, (*broadcast shape of the coordinates, size).
    """
    items = torch.arange(largest, device=coordinates[0].device)
    keys = random_bits(key, *(c.unsqueeze(-1) for c in coordinates), items)
    keys = keys.masked_fill(items >= population.unsqueeze(-1), torch.iinfo(torch.int64).max)
    return keys.topk(size, dim=-1, largest=False, sorted=True).indices
