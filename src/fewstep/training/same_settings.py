"""Whether a run has the settings that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from fewstep.core.errors import InputError
from fewstep.training.config import RunConfig, to_dict
from fewstep.training.parse import config_of, load_config
from fewstep.training.run_folder import RunFolder

# Settings that say how to compute, and change no result but rounding.
_HOW = ("device", "chunk_size", "checkpoint_every", "memory_budget", "replay", "compile")


def differences(held: Mapping[str, Any], asked: Any) -> Iterator[tuple[str, object, object]]:
    """Yield the name of each setting that is not as asked for, what is held and what is asked.

    Those that say how to compute do not count.

    Args:
        held: Nested values, as a run's file has them; what they lack is the default.
        asked: The configuration to compare with.
    """
    settings, default = to_dict(asked), to_dict(type(asked)())
    for key in sorted(held.keys() | settings.keys()):
        if is_dataclass(part := getattr(asked, key, None)):
            yield from differences(held.get(key, {}), part)
            continue
        there, here = held.get(key, default.get(key)), settings.get(key)
        if key not in _HOW and there != here:
            yield key, there, here


def check_can_be_kept(config: RunConfig) -> None:
    """Check that a run's file can say all of its settings; it leaves out what is None.

    Raises:
        InputError: an option is None where the recipe has a value, which the file would go back to.
    """
    read = config_of(to_dict(config), Path("config.toml"))
    for name, there, asked in differences(to_dict(read), config):
        if asked is None:
            raise InputError(
                f"{name} is None where the recipe has {there!r}, which a run's file cannot say; "
                "give another value, or another recipe"
            )


def open_run(path: Path) -> tuple[RunFolder, RunConfig]:
    """Open the folder of a run, and return the settings that it began with and has now.

    Raises:
        InputError: there is no run, or what `check_unchanged` raises.
    """
    run = RunFolder.open(path)
    config = load_config(run.path / "config.toml")
    check_unchanged(run, config)
    return run, config


def check_unchanged(run: RunFolder, config: RunConfig) -> None:
    """Check that a run goes on with the settings it began with.

    It may have more iterations, other ways to compute, and its data elsewhere. Runs of versions
    that did not note their settings are taken as they are.

    Raises:
        InputError: another setting has changed, so that validations before and after would not
            compare; or starts.jsonl is damaged.
    """
    if (began := run.first_settings()) is None:
        return
    held = to_dict(config_of(began, run.starts_file))
    for name, there, here in differences(held, config):
        if name not in ("iterations", "root"):
            file = quote(str(run.path / "config.toml"))
            raise InputError(
                f"{run.path} began with {name}={there!r}, and {file} now says {here!r}; put "
                f"{there!r} back, or begin another run with `fewstep train --config {file}`"
            )
