"""Glyphs: drawn characters made by a program, in the manner of Omniglot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from fewstep.data.counter_random import key_from_name, random_bits, random_uniform
from fewstep.data.pixels import strokes
from fewstep.data.prepared import Pixels, RawClass, fingerprint, load_or_prepare
from fewstep.data.store import ClassStore

CLASSES, DRAWINGS, SIZE = 1200, 20, 28
SPLITS = {"train": range(800), "val": range(800, 950), "test": range(950, 1200)}
_KEY = key_from_name(0, "glyphs 1")
_STROKES, _KNOTS, _SAMPLES = 4, 4, 20  # at most 4 strokes, through 4 knots each
_PEN = 1.0  # pixels, half the width of a line


@dataclass(frozen=True)
class Glyphs:
    """1,200 characters of one to four curved strokes, each drawn 20 times with a shaky hand.

    A class is a set of strokes, smooth curves through random knots. A drawing moves every knot a
    little, and turns, shears, scales and shifts the whole. Nothing but sums, products, quotients,
    square roots and minima enter, one element at a time, so every machine draws the same pixels.

    Shapes: 28x28, one channel, strokes 255 on 0.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (1, SIZE, SIZE)

    def pixels(self, content: bytes, name: str) -> Pixels:
        """Return an image file, dark ink on light paper, as one of this data set."""
        return strokes(content, name, SIZE)

    def splits(self) -> dict[str, ClassStore]:
        """Return the stores of train, val and test: 800, 150 and 250 classes."""
        store = load_or_prepare("glyphs", fingerprint(_KEY), self.image_shape, _classes)
        return {split: store.select(classes) for split, classes in SPLITS.items()}


def _classes() -> Sequence[RawClass]:
    return [
        RawClass(f"glyph{c:04d}", [partial(_one_drawing, c, d) for d in range(DRAWINGS)])
        for c in range(CLASSES)
    ]


def _one_drawing(glyph: int, drawing: int) -> Pixels:
    return draw(glyph)[drawing].numpy()


@lru_cache(maxsize=1)  # the drawings of a class are read one after another
def draw(glyph: int) -> Tensor:
    """Return all drawings of one character, uint8, (20, 1, 28, 28)."""
    knots = _hand(_skeleton(glyph), glyph)  # (drawings, strokes, knots, 2)
    points = _spline(knots)
    pixel = torch.arange(SIZE, dtype=torch.float64)
    shape = (DRAWINGS, SIZE, SIZE)
    nearest = torch.full(shape, torch.inf, dtype=torch.float64)
    for stroke in range(points.shape[1]):
        for a, b in zip(points[:, stroke].unbind(1), points[:, stroke, 1:].unbind(1), strict=False):
            nearest = torch.minimum(nearest, _squared_distance(pixel, a, b))
    width = _PEN + 0.5 * (_uniform(glyph, 9, torch.arange(DRAWINGS)) - 0.5)
    ink = (width[:, None, None] + 0.5 - nearest.sqrt()).clamp(0, 1)
    return (ink * 255 + 0.5).to(torch.uint8)[:, None]


def _uniform(glyph: int, purpose: int, *coordinates: Tensor) -> Tensor:
    head = (torch.tensor(glyph), torch.tensor(purpose))
    return random_uniform(_KEY, *head, *coordinates)


def _skeleton(glyph: int) -> Tensor:
    """Return the knots of a character, (strokes, knots, 2), in a square of side 1 around 0.

    A stroke starts anywhere and walks on, each leg turned against the one before by a bounded
    amount; legs that would leave the square are reflected into it.
    """
    count = 1 + int(random_bits(_KEY, torch.tensor(glyph), torch.tensor(0))) % _STROKES
    stroke = torch.arange(count)
    point = _uniform(glyph, 1, stroke[:, None], torch.arange(2)) - 0.5
    leg = _uniform(glyph, 2, stroke[:, None], torch.arange(2)) - 0.5
    knots = [point]
    for knot in range(1, _KNOTS):
        bend = 1.6 * (_uniform(glyph, 2 + knot, stroke, torch.tensor(0)) - 0.5)
        length = 0.15 + 0.3 * _uniform(glyph, 2 + knot, stroke, torch.tensor(1))
        x, y = leg.unbind(1)
        leg = torch.stack((x - bend * y, y + bend * x), 1)
        x, y = leg.unbind(1)
        leg = leg * (length / (x * x + y * y + 1e-9).sqrt())[:, None]
        point = point + leg
        outside = point.abs() > 0.5
        point = torch.where(outside, point.sign() - point, point)
        leg = torch.where(outside, -leg, leg)
        knots.append(point)
    return torch.stack(knots, 1)


def _hand(skeleton: Tensor, glyph: int) -> Tensor:
    """Return shaky copies of the knots in pixels, (drawings, strokes, knots, 2)."""
    drawing = torch.arange(DRAWINGS)
    strokes, knots, _ = skeleton.shape
    grid = torch.meshgrid(
        drawing, torch.arange(strokes), torch.arange(knots), torch.arange(2), indexing="ij"
    )
    shaken = skeleton + 0.09 * (_uniform(glyph, 7, *grid) - 0.5)
    a, b, c, d, dx, dy = (
        _uniform(glyph, 8, drawing[:, None], torch.arange(6)) - 0.5
    ).T[..., None, None]  # fmt: skip
    x, y = shaken.unbind(-1)
    moved = torch.stack(
        (
            (1 + 0.25 * a) * x + 0.35 * b * y + 0.12 * dx,
            0.35 * c * x + (1 + 0.25 * d) * y + 0.12 * dy,
        ),
        -1,
    )
    return (SIZE - 1) / 2 + moved * (SIZE - 8)


def _spline(knots: Tensor) -> Tensor:
    """Return points of the Catmull-Rom curve through the knots, (..., points, 2)."""
    first = 2 * knots[..., :1, :] - knots[..., 1:2, :]
    last = 2 * knots[..., -1:, :] - knots[..., -2:-1, :]
    p = torch.cat((first, knots, last), -2)[..., None, :]
    per_leg = _SAMPLES // (_KNOTS - 1)
    t = (torch.arange(per_leg, dtype=torch.float64) / per_leg)[:, None]
    legs = [
        0.5
        * (
            2 * p1
            + t * (p2 - p0)
            + t * t * (2 * p0 - 5 * p1 + 4 * p2 - p3)
            + t * t * t * (3 * p1 - p0 - 3 * p2 + p3)
        )
        for p0, p1, p2, p3 in (p[..., k : k + 4, :, :].unbind(-3) for k in range(_KNOTS - 1))
    ]
    return torch.cat((*legs, knots[..., -1:, :]), -2)


def _squared_distance(pixel: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distance of every pixel from the segments a-b, (drawings, size, size)."""
    ax, ay = a[:, 0, None, None], a[:, 1, None, None]
    ux, uy = b[:, 0, None, None] - ax, b[:, 1, None, None] - ay
    px, py = pixel - ax, pixel[:, None] - ay
    along = ((px * ux + py * uy) / (ux * ux + uy * uy + 1e-9)).clamp(0, 1)
    dx, dy = px - along * ux, py - along * uy
    return dx * dx + dy * dy
