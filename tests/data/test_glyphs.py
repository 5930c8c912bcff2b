import hashlib
from itertools import chain

import torch

from fewstep.data.glyphs import CLASSES, SPLITS, draw


def test_the_pixels_never_change():
    """Results on glyphs mean something only while the drawings stay the same."""
    digest = hashlib.sha256(torch.stack([draw(c) for c in range(5)]).numpy().tobytes())
    assert digest.hexdigest()[:16] == "314f8682c4fb4820"


def test_drawings_are_grey_strokes_on_an_empty_ground():
    for glyph in (0, 1, 700):
        drawings = draw(glyph)
        assert drawings.shape == (20, 1, 28, 28)
        assert drawings.dtype == torch.uint8
        ink = (drawings > 0).float().mean((1, 2, 3))
        assert ((ink > 0.01) & (ink < 0.6)).all()
        assert ((drawings > 0) & (drawings < 255)).any(), "no antialiasing"
        assert drawings[:, :, 0].float().mean() < 8
        assert drawings[..., 0].float().mean() < 8


def test_drawings_differ_but_less_than_classes_do():
    """The nearest drawing, of those of 20 classes, is mostly one of the same class."""
    drawings = torch.stack([draw(c) for c in range(20)]).float().flatten(2) / 255  # (20, 20, 784)
    first, second = drawings[:, :10].flatten(0, 1), drawings[:, 10:].flatten(0, 1)
    assert torch.cdist(first, second).min() > 0.5
    nearest = torch.cdist(first, second).argmin(1) // 10
    share = (nearest == torch.arange(20).repeat_interleave(10)).float().mean()
    assert 0.4 < share < 0.99


def test_splits_are_800_150_and_250_classes_in_order():
    """As the documents say; another deal of them would make old results another problem's."""
    assert {split: len(classes) for split, classes in SPLITS.items()} == {
        "train": 800, "val": 150, "test": 250,
    }  # fmt: skip
    assert list(chain(*SPLITS.values())) == list(range(CLASSES))
