"""The learner: one meta-gradient, one outer update, adaptation and evaluation for any module."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fewstep.core.algorithm import Algorithm
from fewstep.core.errors import InputError
from fewstep.core.inner import Point, stack, trajectory
from fewstep.core.metrics import Metrics
from fewstep.core.network import Loss, TaskNetwork, Tensors, normalisation_statistics, set_mode
from fewstep.core.scores import Scores
from fewstep.core.tasks import Episodes, TaskBatch


class MetaLearner:
    """A module, an algorithm and a loss.

    phi are the module's own parameters, updated in place; the module stays usable as it is.
    Every loss is a mean over examples, tasks count alike, and the meta-loss is a mean over tasks.

    Args:
        module: Any `nn.Module`; its frozen parameters stay as they are.
        algorithm: The list of parts, from a recipe such as `fewstep.maml`.
        loss: (outputs, targets) of one task to a scalar, usually a mean over the examples.
        metric: (outputs, targets) of one task to a scalar to report; None takes the accuracy where
            targets are integers and the loss elsewhere.
        chunk_size: Tasks that go through the module at once; bounds memory, changes no result.
        vectorize: Use `torch.vmap` over the tasks of a chunk; else loop (for modules without
            batching rules, such as `nn.LSTM`).

    Raises:
        InputError: `module` has nothing to train, `algorithm.adapted` names no parameter of it, or
            `chunk_size` is below 1.

    Deviation: the papers' code sums where this takes means; see `maml` for the inner loss.
    """

    def __init__(
        self,
        module: nn.Module,
        algorithm: Algorithm,
        loss: Loss,
        *,
        metric: Loss | None = None,
        chunk_size: int = 8,
        vectorize: bool = True,
    ) -> None:
        if chunk_size < 1:
            raise InputError(f"chunk_size={chunk_size} must be at least 1 task")
        self.module = module
        self.algorithm = algorithm
        self.chunk_size = chunk_size
        named = dict(module.named_parameters())
        self.parameters: dict[str, Tensor] = {n: p for n, p in named.items() if p.requires_grad}
        self._frozen: dict[str, Tensor] = {n: p for n, p in named.items() if not p.requires_grad}
        if not self.parameters:
            raise InputError(
                f"{type(module).__name__} has no parameter that requires a gradient; "
                "nothing could be learned"
            )
        self._adapted = algorithm.adapted.choose(self.parameters)
        self.optimiser = algorithm.outer(list(self.parameters.values()))
        self._outer_lrs = [group["lr"] for group in self.optimiser.param_groups]
        self._network = TaskNetwork(module, loss, metric, vectorize=vectorize)

    def meta_gradient(self, batch: TaskBatch) -> tuple[Tensors, Metrics]:
        """Return the gradient of the meta-loss, by parameter name, and what it saw.

        meta-loss = mean over tasks of sum_k v[k] * L_query(theta[k])

        Changes neither parameters nor buffers.
        """
        gradients, metrics, _ = self._meta_gradient(batch)
        return gradients, metrics

    def step(self, batch: TaskBatch, *, progress: float = 0.0) -> Metrics:
        """Do one iteration: the meta-gradient, then the outer update of phi and of the buffers.

        Running statistics of batch normalisation become the mean over tasks of those each task
        arrives at, so that the order of the tasks cannot matter.

        Args:
            batch: Tasks.
            progress: Share of training done, from 0 to 1, which the outer schedule reads.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; phi is left as it was.
        """
        gradients, metrics, buffers = self._meta_gradient(batch)
        metrics.check_finite()
        for name, gradient in gradients.items():
            if not gradient.isfinite().all():
                raise FloatingPointError(
                    f"the meta-gradient of `{name}` is not finite, though every loss is"
                )
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        factor = self.algorithm.outer_schedule(progress)
        for group, outer_lr in zip(self.optimiser.param_groups, self._outer_lrs, strict=True):
            group["lr"] = outer_lr * factor
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])
        return metrics

    def adapt(
        self, x_support: Tensor, y_support: Tensor, *, num_steps: int | None = None
    ) -> nn.Module:
        """Return a copy of the module adapted to one task, ready to be called.

        It is in evaluation mode, but for batch normalisation, which uses the statistics of each
        batch it is given, as in training.

        Args:
            x_support: Inputs, (examples, ...), without a task dimension.
            y_support: Targets, (examples, ...).
            num_steps: Inner steps; None takes the algorithm's.
        """
        batch = TaskBatch(x_support[None], y_support[None], x_support[None], y_support[None])
        module = copy.deepcopy(self.module)
        with torch.no_grad(), self._network.mode(is_training=False):
            *_, last = self._trajectory(batch, self._steps(num_steps), derivative_order=1)
            for name, parameter in module.named_parameters():
                parameter.copy_(last.theta[name][0])
            for name, buffer in module.named_buffers():
                buffer.copy_(last.buffers[name][0])
        set_mode(module, is_training=False)
        return module

    def evaluate(
        self, episodes: Episodes, num_tasks: int = 600, *, num_steps: int | None = None
    ) -> Scores:
        """Adapt to the first `num_tasks` tasks and score each after every step.

        Keeps no graph from one step to the next; leaves parameters, buffers, optimiser and random
        state as they were.

        Args:
            episodes: Gives task i through `batch(start, count)`; a `TaskBatch` will do.
            num_tasks: How many tasks.
            num_steps: Inner steps; None takes the algorithm's.

        Raises:
            InputError: `num_tasks` is below 2, which gives no interval.
        """
        if num_tasks < 2:
            raise InputError(f"num_tasks={num_tasks} must be at least 2 to give an interval")
        steps = self._steps(num_steps)
        losses, metrics = [], []
        with torch.no_grad(), self._network.mode(is_training=False):
            for start in range(0, num_tasks, self.chunk_size):
                chunk = episodes.batch(start, min(self.chunk_size, num_tasks - start))
                points = self._trajectory(chunk, steps, derivative_order=1)
                queries = [self._query(point, chunk)[:2] for point in points]
                losses.append(torch.stack([loss for loss, _ in queries], dim=1))
                metrics.append(torch.stack([metric for _, metric in queries], dim=1))
        return Scores(
            metric_name=self._network.metric_name(chunk.y_query),
            metric=torch.cat(metrics).cpu(),
            loss=torch.cat(losses).cpu(),
            statistics=normalisation_statistics(self.module),
        )

    def state_tensors(self) -> Tensors:
        """Return all that training changes, by name: model, buffers and optimiser state."""
        state: Tensors = {f"model.{name}": p for name, p in self.module.named_parameters()}
        state |= {f"model.{name}": b for name, b in self.module.named_buffers()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                state[f"optimiser.{name}.{key}"] = torch.as_tensor(value)
        return {name: t.detach().clone() for name, t in state.items()}

    def load_state_tensors(self, state: Tensors) -> None:
        """Return to a state given by `state_tensors`.

        Raises:
            InputError: it is another model's.
        """
        model: Tensors = {**dict(self.module.named_parameters())}
        model |= dict(self.module.named_buffers())
        saved = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
        if differing := sorted(
            n for n in model.keys() | saved.keys()
            if n not in model or n not in saved or model[n].shape != saved[n].shape
        ):  # fmt: skip
            raise InputError(
                f"the saved state is another model's: `{differing[0]}` does not fit; "
                "build the model with the settings it was saved with"
            )
        with torch.no_grad():
            for name, tensor in model.items():
                tensor.copy_(saved[name])
        names = enumerate(self.parameters)
        per_parameter = {i: _below(state, f"optimiser.{name}.") for i, name in names}
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict(
            {"state": {i: s for i, s in per_parameter.items() if s}, "param_groups": groups}
        )

    def _steps(self, num_steps: int | None) -> int:
        if num_steps is not None and num_steps < 0:
            raise InputError(f"num_steps={num_steps} must be 0 or more inner steps")
        return self.algorithm.num_steps if num_steps is None else num_steps

    def _trajectory(
        self, batch: TaskBatch, num_steps: int, *, derivative_order: int
    ) -> Iterator[Point]:
        tasks = len(batch)
        return trajectory(
            self._network,
            stack({**self.parameters, **self._frozen}, tasks),
            stack(dict(self.module.named_buffers()), tasks),
            batch.x_support,
            batch.y_support,
            adapted=self._adapted,
            inner_rate=self.algorithm.inner_rate,
            num_steps=num_steps,
            derivative_order=derivative_order,
        )

    def _query(self, point: Point, batch: TaskBatch) -> tuple[Tensor, Tensor, Tensors]:
        return self._network(point.theta, point.buffers, batch.x_query, batch.y_query)

    def _meta_gradient(self, batch: TaskBatch) -> tuple[Tensors, Metrics, Tensors]:
        phi = list(self.parameters.values())
        total = [torch.zeros_like(p) for p in phi]
        metrics, buffers = [], []
        with self._network.mode(is_training=True):
            for chunk in batch.split(self.chunk_size):
                seen, after = self._meta_loss(chunk)
                # The share of this chunk in the mean over all tasks; its graph is freed here.
                loss = seen.task_loss.sum() / len(batch)
                parts = torch.autograd.grad(loss, phi, materialize_grads=True)
                total = [t + part for t, part in zip(total, parts, strict=True)]
                metrics.append(seen.detach())
                buffers.append(after)
        gradients = dict(zip(self.parameters, total, strict=True))
        return gradients, Metrics.cat(metrics), _mean_over_tasks(buffers)

    def _meta_loss(self, chunk: TaskBatch) -> tuple[Metrics, Tensors]:
        """Return sum_k v[k] * L_query(theta[k]) of every task, and the buffers at the end."""
        num_steps = self.algorithm.num_steps
        v = self.algorithm.query_weights(num_steps)
        order = self.algorithm.derivative_order
        losses = []
        for point in self._trajectory(chunk, num_steps, derivative_order=order):
            if v[point.step] != 0:
                loss, metric, buffers = self._query(point, chunk)
                losses.append(loss)
        query_loss = torch.stack(losses, dim=1)
        weights = query_loss.new_tensor([w for w in v if w != 0])
        support_loss = torch.stack([query_loss.new_empty(len(chunk)), *point.support_losses], dim=1)
        return (
            Metrics(
                self._network.metric_name(chunk.y_query),
                query_loss @ weights,
                metric,
                support_loss[:, 1:],
                query_loss,
            ),
            buffers,
        )


def _mean_over_tasks(chunks: list[Tensors]) -> Tensors:
    stacked = {name: torch.cat([c[name] for c in chunks]) for name in chunks[0]}
    return {n: b.mean(0) if b.is_floating_point() else b[0] for n, b in stacked.items()}


def _below(state: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t.clone() for n, t in state.items() if n.startswith(prefix)}
