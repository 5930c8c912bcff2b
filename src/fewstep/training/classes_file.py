"""The classes of a run: the names of those of each split, as training began."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fewstep.core.errors import InputError
from fewstep.core.files import write_atomically
from fewstep.data.archives import reading

Classes = Mapping[str, Sequence[str]]  # their names, by split


def read_classes(run: Path) -> Classes:
    """Return what classes.json in a run's folder says; nothing of a run of an older version.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    path = run / "classes.json"
    if not path.exists():
        return {}
    with reading(path):
        text = path.read_text(errors="replace")
    try:
        return {split: list(names) for split, names in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it") from error


def check_classes(run: Path, classes: Classes) -> None:
    """Check that splits have the classes that they had when training began.

    Args:
        run: Folder of the run.
        classes: Those of some splits, as they are now.

    Raises:
        InputError: they have others, or classes.json cannot be read.
    """
    began = read_classes(run)
    for split, names in classes.items():
        if others := set(names) ^ set(began.get(split, names)):
            name = min(others)
            there = next((s for s, of in began.items() if name in of), "no split")
            here = split if name in names else "another or none"
            raise InputError(
                f"{run} began with other {split} classes: {name} was of {there}, and is of {here} "
                f"now ({len(others)} differ); put the data back as they were, or train anew"
            )


def note_classes(run: Path, classes: Classes) -> None:
    """Write classes.json, if there are classes and it is not there yet."""
    path = run / "classes.json"
    if classes and not path.exists():
        write_atomically(path, json.dumps(classes).encode())
