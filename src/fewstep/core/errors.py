"""The one error type for mistakes a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what was given, the rule it breaks, the remedy. The command line
    prints it without a traceback and exits with code 2.
    """


def check_some(what: str, values: Sequence[object]) -> None:
    """Raise InputError if there are none."""
    if not values:
        raise InputError(f"{what} is empty; give at least one")


def check_names(option: str, values: Sequence[str], names: Iterable[str]) -> None:
    """Raise InputError if there are none, or one is not among `names`."""
    names = list(names)
    check_some(f"{option}s", values)
    for value in values:
        check_name(option, value, names)


def check_at_least(least: int, unit: str = "", /, **values: float | None) -> None:
    """Raise InputError if one of some values, by name, is below the least; None is left out.

    >>> check_at_least(1, "task", chunk_size=8, num_tasks=None)
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise InputError(f"{name}={value} must be at least {least}{unit and f' {unit}'}")


def check_share(name: str, value: float) -> None:
    """Raise InputError unless a number is 0 or more, and below 1."""
    if not 0 <= value < 1:
        raise InputError(f"{name}={value} must be 0 or more, and below 1, such as 0.9")


def check_betas(betas: object) -> None:
    """Raise InputError unless they are the two of Adam."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise InputError(f"betas={betas!r} must be two numbers, such as (0.9, 0.999)")
    for beta in betas:
        check_share("betas", beta)


def check_name(option: str, value: str, names: Iterable[str]) -> None:
    """Raise InputError with the nearest valid name unless `value` is one of `names`."""
    names = list(names)
    if value not in names:
        in_small = {name.lower(): name for name in names}
        near = difflib.get_close_matches(value.lower(), in_small, n=1, cutoff=0.4)
        hint = f"did you mean {in_small[near[0]]!r}?" if near else f"valid are {', '.join(names)}"
        raise InputError(f"unknown {option} {value!r}; {hint}")


def check_fits(
    what: str,
    found: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    hint: str = "",
    *,
    may_lack: bool = False,
) -> None:
    """Check that there is a tensor in the shape of each parameter, and no other.

    Args:
        what: Who found them: "inner_clipping gave".
        found: By name.
        like: The parameters.
        hint: What may help.
        may_lack: Some parameters may have none.

    Raises:
        InputError: there is not.
    """
    given: object = found
    if not isinstance(given, Mapping):
        raise InputError(f"{what} a {type(given).__name__} where a dict of tensors belongs")
    if may_lack:
        like = {n: t for n, t in like.items() if n in found}
    if found.keys() == like.keys() and all(
        isinstance(found[n], Tensor) and found[n].shape == t.shape for n, t in like.items()
    ):
        if made := [n for n, t in found.items() if t.is_complex() and not like[n].is_complex()]:
            raise InputError(f"{what} complex numbers for `{made[0]}`, which is real; give .real")
        return
    for name in (*like, *found):
        got, needed = _shape(found, name), _shape(like, name)
        if got != needed:
            raise InputError(f"{what} {got} for `{name}` where {needed} belongs{hint}")


def _shape(tensors: Mapping[str, object], name: str) -> str:
    if name not in tensors:
        return "nothing"
    found = tensors[name]
    return str(tuple(found.shape)) if isinstance(found, Tensor) else f"a {type(found).__name__}"
