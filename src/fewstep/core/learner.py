"""The learner: one meta-gradient, one outer update, adaptation and evaluation for any module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fewstep.core.adapted_copy import adapted_copy
from fewstep.core.algorithm import Algorithm
from fewstep.core.errors import InputError, check_at_least, check_fits, check_name
from fewstep.core.evaluation import Reduce, adapt_and_query, losses_and_metrics, outputs_of
from fewstep.core.hypergradient import Hypergradient
from fewstep.core.inner import InnerLoop
from fewstep.core.judge import Judge, Loss
from fewstep.core.meta_gradient import meta_gradient
from fewstep.core.meta_parameters import MetaParameters
from fewstep.core.metrics import Metrics
from fewstep.core.network import TaskNetwork
from fewstep.core.norm import NormStatistics, Use
from fewstep.core.outer_loop import OuterLoop
from fewstep.core.precision import Precision
from fewstep.core.ranks import ALONE, Ranks
from fewstep.core.replay import Replay
from fewstep.core.scores import Scores
from fewstep.core.tasks import Episodes, TaskBatch, View, as_they_are, tasks_of
from fewstep.core.tensors import Tensors, below


class MetaLearner:
    """A module, an algorithm and a loss.

    phi are the module's own parameters, updated in place, and what the algorithm adds: what its
    parts learn ("inner_lr.*", "inner_start.*", "inner_step.*") and, in place of the module's own,
    parameters with a row for each step.
    Tasks count alike: the meta-loss is their mean, or their sum where the algorithm says so.

    Args:
        module: Any `nn.Module`; its frozen parameters stay as they are.
        algorithm: The list of parts, from a recipe such as `fewstep.maml`.
        loss: (outputs, targets) of one task to a scalar, usually a mean over the examples.
        metric: (outputs, targets) of one task to a scalar to report; None takes the accuracy where
            targets are integers and the loss elsewhere.
        support_loss: What the inner loop descends, another function of the same kind; None takes
            the loss. The parameters of an `nn.Module` are learned by the outer loop, as
            "support_loss.*", through the second derivative.
        chunk_size: Tasks that go through the module at once; bounds memory, changes no result.
        checkpoint_every: Inner steps whose graph is kept at once, in the second order; None keeps
            all. 1 makes memory nearly independent of their number and changes no result; 5 steps
            take about twice as long, 20 steps three times.
        vectorize: Use `torch.vmap` over the tasks of a chunk; else loop, for modules with
            operations that have no batching rule.
        ranks: The processes that share each batch, from `Ranks.of_torchrun()`. Each calls the same
            methods with the same tasks, and gets the same results.
        replay: Record the operations of a meta-gradient, and of a test of several chunks, once and
            replay them: the same numbers, sooner, as no Python is between them. What the module,
            the losses and the parts decide or read in Python, such as a number in an attribute, is
            decided and read once. Recording takes a second or two, and again where the
            shapes or the schedules change.
        compile: Hand the recording to `torch.compile`: several times faster for small networks, the
            same to rounding (checked), after compiling for some ten seconds and more with steps
            and layers; refused where that fails, as for `Conv4`.
        precision: Precision of matrix products and convolutions: "tf32" (10 bits, on GPUs that have
            it) or "bfloat16" (7 bits, by autocast, results too; also CPUs with AVX-512 BF16).
            Parameters, normalisation, losses and outer updates are float32 in each.

    Raises:
        InputError: `module` has nothing to train, is a wrapper or scripted, or has lazy or complex
            parameters; `algorithm.adapted` names no parameter of it; `support_loss` cannot be
            learned; `chunk_size` or `checkpoint_every` is below 1; `precision` is none of these; or
            `compile` comes without `replay`.

    Deviation: the papers' code sums where this takes means; see `maml` for the inner loss.
    """

    def __init__(
        self,
        module: nn.Module,
        algorithm: Algorithm,
        loss: Loss,
        *,
        metric: Loss | None = None,
        support_loss: Loss | None = None,
        chunk_size: int = 8,
        checkpoint_every: int | None = None,
        vectorize: bool = True,
        ranks: Ranks = ALONE,
        replay: bool = False,
        compile: bool = False,
        precision: Precision = "float32",
    ) -> None:
        check_at_least(1, "task", chunk_size=chunk_size)
        if not isinstance(algorithm, Algorithm):
            raise InputError(
                f"algorithm={algorithm!r} is not an Algorithm; call a recipe, such as "
                "fewstep.maml(), or make one"
            )
        check_name("precision", precision, get_args(Precision))
        if compile and not replay:
            raise InputError("compile=True compiles what replay=True records; pass that too")
        check_at_least(1, "step", checkpoint_every=checkpoint_every)
        self.chunk_size = chunk_size
        self.checkpoint_every = checkpoint_every
        self.ranks = ranks
        self._replay = Replay(compiled=compile) if replay else None
        self._test_replay = Replay(from_second=True) if replay else None
        self.iteration = 0
        judge = Judge(loss, metric, support_loss)
        judge.check_learnable(algorithm)
        self._network = TaskNetwork(module, judge, vectorize=vectorize, precision=precision)
        self._meta = MetaParameters(module, algorithm, judge.learned_loss)
        self.parameters = self._meta.parameters
        self._outer = OuterLoop(self._meta, algorithm)
        self._loop = InnerLoop(self._network, self._meta, algorithm)

    @property
    def module(self) -> nn.Module:
        """The module; another needs another learner, as do other parts."""
        return self._loop.network.module

    @property
    def algorithm(self) -> Algorithm:
        """The list of parts."""
        return self._loop.algorithm

    @property
    def optimiser(self) -> torch.optim.Optimizer:
        """The outer optimiser."""
        return self._outer.optimiser

    @property
    def buffers(self) -> Tensors:
        """The module's buffers, those of each step stacked, by name."""
        return self._meta.buffers

    @property
    def epoch(self) -> float:
        """How many epochs of training are done; every schedule reads it."""
        return self.iteration / self.algorithm.iterations_per_epoch

    def meta_gradient(self, batch: TaskBatch) -> tuple[Tensors, Metrics]:
        """Return the gradient of the meta-loss, by parameter name, and what it saw.

        meta-loss = mean (or sum) over tasks of sum_k v[k] * L_query(theta[k])

        Changes neither parameters nor buffers.
        """
        gradients, metrics, _ = self._differentiate(batch)
        return gradients, metrics

    def step(self, batch: TaskBatch, *, check_finite: bool = True) -> Metrics:
        """Do one iteration: the meta-gradient, then the outer update of phi and of the buffers.

        Running statistics of batch normalisation become the mean over tasks of those each task
        arrives at, so that the order of the tasks cannot matter.

        Args:
            batch: The tasks.
            check_finite: Wait for the numbers and check them before the update; without it nothing
                waits for the device, and `Metrics.check_finite` is the caller's to call.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; phi is left as it was.
            InputError: the module's parameters are no longer those that the learner was made with.
        """
        gradients, metrics, buffers = self._differentiate(batch)
        if check_finite:
            metrics.check_finite()
        self._meta.check_buffers(buffers)
        self._outer.step(gradients, self.epoch)
        with torch.no_grad():
            for name, buffer in self.buffers.items():
                buffer.copy_(buffers[name])
        self.iteration += 1
        return metrics

    def update(self, gradients: Tensors) -> None:
        """Do one iteration by a gradient of the caller's: sums of several, or weighted by task.

        phi <- outer(phi, gradients)

        Buffers, such as running statistics, stay as they are.

        Args:
            gradients: By parameter name, as `meta_gradient` returns them.

        Raises:
            FloatingPointError: one is not finite; phi is left as it was.
            InputError: a parameter's is missing, of another shape, or of no parameter.
        """
        self._meta.known.check_unchanged()
        check_fits("update got", gradients, self.parameters)
        if not get_total_norm(gradients.values()).isfinite():
            raise FloatingPointError("the norm of the gradients given to update is not finite")
        own = {n: g.detach().to(self.parameters[n], copy=True) for n, g in gradients.items()}
        self._outer.step(own, self.epoch)
        self.iteration += 1

    def hypergradient_rates(self) -> Tensors:
        """Return the rates that follow hypergradients, and these, as scalars by name."""
        found: Tensors = {}
        for name, h in self._meta.hypergradients.items():
            suffix = "" if name == "all" else f".{name}"
            found[f"inner_lr{suffix}"] = self._meta.rates[name].detach().mean()
            found[f"inner_lr{suffix}_hypergradient"] = h.sum()
        if isinstance(self.optimiser, Hypergradient) and self.iteration > 0:
            found |= self.optimiser.rates()
        return found

    def adapt(
        self,
        x_support: Tensor,
        y_support: Tensor,
        *,
        num_steps: int | None = None,
        statistics: Use | None = None,
    ) -> nn.Module:
        """Return a copy of the module adapted to one task, ready to be called.

        It is in evaluation mode. Batch normalisation does as in training: by batch statistics, it
        uses those of each batch it is given; else those of the support set, or the running ones.
        What it rounds products to is PyTorch's choice: on a GPU, TF32 in convolutions.

        Args:
            x_support: Inputs, (examples, ...), without a task dimension.
            y_support: Targets, (examples, ...).
            num_steps: Inner steps; None takes the algorithm's.
            statistics: What batch normalisation normalises by; None takes the algorithm's.
        """
        use = self._norm_statistics(statistics).use
        return adapted_copy(self._loop, x_support, y_support, self._steps(num_steps), use)

    def evaluate(
        self,
        episodes: Episodes,
        num_tasks: int = 600,
        *,
        num_steps: int | None = None,
        statistics: Use | None = None,
        every_step: bool = True,
    ) -> Scores:
        """Adapt to the first `num_tasks` tasks and score each on the way.

        Keeps no graph from one step to the next; leaves parameters, buffers and optimiser as they
        were, and the random state unless the module draws in evaluation mode.

        Args:
            episodes: Gives task i through `batch(start, count)`; a `TaskBatch` will do.
            num_tasks: How many tasks.
            num_steps: Inner steps; None takes the algorithm's.
            statistics: What batch normalisation normalises by; None takes the algorithm's.
            every_step: Score before the first step and after each; else after the last alone,
                several times sooner where query sets are large.

        Raises:
            InputError: `num_tasks` is below 2, which gives no interval, or `num_steps` is more
                than the parts have rows for, or no query target of a task counts.
        """
        check_at_least(2, "to give an interval", num_tasks=num_tasks)
        norm = self._norm_statistics(statistics)
        own = self.ranks.span(num_tasks)
        steps = self._steps(num_steps)
        after = range(0 if every_step else steps, steps + 1)
        found, targets = self._test(episodes, own, after, norm.use, losses_and_metrics)
        loss, metric = self.ranks.gather([found], num_tasks)[0].unbind(1)
        judge = self._network.judge
        return judge.scores(loss, metric, targets, norm.describe(self.module), tuple(after))

    def predict(
        self,
        episodes: Episodes,
        num_tasks: int = 600,
        *,
        num_steps: int | None = None,
        statistics: Use | None = None,
    ) -> Tensor:
        """Return the outputs for the query sets after 0, 1, ... steps.

        Returns:
            (tasks, steps + 1, examples, ...).

        Arguments and errors as in `evaluate`, but that one task will do.
        """
        check_at_least(1, num_tasks=num_tasks)
        use = self._norm_statistics(statistics).use
        after = range(self._steps(num_steps) + 1)
        found, _ = self._test(episodes, self.ranks.span(num_tasks), after, use, outputs_of)
        return self.ranks.gather([found], num_tasks)[0]

    def evaluate_ensemble(
        self,
        states: Sequence[Tensors],
        episodes: Episodes,
        num_tasks: int = 600,
        *,
        num_steps: int | None = None,
        statistics: Use | None = None,
        views: Sequence[View] = (as_they_are,),
    ) -> Scores:
        """Score the mean of the outputs (logits) that several trained states end with.

        y = mean over states s and views v of f_s adapted to the task seen by v

        Args:
            states: Each as `state_tensors` gave it; the learner's own state is left as it is.
            episodes: As in `evaluate`, as are the others.
            num_tasks: How many tasks.
            num_steps: Inner steps.
            statistics: What batch normalisation normalises by.
            views: What to make of the inputs, support and query alike, before a state adapts to
                them: one adaptation for each view.

        Raises:
            InputError: no state or view, another model's state, or as in `evaluate`.
        """
        if not states or not views or num_tasks < 2:
            raise InputError(
                f"an ensemble of {len(states)} states and {len(views)} views on "
                f"num_tasks={num_tasks} needs at least 1 of each and 2 tasks"
            )
        norm = self._norm_statistics(statistics)
        own = self.ranks.span(num_tasks)
        after = (self._steps(num_steps),)
        losses, metrics = [], []
        with self._network.alone():  # no other thread is to meet another state
            before = below(self.state_tensors(), "model.")
            try:
                for start in range(own.start, own.stop, self.chunk_size):
                    chunk = tasks_of(episodes, start, min(self.chunk_size, own.stop - start))
                    seen = [chunk.seen(v) for v in views]
                    outputs = self._mean_outputs(states, seen, norm.use, after)
                    loss, metric = self._network.judge.loss_and_metric(outputs, chunk.y_query)
                    losses.append(loss)
                    metrics.append(metric)
            finally:
                self._meta.load(before)
        loss, metric = self.ranks.gather([torch.cat(losses), torch.cat(metrics)], num_tasks)
        judge = self._network.judge
        return judge.scores(loss, metric, chunk.y_query, norm.describe(self.module), after)

    def state_tensors(self) -> Tensors:
        """Return all that training changes, by name: model, buffers, optimiser and iteration."""
        state = {f"model.{name}": t for name, t in self._meta.tensors().items()}
        state |= {f"optimiser.{name}": t for name, t in self._outer.tensors().items()}
        state["iteration"] = torch.tensor(self.iteration)
        return {name: t.detach().clone() for name, t in state.items()}

    def load_state_tensors(self, state: Tensors) -> None:
        """Return to a state given by `state_tensors`.

        Raises:
            InputError: it is another model's or optimiser's, or not whole; nothing is changed.
        """
        if "iteration" not in state:
            raise InputError(
                "the saved state has no 'iteration'; give what state_tensors() returned, whole"
            )
        of_optimiser = below(state, "optimiser.")
        self._outer.check(of_optimiser)
        self._meta.load(below(state, "model."))
        self._outer.load(of_optimiser)
        self.iteration = int(state["iteration"])

    def _norm_statistics(self, use: Use | None) -> NormStatistics:
        norm = self.algorithm.norm_statistics
        return norm if use is None else replace(norm, use=use)

    def _test(
        self, episodes: Episodes, numbers: slice, after: Sequence[int], use: Use, reduce: Reduce
    ) -> tuple[Tensor, Tensor]:
        return adapt_and_query(
            self._loop,
            episodes,
            numbers,
            after,
            use=use,
            reduce=reduce,
            chunk_size=self.chunk_size,
            replay=self._test_replay,
        )

    def _mean_outputs(
        self, states: Sequence[Tensors], seen: Sequence[TaskBatch], use: Use, after: Sequence[int]
    ) -> Tensor:
        outputs = []
        for state in states:
            self._meta.load(below(state, "model."))
            for chunk in seen:
                found, _ = self._test(chunk, slice(0, len(chunk)), after, use, outputs_of)
                outputs.append(found)
        return torch.stack(outputs).mean(0)

    def _differentiate(self, batch: TaskBatch) -> tuple[Tensors, Metrics, Tensors]:
        return meta_gradient(
            self._loop,
            batch,
            self.epoch,
            chunk_size=self.chunk_size,
            checkpoint_every=self.checkpoint_every,
            ranks=self.ranks,
            replay=self._replay,
        )

    def _steps(self, num_steps: int | None) -> int:
        steps = self.algorithm.num_steps if num_steps is None else num_steps
        self.algorithm.check_steps(steps)
        return steps
