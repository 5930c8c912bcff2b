"""A folder that gains a class is dealt anew: old runs would be tested on what they know."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest

from fewstep.cli.main import main
from tests.cli.conftest import refused, train_on_images


@pytest.fixture
def run(empty_folder, capsys):
    assert main([*train_on_images(Path("mine")).split(), "--out", "run"]) == 0
    capsys.readouterr()
    return Path("run")


def gain_a_class() -> None:
    shutil.copytree("mine/c00", "mine/a-new-one")


def test_a_run_notes_its_classes(run):
    classes = json.loads((run / "classes.json").read_text())
    assert sorted(chain(*classes.values())) == [f"c{i:02d}" for i in range(20)]
    assert list(classes) == ["train", "val", "test"]
    noted = (run / "classes.json").read_bytes()
    assert main(["resume", str(run), "--iterations", "6"]) == 0
    assert (run / "classes.json").read_bytes() == noted


@pytest.mark.parametrize(
    "command", ["evaluate run --tasks 3", "resume run --iterations 6", "evaluate run --split train"]
)
def test_it_is_not_tested_or_trained_on_others(run, capsys, command):
    gain_a_class()
    told = refused(capsys, command)
    assert told.startswith("fewstep: run began with other ")
    assert "put the data back as they were, or train anew" in told
    shutil.rmtree("mine/a-new-one")
    assert main(command.split()) == 0


def test_it_starts_no_run_that_tests_what_it_was_trained_on(run, capsys):
    start = train_on_images(Path("mine")).replace("train", "train --initial run --out next", 1)
    gain_a_class()
    told = refused(capsys, start)
    assert "run was trained on " in told
    assert "the data have changed since" in told
    assert not Path("next").exists()
    (run / "classes.json").unlink()  # as of an older version
    assert main(start.split()) == 0


def test_scores_of_other_classes_do_not_compare(run, capsys):
    gain_a_class()
    assert main([*train_on_images(Path("mine")).split(), "--out", "other"]) == 0
    capsys.readouterr()
    assert "has classes='" in refused(capsys, "compare run other")


def test_damaged_names_are_told(run, capsys):
    (run / "classes.json").write_text("[1, 2]")
    assert "classes.json is damaged" in refused(capsys, "evaluate run --tasks 3")
