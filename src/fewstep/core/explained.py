"""What PyTorch's errors say of a module that is called for tasks, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fewstep.core.errors import InputError

NO_SECOND_DERIVATIVE = (
    "an operation of {kind}, or of a loss, has no second derivative ({reason}); write it in "
    "others, or take the first order, derivative_order=FixedOrder(1)"
)
_MEANINGS = {  # by words of PyTorch
    "derivative for": NO_SECOND_DERIVATIVE,
    "written-to tensor refers to a single memory location": (
        "{kind} changes a parameter, or what else is expanded, when it is called, and each task "
        "sees it again; make a new tensor, w / w.norm() in place of w.div_(w.norm())"
    ),
    "has been modified by an inplace operation": (
        "{kind}, or a loss, changes in place, perhaps by .data, what a derivative needs; make a "
        "new tensor, y = y.sign() in place of y.data = y.sign()"
    ),
}
_CANNOT_BE_VECTORISED = (
    "{kind}, or its loss or metric, cannot be vectorised over tasks ({reason}); write it in other "
    "operations, a mask as a factor in place of an index, or pass vectorize=False to loop over the "
    "tasks"
)
_MEANINGS_OF_VMAP = dict.fromkeys(
    ("vmap", "atching rule", "functorch", "BatchedTensor"), _CANNOT_BE_VECTORISED
)


@contextmanager
def explained(kind: str, *, vectorize: bool) -> Iterator[None]:
    """Say what an error of PyTorch means, where that is known.

    Args:
        kind: Of the module.
        vectorize: It is called through `torch.vmap`.

    Raises:
        InputError: in place of an error whose cause is known.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        meanings = _MEANINGS | (_MEANINGS_OF_VMAP if vectorize else {})
        for words, meaning in meanings.items():
            if words in reason:
                raise InputError(meaning.format(kind=kind, reason=reason)) from error
        if vectorize:
            error.add_note(
                "If the module works by itself, this may come of torch.vmap over the tasks: pass "
                "vectorize=False to loop over them."
            )
        raise
