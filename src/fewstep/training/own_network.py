"""Networks of the user's own, by the name of a function that makes them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import nn

from fewstep.core.errors import InputError, check_name

_EXAMPLE = "such as --factory my_networks.py:resnet12"


def own_network(factory: str | None, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Call the function `factory` names, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.

    Args:
        factory: The function; it takes the two others and returns the network.
        input_shape: Of one input, (channels, height, width) for images.
        outputs: How many numbers it gives for each input, one for each class.

    Raises:
        InputError: there is no such function, or it returns no `nn.Module`. What goes wrong in the
            user's code is raised as it is.
    """
    if factory is None:
        raise InputError(f"network='own' needs the function that makes it, {_EXAMPLE}")
    source, colon, name = factory.rpartition(":")
    if not (source and colon and name):
        raise InputError(f"factory={factory!r} must be FILE.py:FUNCTION or MODULE:FUNCTION")
    module = _of_file(Path(source)) if source.endswith(".py") else _of_name(source)
    check_name(f"function of {source}", name, [n for n in vars(module) if not n.startswith("_")])
    make: Callable[[tuple[int, ...], int], object] = getattr(module, name)
    if not callable(make):
        raise InputError(f"factory={factory!r} is a {type(make).__name__}; it must be a function")
    network = make(input_shape, outputs)
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{factory} returned a {type(network).__name__} for inputs of {input_shape} and "
            f"{outputs} outputs; it must return an nn.Module"
        )
    return network


def placed(factory: str | None) -> str | None:
    """Return the same with a path that leads to the file from any folder."""
    source, colon, name = (factory or "").rpartition(":")
    return f"{Path(source).absolute()}{colon}{name}" if source.endswith(".py") else factory


def digest_of(factory: str | None) -> str | None:
    """Return what the file is known by; None where it is a module, or cannot be read."""
    path = Path((factory or "").rpartition(":")[0])
    if path.suffix != ".py" or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def check_digest(factory: str | None, digest: str | None) -> None:
    """Check that the file is the one that a run began with.

    Raises:
        InputError: it has changed.
    """
    if digest is not None and digest_of(factory) not in (digest, None):
        raise InputError(
            f"{factory} has changed since the run began; put it back as it was, or begin another "
            "run"
        )


def _of_file(path: Path) -> ModuleType:
    """Return a file's module; what lies beside it can be imported, too."""
    if not path.is_file():
        raise InputError(f"there is no file {path} to take a network from; check the path")
    name = f"fewstep_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its networks can be pickled
    if (folder := str(path.absolute().parent)) not in sys.path:
        sys.path.append(folder)
    spec.loader.exec_module(module)
    return module


def _of_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and imports what is not
        raise InputError(
            f"no module {name!r} to take a network from; install it, or give its file, {_EXAMPLE}"
        ) from error
