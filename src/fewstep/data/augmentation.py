"""Images changed by chance, each in its own way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.data.changes import crop, mirror, recolour, shift
from fewstep.data.counter_random import random_bits, random_uniform

_NARROWEST = 3 / 4  # sides of a crop, as in "Going deeper with convolutions", arXiv:1409.4842


@dataclass(frozen=True)
class Augmentation:
    """What chance does to each image; nothing, if nothing is said.

    Raises:
        InputError: `shifts` is negative, `crops` is not above 0 and at most 1, or `colours` not at
            least 0 and below 1.
    """

    flips: bool = False
    """Training: mirror each image left to right by chance."""
    shifts: int = 0
    """Training: move each image by up to so many pixels in both directions, edges repeated."""
    crops: float = 1.0
    """Training: cut at least this share of the area, 3:4 to 4:3, out of each image, stretched to
    the whole."""
    colours: float = 0.0
    """Training: vary each image's brightness, contrast and saturation by up to this share."""

    def __post_init__(self) -> None:
        if self.shifts < 0:
            raise InputError(f"shifts={self.shifts} must be 0 or more pixels")
        if not 0 < self.crops <= 1:
            raise InputError(f"crops={self.crops} must be above 0, and 1 at most: the whole image")
        if not 0 <= self.colours < 1:
            raise InputError(f"colours={self.colours} must be 0 or more, and below 1")

    def check_fits(self, image_shape: tuple[int, ...]) -> None:
        """Raise InputError unless a shift leaves something of images of (..., height, width)."""
        if self.shifts >= (side := min(image_shape[-2:])):
            raise InputError(f"shifts={self.shifts} must be 0 to {side - 1} pixels of these images")

    def __call__(self, x: Tensor, key: int, *coordinates: Tensor) -> Tensor:
        """Return the changed images as numbers within 0 and 1.

        Args:
            x: uint8, (..., channels, height, width).
            key: 64-bit stream key, of `key_from_name`.
            coordinates: int64, broadcast to the shape of the images, (...); an image's change is a
                pure function of the key and its coordinates.
        """
        if self.flips:
            x = mirror(x, random_bits(key, *coordinates) % 2 == 1)
        if not (self.shifts or self.colours or self.crops < 1):
            return x.float().div_(255)
        # More coordinates than the flips have, and so other numbers.
        number = torch.arange(9, device=x.device)
        u = random_uniform(key, *(c[..., None] for c in coordinates), number).unbind(-1)
        if self.shifts:
            x = shift(x, *((v * (2 * self.shifts + 1)).long() - self.shifts for v in u[:2]))
        x = x.float().div_(255)
        if self.crops < 1:
            x = crop(x, *_rectangle(self.crops, *u[2:6]))
        if self.colours:
            x = recolour(x, *(1 + self.colours * (2 * v - 1) for v in u[6:]))
        return x


UNCHANGED = Augmentation()


def _rectangle(least: float, u0: Tensor, u1: Tensor, u2: Tensor, u3: Tensor) -> tuple[Tensor, ...]:
    """Return top, left, height and width of rectangles of at least so much of the area."""
    area = least + (1 - least) * u0
    stretch = (2 * u1 - 1) * (-area.log()).clamp(max=-math.log(_NARROWEST))  # no side above 1
    height, width = (area * stretch.exp()).sqrt(), (area / stretch.exp()).sqrt()
    return u2 * (1 - height), u3 * (1 - width), height, width
