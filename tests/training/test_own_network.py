"""Networks of the user's own, at the command line."""

import json

import pytest
import torch

from fewstep import InputError
from fewstep.cli.main import main
from fewstep.training.load import load_learner
from fewstep.training.own_network import own_network

SOURCE = """
from torch import nn
from beside import activation

SIZE = 4


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return activation(x + self.norm(self.conv(x)))


def small(input_shape, outputs):
    channels, height, width = input_shape
    body = [nn.Conv2d(channels, 4, 3, stride=4), Block(4), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(16, outputs))


def list_of_layers(input_shape, outputs):
    return [nn.Linear(1, 1)]


def line(input_shape, outputs):
    return nn.Linear(*input_shape, outputs)
"""
TINY = [
    *("--iterations", "2", "--val-every", "1", "--val-tasks", "2", "--test-tasks", "3"),
    *("--tasks", "2", "--device", "cpu"),
]


@pytest.fixture
def file(tmp_path, monkeypatch):
    folder = tmp_path / "nets"
    folder.mkdir()
    (folder / "mine.py").write_text(SOURCE)
    (folder / "beside.py").write_text("from torch.nn.functional import relu as activation\n")
    monkeypatch.chdir(folder)
    return folder / "mine.py"


def test_a_run_has_the_network_from_any_folder(tmp_path, file, monkeypatch):
    run = tmp_path / "run"
    options = ["--network", "own", "--factory", "mine.py:small", "--recipe", "maml++"]
    assert main(["train", *options, *TINY, "--out", str(run)]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run), "--tasks", "4", "--device", "cpu"]) == 0
    [scores] = run.glob("evaluation-test-best-*-tasks-4.json")
    assert json.loads(scores.read_text())["num_tasks"] == 4
    learner = load_learner(run)
    assert learner.module(torch.zeros(2, 1, 28, 28)).shape == (2, 5)
    assert type(learner.module[1]).__name__ == "Block"
    assert main(["resume", str(run), "--iterations", "3"]) == 0


def test_a_file_that_has_changed_since_is_refused(tmp_path, file, capsys):
    run = tmp_path / "run"
    options = ["--network", "own", "--factory", "mine.py:small"]
    assert main(["train", *options, *TINY, "--out", str(run)]) == 0
    before = file.read_text()
    file.write_text(before.replace("activation(x + ", "(x + "))
    for again in (["evaluate", str(run)], ["resume", str(run), "--iterations", "3"]):
        assert main(again) == 2
        assert "mine.py:small has changed since the run began" in capsys.readouterr().err
    file.write_text(before)
    assert main(["evaluate", str(run), "--tasks", "4", "--device", "cpu"]) == 0


def test_regression_has_a_network_of_ones_own_too(tmp_path, file):
    options = ["--dataset", "sinusoid", "--network", "own", "--factory", "mine.py:line"]
    assert main(["train", *options, *TINY, "--out", str(tmp_path / "run")]) == 0


def test_an_installed_module_is_taken_by_its_name():
    network = own_network("torch.nn:Linear", 3, 2)
    assert (network.in_features, network.out_features) == (3, 2)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (None, "needs the function that makes it, such as --factory my_networks.py:resnet12"),
        ("mine.py", "factory='mine.py' must be FILE.py:FUNCTION or MODULE:FUNCTION"),
        ("other.py:small", "there is no file other.py to take a network from; check the path"),
        ("mine.py:smal", "unknown function of mine.py 'smal'; did you mean 'small'?"),
        ("mine.py:SIZE", "factory='mine.py:SIZE' is a int; it must be a function"),
        ("no_such.module:small", "no module 'no_such.module' to take a network from; install it"),
        ("mine.py:list_of_layers", r"returned a list for inputs of \(1, 28, 28\) and 5 outputs"),
    ],
)
def test_what_makes_no_network_is_refused(factory, message, file):
    with pytest.raises(InputError, match=message):
        own_network(factory, (1, 28, 28), 5)


def test_faults_of_the_users_code_are_not_hidden(file):
    file.write_text("import no_such_thing\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        own_network("mine.py:small", (1, 28, 28), 5)


def test_anil_needs_the_name_of_the_last_layer(file, capsys):
    assert (
        main(["train", "--network", "own", "--factory", "mine.py:small", "--recipe", "anil"]) == 2
    )
    assert "give --recipe maml --adapted 'NAME.*'" in capsys.readouterr().err
