"""Views of a task."""

import pytest
import torch

from fewstep import InputError
from fewstep.data.views import views_of

X = torch.arange(4.0).reshape(1, 1, 1, 2, 2)  # one task of one image


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (None, [[[0, 1], [2, 3]]]),
        ("mirrored", [[[0, 1], [2, 3]], [[1, 0], [3, 2]]]),
        ("turned", [[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]),
    ],
)
def test_what_is_seen(views, expected):
    assert [view(X)[0, 0, 0].tolist() for view in views_of(views)] == expected


def test_images_that_are_not_square_can_be_mirrored_alone():
    wide = X.flatten(-2)[..., None, :]
    assert [tuple(view(wide).shape) for view in views_of("mirrored")] == 2 * [(1, 1, 1, 1, 4)]
    _, turned, *_ = views_of("turned")
    with pytest.raises(InputError, match="needs square images, but these are 1x4"):
        turned(wide)
