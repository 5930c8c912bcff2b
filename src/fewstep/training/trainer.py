"""Meta-training: iterations, validation, checkpoints, resumption."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from types import FrameType

import torch
from rich.console import Console

from fewstep.core.metrics import Metrics
from fewstep.core.scores import Scores
from fewstep.core.tensors import Tensors
from fewstep.training.build import Experiment
from fewstep.training.classes_file import check_classes, note_classes
from fewstep.training.config import to_dict
from fewstep.training.display import Display
from fewstep.training.metrics_file import Log, NoLog
from fewstep.training.run_folder import RunFolder, State

# A closed terminal hangs up; not every system has that signal.
_STOPS = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]
_STOPPING = "stopping after this iteration or validation; another Ctrl-C stops at once"


class TrainingStopped(RuntimeError):
    """Training cannot go on; what was saved is intact."""


@dataclass(frozen=True)
class Trainer:
    """Trains a learner and keeps its run folder.

    Iteration t trains on the episodes (t - 1) * tasks, ..., t * tasks - 1. Nothing else but the
    checkpoint's tensors carries over from one iteration to the next, so a resumed run is the
    uninterrupted run. Of several processes, each trains and the first keeps the folder.

    Args:
        experiment: Settings, episodes and learner, as built.
        run: Where to write; None in all processes but the first.
        console: Where to print.
    """

    experiment: Experiment
    run: RunFolder | None
    console: Console

    def train(self) -> tuple[State, bool]:
        """Train from the last checkpoint, or from the start, to the last iteration.

        Returns:
            Where the run stands, and whether it is done: not where it was interrupted.

        Raises:
            TrainingStopped: a loss was not finite.
            InputError: the disk is full, or a line of metrics.jsonl is damaged.
        """
        state, is_stopped = self._restore(), False
        config, ranks = self.experiment.config, self.experiment.learner.ranks
        if self.run is not None and state.iteration < config.iterations:
            check_classes(self.run.path, self.experiment.problem.classes)
            note_classes(self.run.path, self.experiment.problem.classes)
            self.run.note_start(state.iteration, to_dict(config))
        display = Display(self.console, config.iterations, state.iteration, config.tasks)
        with self._log(state) as log, display.shown(), _stop_signals(display) as stop:
            unread = _Unread()
            for iteration in range(state.iteration + 1, config.iterations + 1):
                unread.add(
                    iteration,
                    self._iterate(iteration),
                    self.experiment.learner.hypergradient_rates(),
                )
                validates = iteration % config.val_every == 0 or iteration == config.iterations
                # All processes pause alike: one that raises alone leaves the others waiting.
                if not (validates or ranks.any(bool(stop) or unread.is_due())):
                    continue
                self._read(unread, log, display)
                is_stopped = ranks.any(bool(stop))
                if validates:
                    state = self._validate(iteration, state, log, display)
                    unread = _Unread()
                    is_stopped = ranks.any(bool(stop))
                elif is_stopped:
                    log.sync()
                    state = self._checkpoint(iteration, state, None)
                if is_stopped:
                    break
        return state, state.iteration == config.iterations and not is_stopped

    def _log(self, state: State) -> NoLog:
        if self.run is None:
            return NoLog()
        return Log(self.run.metrics_file, self.run.tensorboard, state.iteration)

    def _restore(self) -> State:
        learner = self.experiment.learner
        state, tensors = None, None
        if self.run is not None and (state := self.run.state()) is not None:
            tensors = self.run.load_checkpoint(state.last)
        state, tensors = learner.ranks.broadcast((state, tensors))
        if state is None or tensors is None:
            return self._checkpoint(0, None, None)
        learner.load_state_tensors(tensors)
        return state

    def _iterate(self, iteration: int) -> Metrics:
        config = self.experiment.config
        episodes = self.experiment.problem.episodes["train"]
        batch = episodes.batch((iteration - 1) * config.tasks, config.tasks)
        learner = self.experiment.learner
        return learner.step(batch, check_finite=False)  # which would wait for the device

    def _read(self, unread: _Unread, log: NoLog, display: Display) -> None:
        """Wait for the iterations not yet read, check them and report them."""
        for iteration, metrics, numbers, seconds in unread.take():
            try:
                if not numbers.pop("is_finite"):
                    metrics.check_finite()
            except FloatingPointError as error:
                kept = "the last checkpoint is kept"
                if self.run is not None and (state := self.run.state()) is not None:
                    kept = (
                        f"the checkpoint of iteration {state.iteration} is kept in {self.run.path}"
                    )
                raise TrainingStopped(
                    f"iteration {iteration}: {error}; {kept}; lower --inner-lr or --outer-lr, or "
                    "give --inner-clip-norm"
                ) from error
            log.write(iteration, numbers | {"seconds": round(seconds, 6)})
            name = metrics.metric_name
            display.advance(name, numbers["loss"], numbers[name], seconds)

    def _validate(self, iteration: int, state: State, log: NoLog, display: Display) -> State:
        config, learner = self.experiment.config, self.experiment.current()
        episodes = self.experiment.problem.episodes["val"]
        with display.validation(episodes, learner.ranks.count(config.val_tasks)) as counted:
            scores = learner.evaluate(
                counted,
                config.val_tasks,
                num_steps=config.algorithm.eval_steps,
                every_step=False,
            )
        name = scores.metric_name
        log.write(
            iteration,
            {
                f"val_{name}": scores.mean,
                "val_ci95": scores.ci95,
                "val_loss": float(scores.loss[:, -1].double().mean()),
                "val_tasks": scores.num_tasks,
            },
        )
        log.sync()
        state = self._checkpoint(iteration, state, scores)  # first: nobody may read any more
        display.print(f"iteration {iteration}: validation {scores}")
        return state

    def _checkpoint(self, iteration: int, state: State | None, scores: Scores | None) -> State:
        if self.run is None:
            return State(iteration, "", ())
        return self.run.save_checkpoint(
            self.experiment.learner.state_tensors(),
            state,
            iteration,
            None if scores is None else scores.rank,
            keep_best=self.experiment.config.keep_best,
        )


class _Unread:
    """Iterations whose numbers nobody waited for, so that a GPU need not wait for the host."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._rows: list[tuple[int, Metrics, Tensors]] = []  # iteration, metrics, what to log

    def add(self, iteration: int, metrics: Metrics, rates: Tensors) -> None:
        """Note an iteration."""
        numbers = {
            "is_finite": metrics.is_finite,
            "loss": metrics.loss,
            metrics.metric_name: metrics.metric,
            "gradient_norm": metrics.gradient_norm,
        }
        self._rows.append((iteration, metrics, numbers | rates))

    def is_due(self) -> bool:
        """Whether to read: twice a second, for the eye."""
        return time.perf_counter() - self._started > 0.5

    def take(self) -> Iterator[tuple[int, Metrics, dict[str, float], float]]:
        """Yield each with its numbers and the seconds it took, their mean, and forget them."""
        rows, self._rows = self._rows, []
        tensors = [t.double() for *_, numbers in rows for t in numbers.values()]
        read = iter(torch.stack(tensors).tolist())  # waits for all, once
        now = time.perf_counter()
        seconds, self._started = (now - self._started) / len(rows), now
        for iteration, metrics, numbers in rows:
            yield iteration, metrics, {name: next(read) for name in numbers}, seconds


@contextmanager
def _stop_signals(display: Display) -> Iterator[list[int]]:
    """Turn an interrupt or termination into a wish to stop after this iteration, and say so.

    A second Ctrl-C interrupts at once. A second SIGTERM does not: where the whole group is told,
    a worker hears it again from its parent. What was ignored stays so: SIGINT in workers, SIGHUP
    under nohup.
    """
    received: list[int] = []
    answer = Thread(target=display.print, args=(_STOPPING,), daemon=True)

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if len(received) == 1:  # the next one may come while this one is answered
            answer.start()  # this thread may be printing, and hold the locks that the answer needs

    heard = [s for s in _STOPS if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, note) for s in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if answer.is_alive():
            answer.join()
