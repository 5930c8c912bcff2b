"""What a call of a module for tasks may do to it, and to what it is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils._mode_utils import no_dispatch

from fewstep.core.errors import InputError


@dataclass(frozen=True)
class Attributes:
    """What a part has before a call, to be put back.

    Args:
        part: The part.
        plain: Its attributes.
        parameters: Its own parameters.
        buffers: Its own buffers.
    """

    part: nn.Module
    plain: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]

    @classmethod
    def of(cls, part: nn.Module) -> Self:
        """Note what it has now."""
        return cls(part, dict(vars(part)), dict(part._parameters), dict(part._buffers))

    def restore_tensors(self) -> None:
        """Put back parameters and buffers."""
        self.part._parameters.update(self.parameters)
        self.part._buffers.update(self.buffers)

    def restore(self) -> None:
        """Put back all, and take away what is new: a cache without its key, or the other way."""
        own = vars(self.part)
        for name in own.keys() - self.plain.keys():
            del own[name]
        own.update(self.plain)
        buffers = self.part._buffers
        for name in buffers.keys() - self.buffers.keys():
            del buffers[name]
            self.part._non_persistent_buffers_set.discard(name)
        buffers.update(self.buffers)


@contextmanager
def nothing_left_behind(parts: list[nn.Module]) -> Iterator[None]:
    """Take back what a call under `torch.vmap` leaves in parts: tensors that nothing can read."""
    before = [Attributes.of(part) for part in parts]
    try:
        yield
    finally:
        for attributes in before:
            part = attributes.part
            left = (*vars(part).values(), *part._buffers.values())
            if any(isinstance(t, Tensor) and _functorch.is_batchedtensor(t) for t in left):
                attributes.restore()


_RECOMPUTES = "saved-tensor hooks, as those of torch.utils.checkpoint"


@contextmanager
def no_recomputing(kind: str) -> Iterator[None]:
    """Refuse what a backward pass would compute anew, when the parameters are others again.

    Raises:
        InputError: the module of this kind uses `torch.utils.checkpoint`, or such hooks.
    """
    try:
        with ExitStack() as stack:
            with suppress(RuntimeError):  # there are some around all of this, which may stay
                stack.enter_context(disable_saved_tensors_hooks(_RECOMPUTES))
            yield
    except RuntimeError as error:
        if _RECOMPUTES not in str(error):
            raise
        raise InputError(
            f"{kind} has {_RECOMPUTES}, and would compute with other parameters in the backward "
            "pass; call its layers as they are, and pass checkpoint_every=1 for memory"
        ) from error


@contextmanager
def nothing_written(
    kind: str, parameters: Mapping[str, Tensor], given: Iterable[Tensor]
) -> Iterator[None]:
    """Refuse a call that writes into parameters or into what it is given, which steps see again.

    Raises:
        InputError: the module of this kind, or a loss, does.
    """
    inputs = [t for t in given if not t.is_inference()]
    before = {n: p._version for n, p in parameters.items()}, [t._version for t in inputs]
    yield
    for name, version in before[0].items():
        if parameters[name]._version != version:
            raise InputError(
                f"{kind} changes its parameter `{name}` when it is called, as F.embedding does "
                "with max_norm; compute another from it in forward, or leave it to the optimisers"
            )
    if before[1] != [t._version for t in inputs]:
        raise InputError(
            f"{kind}, or a loss, changes what it is given, and steps see it again; make a new "
            "tensor, x - mean in place of x.sub_(mean)"
        )


@contextmanager
def put_back_if_refused(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors the values that they have now, if what is done meanwhile raises an error."""
    with no_dispatch():  # a recording needs no copies
        before = [(t, t._version, t.detach().clone()) for t in tensors if not t.is_inference()]
    try:
        yield
    except Exception:
        with no_dispatch(), torch.no_grad():
            for t, version, values in before:
                if t._version != version:
                    t.copy_(values)
        raise
