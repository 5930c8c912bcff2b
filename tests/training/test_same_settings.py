"""A run goes on with the settings it began with."""

import json
from dataclasses import replace

import pytest

from fewstep.cli.main import main
from fewstep.core.errors import InputError
from fewstep.data.folder import ImageFolder
from fewstep.training.config import to_dict
from fewstep.training.parse import load_config
from fewstep.training.presets import preset
from fewstep.training.run_folder import RunFolder
from fewstep.training.same_settings import check_unchanged

SINUSOID = replace(preset("sinusoid"), device="cpu")


@pytest.fixture
def begin(tmp_path):
    """A function that sets up a run, begun in a command of before."""

    def begun(config):
        run = RunFolder.create(tmp_path, to_dict(config))
        run.note_start(0, to_dict(config))
        return run

    return begun


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        ("seed", "0", "1"), ("inner_lr", "0.01", "0.02"), ("tasks", "25", "3"),
        ("val_tasks", "200", "4"), ("recipe", "'maml'", "'meta-sgd'"),
    ],
)  # fmt: skip
def test_a_changed_setting_is_refused(begin, capsys, name, there, here):
    run = begin(SINUSOID)
    settings = (run.path / "config.toml").read_text().replace("'", '"')
    old, new = (f"\n{name} = {value}\n".replace("'", '"') for value in (there, here))
    changed = settings.replace(old, new)
    (run.path / "config.toml").write_text(changed)
    before = run.starts_file.read_bytes()
    assert main(["resume", str(run.path), "--iterations", "6"]) == 2
    error = capsys.readouterr().err
    file = run.path / "config.toml"
    assert f"{run.path} began with {name}={there}, and {file} now says {here}; put" in error
    assert f"put {there} back, or begin another run with `fewstep train --config {file}`" in error
    assert error.count("\n") == 1
    assert (file.read_text(), run.starts_file.read_bytes()) == (changed, before)


def test_more_iterations_other_ways_to_compute_and_data_elsewhere_are_not(begin, tmp_path):
    config = replace(preset("folder"), device="cpu", data=ImageFolder(tmp_path))
    run = begin(config)
    elsewhere = replace(config.data, root=tmp_path / "elsewhere")
    how = {"chunk_size": 1, "replay": False, "device": "cuda", "memory_budget": 10.0}
    check_unchanged(run, replace(config, iterations=9, data=elsewhere, **how))
    with pytest.raises(InputError, match=r"began with size=84, and .* now says 32; put 84 back"):
        check_unchanged(run, replace(config, data=replace(elsewhere, size=32)))


def test_the_first_settings_noted_count(begin):
    run = begin(SINUSOID)
    noted = json.loads(run.starts_file.read_text())
    settings = noted.pop("settings")
    run.starts_file.write_text(json.dumps(noted) + "\n")  # as of a version that noted none
    other = replace(SINUSOID, seed=1)
    check_unchanged(run, other)
    run.note_start(4, to_dict(other))
    check_unchanged(run, other)
    with pytest.raises(InputError, match="began with seed=1, and"):
        check_unchanged(run, SINUSOID)
    run.starts_file.unlink()
    check_unchanged(run, SINUSOID)
    del settings["val_tasks"]  # of a version that had no such setting
    run.note_start(0, settings)
    check_unchanged(run, SINUSOID)


@pytest.mark.parametrize("damage", ["garbage", "[1]", '{"settings": 5}', '{"settings": {"a": 1}}'])
def test_damaged_starts_are_named(begin, damage):
    run = begin(SINUSOID)
    run.starts_file.write_text(damage + "\n" + run.starts_file.read_text())
    with pytest.raises(InputError, match=r"starts.jsonl( is damaged; remove the line|: unknown k)"):
        check_unchanged(run, SINUSOID)


def test_what_train_notes_is_what_resume_reads(begin, tmp_path):
    config = replace(SINUSOID, initial=tmp_path / "file.safetensors", epoch_length=3)
    run = begin(config)
    assert load_config(run.path / "config.toml") == config
    check_unchanged(run, config)
    with pytest.raises(InputError, match=r"began with epoch_length=3, and .* now says None; put 3"):
        check_unchanged(run, replace(config, epoch_length=None))
