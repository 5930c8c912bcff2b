"""Images of one's own, named by a run's model."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli.main import main
from fewstep.data.folder import ImageFolder
from fewstep.training.classifier import FewShotClassifier
from fewstep.training.load import load_learner
from fewstep.training.parse import load_config
from tests.cli.conftest import TINY, refused, scribble, train_on_images
from tests.data.conftest import deny, write_images

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose images are gone."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(folder / "cache"))
        assert main([*train_on_images(folder / "mine").split(), "--out", str(folder / "run")]) == 0
    shutil.rmtree(folder / "mine")
    shutil.rmtree(folder / "cache")
    return folder / "run"


def _own_classes(root: Path) -> str:
    """Two classes to learn from, and three other images."""
    write_images(root / "support", {"dark": 2, "[light]": 1})
    write_images(root / "query", {"what": 3})
    return f"--support {root / 'support'} --query {root / 'query' / 'what'} --device cpu"


def _named(out: str) -> dict[str, tuple[str, str]]:
    """Return class and probability of each image in a printed table."""
    lines = [line.split("│") for line in out.splitlines() if ".png" in line]
    return {cells[1].strip(): (cells[2].strip(), cells[3].strip()) for cells in lines}


def test_predict_without_the_data(run, empty_folder, capsys):
    options = _own_classes(empty_folder)
    assert main(f"predict {run} {options}".split()) == 0
    out = capsys.readouterr().out
    about = (
        "2 classes, 3 images to learn from; 10 inner steps; normalisation statistics: support set"
    )
    assert about in out.splitlines()
    found = _named(out)

    learner = load_learner(run, device="cpu")
    data = ImageFolder(size=16)

    def images(*folders: str) -> torch.Tensor:
        files = [file for f in folders for file in sorted((empty_folder / f).iterdir())]
        read = [data.pixels(file.read_bytes(), file.name) for file in files]
        return torch.tensor(np.stack(read)) / 255

    module = learner.adapt(
        images("support/[light]", "support/dark"),
        torch.tensor([0, 1, 1]),
        num_steps=10,
        statistics="support",
    )
    shares = module(images("query/what")).softmax(-1)
    names = [("[light]", "dark")[int(row.argmax())] for row in shares]
    expected = [(name, f"{row.max():.1%}") for name, row in zip(names, shares, strict=True)]
    assert found == dict(zip(("000.png", "001.png", "002.png"), expected, strict=True))

    one = options.replace("query/what", "query/what/001.png")
    assert main(f"predict {run} {one}".split()) == 0
    out = capsys.readouterr().out
    assert out.count(".png") == 1
    assert _named(out)["001.png"] == found["001.png"]  # whatever there is beside it

    assert main(f"predict {run} {one} --statistics batch".split()) == 0
    out = capsys.readouterr().out
    assert "normalisation statistics: batch (transductive)" in out


def test_predict_cuts_no_name(run, empty_folder, capsys, monkeypatch):
    names = ["n" * 99 + end for end in "01"]
    write_images(empty_folder / "support", dict.fromkeys(names, 1))
    write_images(empty_folder / "query", {names[0]: 1})
    (empty_folder / "query" / names[0] / "000.png").rename(empty_folder / f"{'i' * 99}.png")
    monkeypatch.setenv("COLUMNS", "60")
    options = f"--support support --query {'i' * 99}.png --device cpu"
    assert main(f"predict {run} {options}".split()) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    image, name = ("".join(cells[i].strip() for cells in lines) for i in (1, 2))
    assert image == f"{'i' * 99}.png"
    assert name in names

    monkeypatch.delenv("COLUMNS")  # in a pipe it is not folded either
    assert main(f"predict {run} {options}".split()) == 0
    assert _named(capsys.readouterr().out)[image][0] == name


def test_the_probability_of_every_class_is_written(run, empty_folder, capsys):
    options = _own_classes(empty_folder)
    query = empty_folder / "query" / "what"
    (query / "000.png").rename(query / "a, b.png")
    for _ in range(2):  # a file that is there is replaced, as others' are
        assert main(f"predict {run} {options} --out found.csv".split()) == 0
    out = capsys.readouterr().out
    assert out.endswith("wrote found.csv\n")
    with Path("found.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "class", "[light]", "dark"]
    shares = FewShotClassifier(run, device="cpu").fit(
        sorted(Path("support").rglob("*.png")), ["[light]", "dark", "dark"]
    ).predict_proba([query / row[0] for row in rows])  # fmt: skip
    assert np.array_equal(np.array([row[2:] for row in rows], np.float32), shares)  # whole
    assert [row[1] for row in rows] == [header[2 + c] for c in shares.argmax(1)]
    assert {row[0]: row[1] for row in rows} == {k: v for k, (v, _) in _named(out).items()}

    assert "f.txt must end in .csv" in refused(capsys, f"predict {run} {options} --out f.txt")
    missing = refused(capsys, f"predict {run} {options} --out none/f.csv")
    assert "there is no folder none for f.csv; make it first" in missing


def test_a_name_that_is_not_unicode_is_written_as_it_is(run, empty_folder):
    options = _own_classes(empty_folder)
    query = empty_folder / "query" / "what"
    (query / "000.png").rename(query / os.fsdecode(b"caf\xe9.png"))
    assert main(f"predict {run} {options} --out found.csv".split()) == 0
    assert b"\ncaf\xe9.png," in Path("found.csv").read_bytes()


def test_predict_takes_the_mean_over_views(run, empty_folder, capsys):
    options = _own_classes(empty_folder)
    scribble(empty_folder)
    assert main(f"predict {run} {options} --views mirrored".split()) == 0
    found = _named(capsys.readouterr().out)
    learner = load_learner(run, device="cpu")
    x_support, x_query = (
        torch.stack([
            torch.tensor(np.array(Image.open(file)))[None].repeat(3, 1, 1) / 255
            for file in sorted(Path(folder).rglob("*.png"))
        ])
        for folder in ("support", "query")
    )  # fmt: skip
    y_support = torch.tensor([0, 1, 1])  # [light], dark, dark
    outputs = sum(
        learner.adapt(view(x_support), y_support, num_steps=10, statistics="support")(view(x_query))
        for view in (torch.clone, lambda x: x.flip(-1))
    )
    shares = (outputs / 2).softmax(-1)
    assert [share for _, share in found.values()] == [f"{row.max():.1%}" for row in shares]
    assert main(f"predict {run} {options}".split()) == 0
    assert _named(capsys.readouterr().out) != found


def test_predict_refuses_what_it_cannot_read(run, sinusoid_run, empty_folder, capsys, monkeypatch):
    options = _own_classes(empty_folder)
    assert "needs images" in refused(capsys, f"predict {sinusoid_run} {options}")
    missing = options.replace("/what", "/where")
    assert "no image or folder" in refused(capsys, f"predict {run} {missing}")
    for locked in ("support", "query/what", "support/dark/001.png"):
        with monkeypatch.context() as patch:
            deny(patch, empty_folder / locked)
            error = refused(capsys, f"predict {run} {options}")
            assert f"cannot read {empty_folder / locked}: Permission denied" in error
    shutil.copytree(empty_folder / "support" / "dark", empty_folder / "support" / "third")
    assert "3 classes are too many" in refused(capsys, f"predict {run} {options}")
    assert "were learned for 2 classes" in refused(capsys, f"evaluate {run} --ways 3")
    shutil.rmtree(empty_folder / "support" / "dark")
    shutil.rmtree(empty_folder / "support" / "[light]")
    assert "1 class leaves nothing" in refused(capsys, f"predict {run} {options}")


def test_models_that_start_from_prototypes_take_any_number_of_classes(empty_folder, capsys):
    command = f"{train_on_images(empty_folder / 'mine')} --recipe proto-maml --out run"
    assert main([*command.split(), "--learned-rates", "tensor", "--eval-steps", "5"]) == 0
    capsys.readouterr()
    one = f"train --config run/config.toml --learned-rates element --out element {TINY}"
    assert main(one.split()) == 0
    assert "were learned for 2 classes" in refused(capsys, "evaluate element --ways 3")
    own, names = empty_folder / "support", ("a", "b", "c")
    for name in names:
        shutil.copytree(empty_folder / "mine" / f"c0{names.index(name)}", own / name)
    yours = f"--support {own} --query {own / 'b'} --device cpu"
    assert "3 classes are too many" in refused(capsys, f"predict element {yours}")
    assert main(f"predict run {yours}".split()) == 0
    out = capsys.readouterr().out
    assert "3 classes, 18 images to learn from" in out
    assert {name for name, _ in _named(out).values()} <= set(names)

    run = load_config(Path("run") / "config.toml")
    learner = load_learner("run", device="cpu")
    optimiser = learner.state_tensors().keys() - learner.module.state_dict().keys()
    assert any(name.startswith("optimiser.head.") for name in optimiser)  # whole as it is
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    load_learner("run", device="cpu")
    assert torch.rand(()) == expected  # a caller's numbers are left alone
    few, many = (load_learner("run", device="cpu", ways=ways) for ways in (2, 3))
    assert many.module.head.out_features == 3
    for name, tensor in few.parameters.items():
        if not name.startswith("head."):
            assert torch.equal(tensor, many.parameters[name])
    x = torch.rand(3, *run.data.image_shape)
    module = many.adapt(x, torch.arange(3), num_steps=0)
    f = many.module.blocks(x).detach()
    torch.testing.assert_close(module.head.weight, 2 * (f - f.mean(0)))

    for command in ("--ways 4 --tasks 3", "--ways 4 --tasks 3 --checkpoint ensemble"):
        assert main(f"evaluate run {command} --device cpu".split()) == 0
    file = json.loads(Path("run/evaluation-test-best-5-steps-ways-4.json").read_text())
    assert file["episodes"]["ways"] == 4
    assert "ways 4" in capsys.readouterr().out


def test_predict_counts_images_as_a_data_set_does(run, empty_folder, capsys):
    """Deeper ones belong to their class, and a folder without any is none."""
    options = _own_classes(empty_folder)
    support = empty_folder / "support"
    count = len(list(support.rglob("*.png")))
    shutil.copytree(support / "dark", support / "dark" / "deeper")
    (support / "__MACOSX").mkdir()
    (support / "vectors").mkdir()
    (support / "vectors" / "1.svg").touch()
    with (
        pytest.warns(UserWarning, match=r"of a class are left out, 1 in all, such as .*1.svg"),
        pytest.warns(UserWarning, match=r"without an image .* 1 in all, such as .*vectors; save"),
    ):
        assert main(f"predict {run} {options}".split()) == 0
    more = len(list((support / "dark" / "deeper").iterdir()))
    assert f"{count + more} images to learn from" in capsys.readouterr().out


def test_images_at_any_depth_are_named(run, empty_folder, capsys):
    options = _own_classes(empty_folder)
    deeper = empty_folder / "query" / "what" / "more"
    deeper.mkdir()
    shutil.copy(empty_folder / "query" / "what" / "000.png", deeper / "003.png")
    assert main(f"predict {run} {options}".split()) == 0
    found = _named(capsys.readouterr().out)
    assert list(found) == ["000.png", "001.png", "002.png", "more/003.png"]
    assert found["more/003.png"] == found["000.png"]


def test_a_support_folder_without_classes_says_what_it_should_hold(run, empty_folder, capsys):
    options = _own_classes(empty_folder)
    flat = options.replace(f"--support {empty_folder / 'support'}", "--support query/what")
    message = refused(capsys, f"predict {run} {flat}")
    assert (
        "query/what has no folder of images for each class; put the images into CLASS/I" in message
    )


def test_files_that_are_left_out_are_told(run, empty_folder, capsys):
    options = _own_classes(empty_folder)
    query, support = empty_folder / "query" / "what", empty_folder / "support"
    (query / "notes.txt").touch()
    (query / ".hidden").touch()
    expected = r"no images are left out, 1 in all, such as .*what/notes.txt; save images of"
    with pytest.warns(UserWarning, match=expected):
        assert main(f"predict {run} {options}".split()) == 0
    assert len(_named(capsys.readouterr().out)) == 3
    (query / "notes.txt").unlink()
    shutil.copy(query / "000.png", support / "beside.png")
    (support / "dark" / "one.svg").touch()
    expected = (
        r"images of a class are left out, 2 in all, such as .*beside.png; put .* into CLASS/I"
    )
    with pytest.warns(UserWarning, match=expected):
        assert main(f"predict {run} {options}".split()) == 0
    assert "3 images to learn from" in capsys.readouterr().out
