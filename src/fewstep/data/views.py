"""Views of a task: the same images seen in several ways, for a test that takes the mean of all."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

from torch import Tensor

from fewstep.core.errors import InputError, check_name
from fewstep.core.tasks import View, as_they_are

Views = Literal["mirrored", "turned"]


def views_of(views: Views | None) -> tuple[View, ...]:
    """Return the ways to see images, (..., height, width), of which the first changes nothing.

    Args:
        views: "mirrored", left to right as well; "turned", by 1 to 3 quarters as well, which raises
            InputError for images that are not square; None, no others.

    Raises:
        InputError: `views` is another.
    """
    others: dict[Views | None, tuple[View, ...]] = {
        None: (),
        "mirrored": (_mirrored,),
        "turned": tuple(partial(_turned, quarters=k) for k in (1, 2, 3)),
    }
    if views is not None:
        check_name("views", views, get_args(Views))
    return (as_they_are, *others[views])


def _mirrored(x: Tensor) -> Tensor:
    return x.flip(-1)


def _turned(x: Tensor, *, quarters: int) -> Tensor:
    height, width = x.shape[-2:]
    if height != width:
        raise InputError(
            f"views='turned' needs square images, but these are {height}x{width}; "
            "use views='mirrored'"
        )
    return x.rot90(quarters, (-2, -1))
