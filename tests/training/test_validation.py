"""What validations and tests compute."""

from fewstep.cli.main import main
from fewstep.core import learner
from fewstep.core import testing as core_testing


def test_validations_score_the_last_step_alone_and_the_test_every_step(tmp_path, monkeypatch):
    scored = []

    def noted(loop, episodes, numbers, query_after, **options):
        scored.append(tuple(query_after))
        return core_testing.test(loop, episodes, numbers, query_after, **options)

    monkeypatch.setattr(learner, "test", noted)
    options = ["train", "--dataset", "sinusoid", "--iterations", "2", "--val-every", "1",
               "--val-tasks", "2", "--test-tasks", "2", "--keep-best", "1",
               "--eval-steps", "3"]  # fmt: skip
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    assert scored == [(3,), (3,), (0, 1, 2, 3)]
