"""From words on the command line to a command with its settings."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

import docstring_parser
import tyro

from fewstep.core.errors import InputError, check_name
from fewstep.training.config import SOURCES, Recipe, RunConfig, option_arguments
from fewstep.training.network_options import NETWORKS, Conv4Options
from fewstep.training.presets import preset
from fewstep.training.run_folder import read_toml

T = TypeVar("T")
_CHOICES: dict[str, Iterable[str]] = {
    "dataset": SOURCES,
    "network": NETWORKS,
    "recipe": get_args(Recipe),
}
_STYLE = (
    tyro.conf.AvoidSubcommands,  # a union's member is chosen by its tag, before parsing
    tyro.conf.OmitArgPrefixes,
    tyro.conf.FlagConversionOff,
)


def parse(options: type[T], arguments: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """Parse `arguments` into the dataclass `options`.

    Raises:
        InputError: the arguments do not fit; one line, with the nearest valid option.
        SystemExit: code 0, after --help.
    """
    _check_options(options, arguments, default, prog)
    if {"-h", "--help"} & set(arguments):
        _join_help(options if default is None else default)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            start = tyro.MISSING_NONPROP if default is None else default
            return tyro.cli(options, args=arguments, prog=prog, default=start, config=_STYLE)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{_one_line(complaint.getvalue())}; see `{prog} --help`") from None


def _one_line(box: str) -> str:
    """Condense tyro's message, in a frame or between rules of hyphens, to what is wrong."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"[╭╰].*|[─-]{3,}", line)]
    text = " ".join(lines[rules[0] + 1 : rules[1]]).rstrip(".")
    text = re.sub(r"((?:--\S+ )?[A-Z]+) .*?\(required\)", r"\1", text)  # without the help of each
    for pattern, plain in _IN_PLAIN_WORDS.items():
        if found := re.fullmatch(pattern, text):
            return found.expand(plain)
    return text


_OPTION = r"Error parsing (--\S+): "
_IN_PLAIN_WORDS = {  # what tyro says, with what Python said to it
    r"Error parsing settings[\w.]*: (.*)": r"\1",
    _OPTION + r".*invalid literal for int.*'(.*?)'": r"\1 '\2' must be a whole number",
    _OPTION + r".*could not convert string to float.*'(.*?)'": r"\1 '\2' must be a number",
    _OPTION + r"Could not find valid parse for arguments: \[(.*)\]": r"\1 cannot take \2",
    r"Missing from .*?: (.*)": r"missing: \1",
    r"Unrecognized options: (.*)": r"\1: no option takes this; options begin with two hyphens",
}


def _check_options(options: type, arguments: Sequence[str], default: object, prog: str) -> None:
    """Raise InputError at the first option that is unknown, with the nearest one, or empty."""
    known = ["--help", *_names(options if default is None else default)]
    config = getattr(default, "settings", default)
    for word, following in zip_longest(arguments, arguments[1:]):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name.startswith("--"):
            if name not in known:
                _check_elsewhere(name, config, prog)
            check_name("option", name, known)
            if (value if equals else following) == "":  # which as a path is the working folder
                raise InputError(f"{name} '' is empty; give a value or leave it out")


def _check_elsewhere(name: str, config: object, prog: str) -> None:
    """Raise InputError if training has such an option, or has it for another kind of run."""
    for tag, kinds in _CHOICES.items():
        found = []
        for kind in kinds:
            with contextlib.suppress(InputError):  # not every network takes glyphs
                if name in _names(preset(**{tag: kind})):
                    found.append(kind)
        if found and not isinstance(config, RunConfig):
            raise InputError(
                f"{name} is an option of `fewstep train`, which settles it for a run; `{prog}` has "
                "none"
            )
        if found and (here := getattr(config, tag)) not in found:
            raise InputError(
                f"{name} goes with --{tag} {' or '.join(found)}, not {here}; leave one of them out"
            )


def _names(options: Any) -> Iterator[str]:
    for f in fields(options):
        if is_dataclass(value := _default(options, f)):
            yield from _names(value)
        else:
            yield f"--{f.name.replace('_', '-')}"


def _join_help(options: Any) -> None:
    """Make the help of each option one paragraph; tyro keeps the line breaks of its docstring."""
    kind = options if isinstance(options, type) else type(options)
    texts = {
        param.arg_name: " ".join((param.description or "").split())
        for base in reversed(kind.__mro__[:-1])
        for param in docstring_parser.parse_from_object(base).params
    }
    for f in fields(kind):
        f.metadata = MappingProxyType({"help": texts.get(f.name)})
        if is_dataclass(value := _default(options, f)):
            _join_help(value)


def _default(options: Any, f: Field[Any]) -> Any:
    """Return an option's value, or, of a class, its default."""
    if isinstance(options, type) and f.default_factory is not MISSING:
        return f.default_factory()
    return getattr(options, f.name, None)


def run_config(arguments: Sequence[str]) -> RunConfig:
    """Return the settings that `arguments` start from: a file's, or those of a data set.

    --config, --initial, --dataset, --network, --recipe and --head choose which options and defaults
    there are, so they are read before the rest.

    Raises:
        InputError: the file or a name in it is wrong.
    """
    chosen = {
        tag: value
        for tag in ("dataset", "network", "recipe")
        if (value := value_of(arguments, f"--{tag}")) is not None
    }
    file = value_of(arguments, "--config")
    if file is None:
        initial = value_of(arguments, "--initial")
        is_run = initial is not None and (Path(initial) / "config.toml").is_file()
        if not is_run:
            return preset(**chosen)
        return _going_on(Path(str(initial)), chosen, value_of(arguments, "--head"))
    config = load_config(Path(file))
    for tag, value in chosen.items():
        if value != (held := getattr(config, tag)):
            raise InputError(f"--{tag} {value} contradicts {file}, which says {held}; drop one")
    return config


def _going_on(run: Path, chosen: dict[str, str], head: str | None) -> RunConfig:
    """Return the defaults of a run that starts from another: its data and its network.

    A head that is to be adapted is linear, if `head` does not say another; a linear one starts at
    zero, so that what was learned before is not drowned by a drawn one.
    """
    source = load_config(run / "config.toml")
    config = preset(**({"dataset": source.dataset, "network": source.network} | chosen))
    if config.dataset == source.dataset:
        config = replace(config, data=source.data)
    if config.network == source.network:
        config = replace(config, model=source.model)
    if isinstance(model := config.model, Conv4Options):
        if config.recipe != "supervised":
            model = replace(model, head="linear")
        is_linear = (head or model.head) == "linear"
        model = replace(model, initialisation="zero-head" if is_linear else "xavier")
        config = replace(config, model=model)
    return config


def load_config(path: Path) -> RunConfig:
    """Read settings from a TOML file, as a run folder holds them.

    Raises:
        InputError: the file cannot be read, or holds an unknown key or a wrong value.
    """
    return config_of(read_toml(path), path)


def config_of(values: Mapping[str, Any], source: Path) -> RunConfig:
    """Return settings by the nested values that stand for them; what these lack is the default.

    Args:
        values: As `to_dict` gives them.
        source: File that they are of, for messages.

    Raises:
        InputError: an unknown key or a wrong value.
    """
    tags = {tag: str(values[tag]) for tag in ("dataset", "network", "recipe") if tag in values}
    try:
        base = preset(**tags)
        return parse(RunConfig, option_arguments(values, base), prog="fewstep train", default=base)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """Return the last value given to an option, as `--option value` or `--option=value`."""
    value = None
    for word, following in zip_longest(arguments, arguments[1:]):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
    return value
