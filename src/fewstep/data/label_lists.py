"""Lists of labels: CSV files that say which class each image is of."""

from __future__ import annotations

import csv
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from fewstep.core.errors import InputError
from fewstep.data.archives import files_below, is_image, reading


def read_labels(path: Path) -> list[tuple[str, str]]:
    """Return the filename and the label of every row.

    Raises:
        InputError: it cannot be read, is no CSV file in UTF-8, lacks one of the columns, or a row
            lacks one of the two.
    """
    try:
        with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or ()
            if not {"filename", "label"} <= set(columns):
                raise InputError(
                    f"{path} must have the columns filename,label, not {','.join(columns)}; rename "
                    "them"
                )
            found = []
            for row in rows:
                if not (row["filename"] and row["label"]):
                    raise InputError(
                        f"{path} lacks a filename or a label in line {rows.line_num}; fill it in, "
                        "or remove the line"
                    )
                found.append((row["filename"], row["label"]))
            if not found:
                raise InputError(f"{path} names no image; add a line for each")
            return found
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV file in UTF-8 ({error}); save it as one") from error


def images_by_label(root: Path, lists: Mapping[str, Path]) -> dict[str, list[Path]]:
    """Return the images of every class that lists name.

    Args:
        root: Where the images are, at any depth; a list gives paths from here, or bare names.
        lists: By what to put before a label to name its class.

    Raises:
        InputError: a list is wrong, as `read_labels` says, or names an image that is not there,
            that several files could be, or that has another label, too.
    """
    files = _Files(root)
    label_of: dict[Path, str] = {}
    for prefix, path in lists.items():
        for name, label in read_labels(path):
            file = files.of(name, path)
            if "/" in label:
                raise InputError(f"{path} has the label {label!r}; write it without a slash")
            if label_of.setdefault(file, prefix + label) != prefix + label:
                raise InputError(
                    f"{file} is of {label_of[file]} and of {prefix}{label} by the lists; leave it "
                    "in one class"
                )
    if left_out := [f for f in files.images if f not in label_of]:
        warnings.warn(
            f"images that no list names are left out, {len(left_out)} in all, such as "
            f"{left_out[0]}; add a line for each",
            stacklevel=1,
        )
    classes: dict[str, list[Path]] = defaultdict(list)
    for file, label in sorted(label_of.items(), key=lambda each: (each[1], each[0])):
        classes[label].append(file)
    return classes


class _Files:
    """The images below a folder, by path or by name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.images = [f for f in files_below(root) if is_image(f.name)]
        self._by_path = {f.relative_to(root).as_posix(): f for f in self.images}
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for file in self.images:
            self._by_name[file.name].append(file)

    def of(self, name: str, path: Path) -> Path:
        """Return the one that a list means.

        Args:
            name: What it says.
            path: The list.

        Raises:
            InputError: there is none, or several.
        """
        if name in self._by_path:
            return self._by_path[name]
        match self._by_name[name]:
            case [file]:
                return file
            case []:
                raise InputError(
                    f"{path} names {name}, and there is no such image below {self._root}; give its "
                    "path from there, with its suffix"
                )
            case [first, second, *_]:
                raise InputError(
                    f"{path} names {name}, which could be {first} or {second}; give its path from "
                    f"{self._root}"
                )
        raise AssertionError  # a list is one of these
