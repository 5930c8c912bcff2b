"""What an experiment leaves behind: numbers, a table, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.core.files import write_atomically
from fewstep.training.display import say
from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json


def write_up(
    out: Path,
    device: str,
    console: Console,
    numbers: tuple[str, Mapping[str, Any]],
    *,
    table: str | None = None,
    pictures: Sequence[str] = (),
) -> None:
    """Write the numbers and the table of an experiment, and say what there is.

    Args:
        out: Its folder.
        device: What it was computed on.
        console: Where to print.
        numbers: Name and content of the JSON file, to which command, commit and machine are added.
        table: In Markdown, for table.md.
        pictures: Names of files that are drawn already.
    """
    name, values = numbers
    write_json(out / name, {"environment": environment(command_line(), device), **values})
    names = [name, *pictures]
    if table is not None:
        write_atomically(out / "table.md", table.encode())
        say(console, table)
        names.insert(0, "table.md")
    *others, last = names
    written = f"{', '.join(others)} and {last}" if others else last
    say(console, f"wrote {written} in {out}")
