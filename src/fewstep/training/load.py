"""The model of a run, as trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Literal, get_args

from fewstep.core.algorithm import ExtraSteps
from fewstep.core.errors import InputError, check_name
from fewstep.core.judge import Loss
from fewstep.core.learner import MetaLearner
from fewstep.core.tensors import Tensors
from fewstep.training.build import build_learner, resolve_device
from fewstep.training.config import RunConfig, SinusoidData
from fewstep.training.episode_options import ClassificationOptions
from fewstep.training.head import fitting_head
from fewstep.training.same_settings import open_run

OneCheckpoint = Literal["best", "last"]


def load_learner(
    path: Path | str,
    *,
    checkpoint: OneCheckpoint = "best",
    device: str = "auto",
    extra_steps: ExtraSteps | None = None,
    ways: int | None = None,
) -> MetaLearner:
    """Return the learner of a run, ready to adapt to tasks of any source; needs no data.

    Args:
        path: Folder of the run.
        checkpoint: The best in validation, or the last.
        device: "cpu", "cuda", ...; "auto" takes a GPU where there is one.
        extra_steps: Refuse more steps than trained, or repeat the last, where parts differ by step;
            None takes the run's.
        ways: Classes to tell apart, as many as you like where tasks start from prototypes; None
            takes the run's.

    Raises:
        InputError: there is no run, no checkpoint, no such device, its settings have changed, it
            has learned no few-shot tasks, or none of so many classes, or `checkpoint` is neither.
    """
    return Saved.read(path, checkpoint, device, extra_steps).learner(ways)


@dataclass(frozen=True)
class Saved:
    """The settings of a run, and what a checkpoint of it holds."""

    config: RunConfig
    state: Tensors

    @classmethod
    def read(
        cls,
        path: Path | str,
        checkpoint: OneCheckpoint = "best",
        device: str = "auto",
        extra_steps: ExtraSteps | None = None,
    ) -> Saved:
        """Read a run; arguments and errors are those of `load_learner`."""
        check_name("checkpoint", checkpoint, get_args(OneCheckpoint))
        run, config = open_run(Path(path))
        if config.recipe == "supervised":
            raise InputError(
                f"{run.path} has learned to tell its training classes apart and no few-shot tasks; "
                f"start a run from it, with `fewstep train --initial {quote(str(run.path))}`"
            )
        config = config.with_extra_steps(extra_steps)
        [kept] = run.kept(checkpoint)
        device = resolve_device(device)
        return cls(replace(config, device=device), run.load_checkpoint(kept.name))

    def learner(self, ways: int | None = None, support_loss: Loss | None = None) -> MetaLearner:
        """Return the learner, for so many classes, with a support loss of its own if given.

        Raises:
            InputError: it has not learned to tell so many apart.
        """
        config = self.config.for_tests(ways)
        shape: tuple[int, ...] = (1,)
        outputs = 1
        if not isinstance(config.data, SinusoidData):
            assert isinstance(config.episodes, ClassificationOptions)
            shape, outputs = config.data.image_shape, config.episodes.ways
        learner = build_learner(config, shape, outputs, support_loss=support_loss)
        learner.load_state_tensors(fitting_head(learner, self.state))
        return learner
