"""Which checkpoints a run keeps."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fewstep import InputError
from fewstep.training.config import to_dict
from fewstep.training.initial import read_initial
from fewstep.training.load import load_learner
from fewstep.training.metrics_file import Log, read_metrics
from fewstep.training.presets import preset
from fewstep.training.run_folder import RunFolder, write_json

RANKS = [None, 0.3, 0.7, None, 0.5, 0.7, 0.6, 0.2]


def _saved(run: RunFolder, ranks: list[float | None], keep_best: int):
    state = None
    for iteration, rank in enumerate(ranks):
        tensors = {"iteration": torch.tensor(iteration)}
        state = run.save_checkpoint(tensors, state, iteration, rank, keep_best=keep_best)
    return state


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("keep_best", "best"), [(1, [2]), (2, [2, 5]), (3, [2, 5, 6]), (9, [2, 5, 6, 4, 1, 7])]
)
def test_the_best_are_kept_and_of_equals_the_earlier(run, keep_best, best):
    state = _saved(run, RANKS, keep_best)
    assert run.state() == state
    assert [kept.iteration for kept in state.best] == best
    files = {file.name for file in (run.path / "checkpoints").iterdir()}
    assert files == {kept.name for kept in state.best} | {state.last}
    for kept in state.best:
        assert run.load_checkpoint(kept.name)["iteration"] == kept.iteration


def test_the_newest_counts_until_a_score_does(run):
    state = _saved(run, [math.nan, math.inf], 2)
    assert run.state() == state
    assert [kept.iteration for kept in state.best] == [1]
    for ranks in ([None], [None, None], [None, None, None]):
        assert [kept.iteration for kept in _saved(run, ranks, 2).best] == [len(ranks) - 1]
    assert [kept.iteration for kept in _saved(run, [None, None, 0.1, None], 2).best] == [2]
    assert [kept.iteration for kept in _saved(run, [None, math.nan, 0.1], 1).best] == [2]


def test_json_has_null_for_what_is_not_finite(run):
    write_json(run.path / "a.json", {"a": [math.nan, (1.0, -math.inf)], "b": {"c": math.inf}})
    text = (run.path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [1.0, None]],
        "b": {"c": None},
    }


class FullWriter:
    """A writer of TensorBoard's whose thread has met a full disk."""

    def add_scalar(self, *_):
        raise OSError(28, "No space left on device")

    close = flush = add_scalar


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("full", "stand_in"),
    [
        ("_file", lambda: Path("/dev/full").open("a", buffering=1)),  # noqa: SIM115 (it is closed)
        ("_tensorboard", FullWriter),
    ],
)
def test_a_line_that_the_disk_has_no_room_for(tmp_path, full, stand_in):
    def write():
        with Log(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0) as log:
            log.write(1, {"loss": 1.0})
            getattr(log, full).close()
            setattr(log, full, stand_in())
            log.write(2, {"loss": 1.0})

    with pytest.raises(InputError, match="No space left on device; the last checkpoint is intact"):
        write()
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"iteration": 1, "loss": 1.0}


def test_a_run_that_goes_on_from_a_checkpoint_logs_what_came_after_once(tmp_path):
    path, events = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    for done, loss in ((0, 1.0), (3, 2.0)):
        with Log(path, events, done) as log:
            for iteration in range(done + 1, done + 4):
                log.write(iteration, {"loss": loss})
            if done == 0:  # killed after the checkpoint
                log.write(4, {"loss": loss})
                log.write(5, {"loss": loss})
    wanted = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert [(line["iteration"], line["loss"]) for line in read_metrics(path)] == wanted
    shown = EventAccumulator(str(events)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in shown] == wanted


def test_everyone_is_sent_to_the_checkpoint_that_came_along(tmp_path):
    """The folders of results/ hold a run in a folder of their own."""
    outer = RunFolder.create(tmp_path, to_dict(preset("glyphs")))
    inner = tmp_path / "run"
    inner.mkdir()
    RunFolder.create(inner, {}).save_checkpoint({}, None, 1, None)
    for ask in (outer.kept, lambda _: load_learner(tmp_path), lambda _: read_initial(tmp_path)):
        with pytest.raises(InputError, match=r"no checkpoint of its own; give .*run$"):
            ask("best")
