"""Which checkpoints a run keeps."""

import math

import pytest
import torch

from fewstep.training.run_folder import RunFolder

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
    for ranks in ([None], [None, None], [None, None, None]):
        assert [kept.iteration for kept in _saved(run, ranks, 2).best] == [len(ranks) - 1]
    assert [kept.iteration for kept in _saved(run, [None, None, 0.1, None], 2).best] == [2]
    assert [kept.iteration for kept in _saved(run, [None, math.nan, 0.1], 1).best] == [2]
