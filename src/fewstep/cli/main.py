"""The entry point: `fewstep COMMAND`."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.table import Table

import fewstep
from fewstep.cli.compare import Compare
from fewstep.cli.data import DataList, DataPrepare, DataShow, DataVerify
from fewstep.cli.evaluate import Evaluate
from fewstep.cli.predict import Predict
from fewstep.cli.runs import Plot, Resume, Train
from fewstep.core.allocator import keep_freed_memory
from fewstep.core.errors import InputError, check_name
from fewstep.experiments.alpha_comparison import AlphaComparison
from fewstep.experiments.alpha_convergence import AlphaConvergence
from fewstep.experiments.alpha_sensitivity import AlphaSensitivity
from fewstep.experiments.from_classifier import MamlPlusPlusFromClassifier
from fewstep.experiments.maml import MamlClassification
from fewstep.experiments.maml_plus_plus import MamlPlusPlusAblation
from fewstep.experiments.navigation import MamlNavigation
from fewstep.experiments.running import MamlAnt, MamlHalfCheetah
from fewstep.experiments.sinusoid import MamlSinusoid
from fewstep.training.parse import parse
from fewstep.training.trainer import TrainingStopped


class Command(Protocol):
    """A dataclass of options that can be run."""

    def run(self, console: Console) -> None:
        """Do what the command says."""
        ...


GROUPS = ("data", "reproduce")  # commands of two words
COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "resume": Resume,
    "evaluate": Evaluate,
    "compare": Compare,
    "predict": Predict,
    "plot": Plot,
    "data list": DataList,
    "data prepare": DataPrepare,
    "data verify": DataVerify,
    "data show": DataShow,
    "reproduce maml-classification": MamlClassification,
    "reproduce maml-sinusoid": MamlSinusoid,
    "reproduce maml++-ablation": MamlPlusPlusAblation,
    "reproduce maml++-from-classifier": MamlPlusPlusFromClassifier,
    "reproduce maml-navigation": MamlNavigation,
    "reproduce maml-half-cheetah": MamlHalfCheetah,
    "reproduce maml-ant": MamlAnt,
    "reproduce alpha-sensitivity": AlphaSensitivity,
    "reproduce alpha-convergence": AlphaConvergence,
    "reproduce alpha-comparison": AlphaComparison,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, 1 where training had to stop, memory ran out or nobody reads on, 2 after bad input, 130
        if interrupted.
    """
    keep_freed_memory()
    warnings.formatwarning = _format_warning
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a ± must not end a training where it is unknown
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words == ["--version"]:
            print(fewstep.__version__)
            return 0
        length = 2 if words and words[0] in GROUPS else 1
        if len(words) < length or words[length - 1] in ("-h", "--help"):
            _help(_console())
            return 0
        name = " ".join(words[:length])
        check_name("command", name, COMMANDS)
        options, rest = COMMANDS[name], words[length:]
        make_default = getattr(options, "default", None)
        default = make_default(rest) if make_default else None
        command = parse(options, rest, prog=f"fewstep {name}", default=default)
        command.run(_console())
    except InputError as error:
        _complain(f"fewstep: {error}")
        return 2
    except TrainingStopped as error:
        _complain(f"fewstep: training stopped: {error}")
        return 1
    except KeyboardInterrupt:
        _complain("fewstep: interrupted")
        return 130
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        _complain(
            f"fewstep: out of memory ({str(error).splitlines()[0]}); give a smaller --chunk-size, "
            "--checkpoint-every 1, or --memory-budget in MiB"
        )
        return 1
    except BrokenPipeError:  # as under `| head`; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _console() -> Console:
    """Return what prints to stdout; in a pipe or a file, a row of a table is a line."""
    console = Console()
    if not (console.is_terminal or "COLUMNS" in os.environ):
        console.width = 1_000_000  # rich's is 80
    return console


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device is out of memory; that of the CPU has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Return a warning of ours as one line, others as they are."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"fewstep: {message}\n"
    return _usual_format(message, category, filename, lineno, line)


_usual_format = warnings.formatwarning


def _complain(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun, the first one speaks
        print(text, file=sys.stderr)
        return
    with suppress(KeyboardInterrupt):  # torchrun ends it as soon as another fails
        time.sleep(3)


def _help(console: Console) -> None:
    console.print("usage: fewstep COMMAND [OPTIONS]\n", markup=False)
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"  {name}", (command.__doc__ or "").splitlines()[0])
    console.print(table)
    console.print(
        "\nfewstep COMMAND --help shows a command's options, fewstep --version the version."
        "\nStart with: fewstep train", highlight=False, markup=False
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
