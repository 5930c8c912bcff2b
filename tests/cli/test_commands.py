"""The commands as a person types them, in a process of this one's."""

import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

import fewstep
from fewstep import InputError, MetaLearner, Scores
from fewstep.cli.data import DataShow, _command
from fewstep.cli.evaluate import Evaluate
from fewstep.cli.main import COMMANDS, main
from fewstep.cli.runs import Train
from fewstep.cli.score_table import score_table
from fewstep.data.folder import ImageFolder
from fewstep.training.build import Experiment
from fewstep.training.config import SOURCES
from fewstep.training.episode_options import ClassificationOptions
from fewstep.training.load import load_learner
from fewstep.training.network_options import Conv4Options
from fewstep.training.parse import load_config, parse
from fewstep.training.presets import preset
from fewstep.training.run_folder import RunFolder
from tests.cli.conftest import SINUSOID, TINY, refused, scribble, train_on_images
from tests.data.conftest import write_images

pytestmark = pytest.mark.usefixtures("empty_folder")


def _size(picture: Path | str) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


@pytest.mark.pictures
def test_train_evaluate_plot(empty_folder, capsys):
    assert main(SINUSOID.split()) == 0
    run = Path("runs/sinusoid-maml-1")
    out = capsys.readouterr().out
    assert "test: loss" in out
    assert "95% interval; 3 tasks; 10 inner steps" in out
    assert "next: fewstep evaluate" in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["iteration"] for m in lines] == [1, 2, 2, 3, 4, 4]
    assert list((run / "tensorboard").glob("events.*"))
    assert tomllib.loads((run / "config.toml").read_text())["iterations"] == 4
    for picture in ("curves.png", "fits.png"):
        assert _size(run / picture) > (400, 200)

    assert main(f"evaluate {run} --steps 2 --tasks 4 --split val --checkpoint last".split()) == 0
    out = capsys.readouterr().out
    file = run / "evaluation-val-last-2-steps-tasks-4.json"
    assert f"checkpoint: last, iteration 4; tasks 4\nwrote {file}\n" in out
    assert "4 tasks; 2 inner steps" in out
    saved = json.loads(file.read_text())
    assert len(saved["curve"]) == 3
    assert saved["environment"]["command"]

    assert main(SINUSOID.split()) == 0
    assert main(f"plot {run} runs/sinusoid-maml-2 --out both.png".split()) == 0
    assert _size("both.png") > (400, 200)


def test_supervised_learning_and_a_run_that_starts_from_it(empty_folder, capsys):
    write_images(empty_folder / "mine", {f"c{i:02d}": 6 for i in range(20)})
    same = f"--dataset folder --root mine --size 16 --filters 4 {TINY}"
    batches = "--examples 8 --held-out 0.2 --shifts 2"
    first = f"train --recipe supervised {same} {batches} --head cosine --initialisation xavier"
    assert main(first.split()) == 0
    out = capsys.readouterr().out
    assert "0 inner steps" in out
    assert "fewstep train --initial runs/folder-supervised-1 --recipe maml++" in out
    run = Path("runs/folder-supervised-1")
    assert main(f"evaluate {run} --split val --tasks 3".split()) == 0
    options = "--support mine --query mine/c00"
    assert f"--initial {run}" in refused(capsys, f"predict {run} {options}")
    for flag in ("--shots 2", "--queries 2", "--rotations classes", "--views turned", "--steps 2",
                 "--statistics support"):  # fmt: skip
        error = refused(capsys, f"evaluate {run} {flag}")
        assert (
            f"{flag}: the tasks of {run} are a classifier's, with its own classes and no supp"
            in error
        )
    assert main(f"evaluate {run} --statistics running --tasks 3".split()) == 0

    second = f"train --initial {run} {TINY} --size 20 --ways 2 --queries 2 --eval-queries 2"
    for other, words in (
        ("--network fully-connected", "has network='conv4' where this run has 'fully-connected', "),
        ("--norm layer", "has norm='batch' where this run has 'layer', so that it is of another n"),
        ("--fractions 0.5 0.2 0.3", "so that it may have been trained on what this r"),
    ):
        assert words in refused(capsys, f"{second} {other}")
    assert main(second.split()) == 0
    config = load_config(Path("runs/folder-maml-1/config.toml"))
    assert config.initial == run.absolute()
    assert config.data == ImageFolder(Path("mine").absolute(), size=20)
    assert config.model == Conv4Options(filters=4, initialisation="zero-head")
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"starts from {run}; made anew: head.weight, head.bias run folder" in out

    assert main(f"{second} --projection True --out runs/projected".split()) == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"starts from {run}; projection: of the head there; made anew: head.weight" in out

    longer = f"train --initial {run} --recipe supervised {batches} {TINY}"
    assert main(longer.split()) == 0
    assert f"starts from {run}; made anew: nothing" in capsys.readouterr().out
    assert load_config(Path("runs/folder-supervised-2/config.toml")).model.head == "cosine"

    assert main(f"{second} --head cosine --out runs/cosine".split()) == 0
    assert "made anew: head.weight, head.scale" in capsys.readouterr().out
    cosine = load_config(Path("runs/cosine/config.toml")).model
    assert (cosine.head, cosine.initialisation) == ("cosine", "xavier")
    third = second.replace(str(run), "runs/folder-maml-1")  # whose own head was made of zeros
    assert main(f"{third} --head cosine --out runs/third".split()) == 0
    assert load_config(Path("runs/third/config.toml")).model == cosine

    shutil.rmtree(run)  # neither resuming nor scoring reads it again
    run = "runs/folder-maml-1"
    assert main(f"resume {run} --iterations 6".split()) == 0
    assert main(f"evaluate {run} --tasks 3".split()) == 0


def test_commands_to_go_on_with_can_be_typed(empty_folder, capsys):
    out = ["--out", "my runs/it's one"]
    assert main([*SINUSOID.split(), *out]) == 0
    assert main([*SINUSOID.split(), *out]) == 2
    shutil.copytree(out[1], "old copy")
    Path("old copy/evaluation-test-best-10-steps.json").unlink()
    assert main(["compare", "old copy", out[1]]) == 2
    printed = capsys.readouterr()
    commands = [
        shlex.split(line.partition(" fewstep ")[2])
        for line in printed.out.splitlines()
        if " fewstep " in line
    ]
    commands += [shlex.split(quoted) for quoted in re.findall("`fewstep (.*?)`", printed.err)]
    assert [words[:2] for words in commands] == [
        ["evaluate", out[1]], ["resume", out[1]], ["compare", out[1]],
        ["resume", out[1]], ["evaluate", "old copy"],
    ]  # fmt: skip


def test_scores_that_cannot_be_saved_are_printed(sinusoid_run, capsys):
    shutil.copytree(sinusoid_run, "copy")
    Path("copy/evaluation-test-last-10-steps-tasks-4.json").mkdir()
    assert main(["evaluate", "copy", "--checkpoint", "last", "--tasks", "4"]) == 2
    printed = capsys.readouterr()
    assert "test: loss" in printed.out
    assert "cannot write copy/evaluation-test-last" in printed.err
    assert printed.err.count("\n") == 1


def test_bars_on_a_terminal(empty_folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(SINUSOID.split()) == 0
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    for bar in ("training ━+ 0/4 ", "validation ━+ 0/3 ", "test ━+ 0/3 "):
        assert re.search(bar, out), bar


@pytest.mark.pictures
def test_images_of_your_own(empty_folder, capsys):
    assert main(train_on_images(empty_folder / "mine").split()) == 0
    assert "normalisation statistics: batch (transductive)" in capsys.readouterr().out
    run = Path("runs/folder-maml-1")
    assert main(f"evaluate {run} --tasks 3 --queries 3 --rotations classes".split()) == 0
    saved = json.loads(
        (run / "evaluation-test-best-10-steps-queries-3-rotations-classes.json").read_text()
    )
    assert saved["episodes"]["eval_queries"] == 3
    assert saved["episodes"]["eval_rotations"] == "classes"
    before = (run / "evaluation-test-best-10-steps.json").read_bytes()
    assert main(f"evaluate {run} --tasks 4".split()) == 0
    assert (run / "evaluation-test-best-10-steps.json").read_bytes() == before
    saved = json.loads((run / "evaluation-test-best-10-steps-tasks-4.json").read_text())
    assert saved["num_tasks"] == 4


@pytest.mark.parametrize(("split", "prefix"), [("train", ""), ("val", "eval_"), ("test", "eval_")])
def test_what_is_asked_of_tasks_is_for_those_of_the_split(split, prefix):
    run = ClassificationOptions()
    evaluate = Evaluate(Path("run"), split, shots=3, queries=7, rotations="classes")
    wanted = {"shots": 3, f"{prefix}queries": 7, f"{prefix}rotations": "classes"}
    assert evaluate._episodes(run) == replace(run, **wanted) != run


def test_views_of_images(empty_folder, sinusoid_run, capsys):
    command = train_on_images(empty_folder / "mine")
    scribble(Path("mine"))
    assert main(command.split()) == 0
    run = Path("runs/folder-maml-1")
    losses = []
    for views in ("mirrored", "turned"):
        assert main(f"evaluate {run} --tasks 3 --views {views}".split()) == 0
        file = run / f"evaluation-test-best-10-steps-views-{views}.json"
        assert f"; views {views}\nwrote {file}\n" in capsys.readouterr().out
        saved = json.loads(file.read_text())
        assert saved["views"] == views
        assert (saved["checkpoint"], saved["after"]) == ("best", [10])
        losses.append(saved["loss_curve"][-1])
    learner = load_learner(run, device="cpu")
    experiment = Experiment.build(load_config(run / "config.toml"))
    tasks = experiment.problem.episodes["test"].batch(0, 3)
    seen = [tasks.seen(lambda x, k=k: x.rot90(k, (-2, -1))) for k in range(4)]
    outputs = sum(learner.predict(each, 3, num_steps=10)[:, -1] for each in seen) / 4
    loss = F.cross_entropy(outputs.flatten(0, 1), tasks.y_query.flatten())
    assert losses[1] == pytest.approx(float(loss), rel=1e-5)
    assert losses[0] != losses[1]

    for flag in ("--views turned", "--rotations none", "--ways 3"):
        error = refused(capsys, f"evaluate {sinusoid_run} {flag}")
        assert f"{flag}: the tasks of {sinusoid_run} have no images; leave it out" in error


def test_a_run_is_at_home_in_any_folder(empty_folder, capsys, monkeypatch):
    assert main([*train_on_images(Path("mine")).split(), "--out", "run"]) == 0
    run = (empty_folder / "run").absolute()
    (empty_folder / "elsewhere").mkdir()
    monkeypatch.chdir(empty_folder / "elsewhere")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--tasks", "3"]) == 0
    assert f"next: fewstep compare {run}/evaluation-test-best-10-steps.json OTHER" in (
        capsys.readouterr().out.replace("\n", "")
    )
    assert main(["resume", str(run), "--iterations", "6"]) == 0


def test_settings_changed_since_the_run_began_are_refused(sinusoid_run, empty_folder, capsys):
    shutil.copytree(sinusoid_run, "run")
    config = Path("run/config.toml")
    config.write_text(re.sub("inner_lr = .*", "inner_lr = 0.5", config.read_text()))
    assert "run began with inner_lr=0.01, and " in refused(capsys, "evaluate run")
    with pytest.raises(InputError, match="began with inner_lr"):
        load_learner("run")


def test_a_run_whose_settings_leave_the_device_open_goes_on(sinusoid_run, empty_folder):
    shutil.copytree(sinusoid_run, "run")
    config = Path("run/config.toml")
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "auto"'))
    assert main(["resume", "run", "--iterations", "6"]) == 0
    assert 'device = "auto"' not in config.read_text()


def test_statistics_of_a_model_without_any_are_refused(sinusoid_run, capsys):
    told = refused(capsys, f"evaluate {sinusoid_run} --statistics running")
    assert "has no batch normalisation; leave it out" in told


def test_a_run_goes_on_with_data_that_have_moved(empty_folder, capsys):
    assert main([*train_on_images(Path("mine")).split(), "--out", "run"]) == 0
    config = Path("run/config.toml").read_text()
    Path("mine").rename("moved")
    for command in ("evaluate run --tasks 3", "resume run --iterations 6"):
        told = refused(capsys, command)
        assert f"there is no folder {empty_folder / 'mine'}; pass --root" in told
    assert main(["evaluate", "run", "--tasks", "3", "--root", "moved"]) == 0
    assert Path("run/config.toml").read_text() == config
    assert main(["resume", "run", "--iterations", "6", "--root", "moved"]) == 0
    assert load_config(Path("run/config.toml")).data.root == empty_folder / "moved"
    assert main(["evaluate", "run", "--tasks", "3"]) == 0


@pytest.mark.parametrize("command", ["evaluate", "resume"])
def test_a_root_of_data_without_files_is_refused(sinusoid_run, capsys, command):
    told = refused(capsys, f"{command} {sinusoid_run} --root mine")
    assert "root=mine: dataset='sinusoid' has no files; leave it out" in told


def test_a_run_that_came_without_its_metrics_goes_on(sinusoid_run, empty_folder, capsys):
    shutil.copytree(sinusoid_run, "run")
    Path("run/metrics.jsonl").unlink()
    assert main(["resume", "run"]) == 0
    out = capsys.readouterr().out
    assert "next: fewstep evaluate run" in out
    assert "learning curves" not in out
    assert "run has no validation in its metrics.jsonl" in refused(capsys, "plot run")


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fewstep.__version__}\n"


def test_every_part_of_maml_plus_plus(empty_folder, capsys):
    options = "--recipe maml++ --num-steps 2 --eval-steps 2 --keep-best 9 --out plus"
    assert main(f"{train_on_images(empty_folder / 'mine')} {options}".split()) == 0
    out = capsys.readouterr().out
    assert "normalisation statistics: running averages of each step" in out
    assert "test, ensemble of 2: accuracy" in out
    assert "--steps 10" not in out  # has no rates for them
    assert (
        main(
            [
                "evaluate",
                "plus",
                "--statistics",
                "support",
                "--checkpoint",
                "ensemble",
                "--tasks",
                "3",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "normalisation statistics: support set" in out
    assert re.search("checkpoint: ensemble, iterations (2, 4|4, 2); statistics support\n", out)
    assert Path("plus/evaluation-test-ensemble-2-steps-statistics-support.json").exists()
    write_images(Path("yours"), {"a": 1, "b": 1})
    for command in ("evaluate plus --steps 3 --tasks 3",
                    "predict plus --steps 3 --support yours --query yours/a"):  # fmt: skip
        error = refused(capsys, command)
        assert "num_steps=3 is more than the 2" in error
        assert "or give extra_steps='repeat' to repeat" in error
        assert main(f"{command} --extra-steps repeat".split()) == 0


def test_a_memory_budget_chooses_chunks_and_checkpoints(empty_folder, capsys):
    # First order until the third iteration: the budget must hold for the second order too.
    schedule = "--num-steps 3 --eval-steps 3 --first-order-epochs 2 --epoch-length 1"
    train = f"{train_on_images(empty_folder / 'images')} {schedule}"
    chosen = {}
    for budget in (100, 0.2):
        assert main(f"{train} --memory-budget {budget} --out run-{budget}".split()) == 0
        lines = capsys.readouterr().out.splitlines()
        (chosen[budget],) = (s.split(": ")[1] for s in lines if s.startswith("memory budget"))
    assert chosen == {
        100: "chunk_size=2, checkpoint_every=None",
        0.2: "chunk_size=1, checkpoint_every=1",
    }
    assert "memory budget of 0.001 MiB is below" in refused(capsys, f"{train} --memory-budget 1e-3")
    # Tests keep no graph, so that what the budget was for does not stop them.
    settings = Path("run-0.2/config.toml")
    settings.write_text(settings.read_text().replace("memory_budget = 0.2", "memory_budget = 1e-3"))
    assert main(["evaluate", "run-0.2", "--tasks", "3"]) == 0


@pytest.mark.pictures
def test_data_commands(empty_folder, capsys, monkeypatch):
    train_on_images(empty_folder / "mine")
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["data", "list"]) == 0
    lines = [line.removeprefix("next:").strip() for line in capsys.readouterr().out.splitlines()]
    for dataset in ("glyphs", "omniglot", "mini-imagenet", "folder --root FOLDER", "sinusoid"):
        assert f"fewstep train --dataset {dataset}" in lines
    assert main(f"data prepare --dataset folder --root {empty_folder}/mine --size 16".split()) == 0
    options = "--size 16 --shots 2 --queries 2 --count 2"
    assert main(f"data show --dataset folder --root mine {options}".split()) == 0
    assert _size("episodes.png") > (100, 100)
    assert main(["data", "verify"]) == 0
    assert ": as prepared" in capsys.readouterr().out


def test_what_comes_next_can_be_pasted(empty_folder, capsys):
    """Each command names the data, and the episodes, of the one before."""
    write_images(Path("my images"), {f"c{i:02d}": 6 for i in range(24)})
    fractions = "--fractions 0.4 0.3 0.3"
    words = ["--root", "my images", "--size", "16", "--colour", "grey", *fractions.split()]

    def after(command: list[str]) -> str:
        assert main(command) == 0
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("next: ")]
        return line.removeprefix("next: fewstep ")

    options = f"--dataset folder --root 'my images' --size 16 --colour grey {fractions}"
    show = after(["data", "prepare", "--dataset", "folder", *words])
    assert show == f"data show {options}"
    train = after([*shlex.split(show), "--shots", "2", "--queries", "4", "--eval-queries", "3"])
    assert train == f"train {options} --shots 2 --queries 4 --eval-queries 3"
    assert main([*shlex.split(train), *TINY.split(), "--filters", "4"]) == 0


def test_an_episode_is_shown_as_it_is_trained_on():
    shown = DataShow.default(["--dataset", "omniglot"])
    assert shown.episodes == preset("omniglot").episodes
    assert _command("train", shown) == "fewstep train --dataset omniglot"
    usual = replace(shown, episodes=ClassificationOptions())
    assert "--queries 5 --rotations none --eval-rotations none" in _command("train", usual)


def test_what_comes_after_an_episode_of_more_ways_can_be_trained(empty_folder, capsys):
    assert main(["data", "show", "--train-ways", "7"]) == 0
    _, _, command = capsys.readouterr().out.strip().rpartition("next: fewstep train ")
    words = shlex.split(command)
    default = Train.default(words)
    config = parse(Train, words, prog="fewstep train", default=default).settings
    assert (config.episodes.train_ways, config.recipe) == (7, "prototypes")


@pytest.mark.pictures
@pytest.mark.parametrize("recipe", ["maml++", "alpha-maml"])
def test_other_recipes_on_sinusoids(empty_folder, capsys, recipe):
    """Fits are drawn for the steps that there are rates for."""
    assert main(f"{SINUSOID} --recipe {recipe} --tasks 25".split()) == 0
    assert "next: fewstep evaluate" in capsys.readouterr().out
    assert _size(f"runs/sinusoid-{recipe}-1/fits.png") > (400, 200)


STOPPING = "stopping after this iteration or validation; another Ctrl-C stops at once\n"


@pytest.mark.usefixtures("signals_heard")
def test_an_interrupt_in_the_last_validation_is_heard(empty_folder, capsys, monkeypatch):
    usual, answered = MetaLearner.evaluate, []

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            if (answer := capsys.readouterr().out).endswith(STOPPING):  # before the validation ends
                answered.append(answer)
                break
            time.sleep(0.01)
        return usual(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MetaLearner, "evaluate", interrupted)
        assert main([*SINUSOID.split(), "--val-every", "4"]) == 0
    assert len(answered) == 1
    out = capsys.readouterr().out
    assert "iteration 4: validation" in out
    assert "stopped after iteration 4; the checkpoint is written\nnext: fewstep resume" in out
    assert main(["resume", "runs/sinusoid-maml-1"]) == 0
    assert "test: loss" in capsys.readouterr().out


@pytest.mark.usefixtures("signals_heard")
def test_a_second_interrupt_says_how_to_go_on(empty_folder, capsys, monkeypatch):
    def interrupted_twice(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetaLearner, "evaluate", interrupted_twice)
    assert main(SINUSOID.split()) == 130
    printed = capsys.readouterr()
    assert printed.out.endswith(f"{STOPPING}next: fewstep resume runs/sinusoid-maml-1\n")
    assert printed.err == "fewstep: interrupted\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: fewstep" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", sorted(SOURCES.keys() - {"sinusoid"}))
@pytest.mark.parametrize("command", ["train", "data prepare", "data show"])
def test_every_data_set_has_help(command, dataset, capsys):
    test_every_command_has_help(f"{command} --dataset {dataset}", capsys)


def test_help_fills_the_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    # The docstring has a line break there.
    assert "the same numbers, sooner." in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["data"], ["reproduce", "-h"]])
def test_help_names_every_command(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.skipif(
    platform.system() != "Linux" or "AVX" not in torch.backends.cpu.get_cpu_capability(),
    reason="no kernels for this machine",
)
def test_a_warning_is_one_line():
    code = (
        "from fewstep.cli.main import main; main(['--help'])\n"
        "from fewstep.models import kernels; kernels.library()\n"
        "import warnings; warnings.warn('of another')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CXX": "nope"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    ours, other, *_ = result.stderr.splitlines()
    assert ours.startswith("fewstep: there is no C++ compiler called nope, so")
    assert other.endswith("UserWarning: of another")


def test_a_run_does_not_start_with_pictures():
    code = "import sys, fewstep.cli.main; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_terminal_without_unicode(empty_folder, monkeypatch):
    """The ± of a score is no reason to stop a training."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(SINUSOID.split()) == 0
    sys.stdout.flush()
    assert b"test: loss" in printed.getvalue()


def test_a_reader_that_leaves_early_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "fewstep", "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_loaded_learner_scores_as_the_run_did(empty_folder):
    assert main(train_on_images(empty_folder / "mine").split()) == 0
    run = RunFolder.open(Path("runs/folder-maml-1"))
    experiment = Experiment.build(load_config(run.path / "config.toml"))
    saved = json.loads((run.path / "evaluation-test-best-10-steps.json").read_text())
    learner = load_learner(run.path, device="cpu")
    scores = learner.evaluate(experiment.problem.episodes["test"], 3, num_steps=10)
    assert scores.as_dict()["loss_curve"] == pytest.approx(saved["loss_curve"])
    assert int(load_learner(run.path, checkpoint="last", device="cpu").iteration) == 4


def test_the_table_of_an_ensemble_names_the_step_it_scored(capsys):
    metric = torch.tensor([[0.25], [0.75]])
    console = Console(width=80)
    console.print(
        score_table(Scores("accuracy", metric, metric, "batch (transductive)", after=(3,)))
    )
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "50.00%" in line]
    step, value = (column.strip() for column in row.strip("│").split("│"))
    assert step == "3"
    assert value == "50.00% ± 317.66"  # 12.7062 * 50 / sqrt(2) / sqrt(2), of two tasks
