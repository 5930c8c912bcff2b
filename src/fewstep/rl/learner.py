"""MAML for reinforcement learning: policies that adapt by gradients of their own episodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.core.adapted import AdaptedParameters
from fewstep.core.algorithm import Algorithm
from fewstep.core.derivative_order import FixedOrder
from fewstep.core.errors import InputError, check_at_least, check_name
from fewstep.core.inner import InnerLoop, Point
from fewstep.core.inner_step import GradientStep, InnerStep
from fewstep.core.judge import Judge
from fewstep.core.meta_parameters import MetaParameters
from fewstep.core.network import TaskNetwork
from fewstep.core.rates import ConstantRate, InnerRate
from fewstep.core.tensors import Tensors
from fewstep.rl.distributions import Distribution, Gaussian
from fewstep.rl.environments import TaskEnvironments
from fewstep.rl.experience import SUPPORT_LOSSES, Experience
from fewstep.rl.returns import Returns
from fewstep.rl.rollouts import Rollouts, roll_out
from fewstep.rl.trust_region import Seen, TrustRegion, Update

_EXAMPLES_AT_ONCE = 16_000  # of the outer loss: larger tensors leave the cache


@dataclass(frozen=True)
class PolicyMetrics:
    """What one iteration saw.

    Args:
        returns: Of its tasks, before the outer update.
        update: What that did.
    """

    returns: Returns
    update: Update


class PolicyLearner:
    """A policy, the parts by which it adapts, and the trust region that trains it.

    theta[k+1] = theta[k] - alpha[k] grad L_k(theta[k]);  L_k = -mean(log pi(action) A), of episodes
    that pi_theta[k] went through.

    phi <- TRPO(phi, -mean(pi_theta[K](action) / pi_old(action) A)), of episodes by theta[K], mean
    over tasks; the divergence is KL(pi_old || pi_theta[K]).

    It is MAML's inner loop, and what it needs: new episodes after each step. phi are the policy's
    parameters, updated in place, and learned inner rates. The policy is in evaluation mode in
    training, too: with dropout, those that act and those that are judged would be others.

    Args:
        policy: Maps observations to what says how to act, as `GaussianPolicy` and
            `CategoricalPolicy` do; without buffers.
        num_steps: K, inner steps; 0 trains one policy for all tasks.
        inner_rate: alpha.
        inner_step: Where a step leads; gradient descent by default.
        derivative_order: 2, or 1 for first-order MAML.
        adapted: The parameters that the inner loop changes; all by default.
        outer: The outer update.
        episodes: Of each task, after each number of steps.
        discount: gamma of the advantages.
        trace: lambda of the advantages.
        support_loss: "log probability" is L_k as above; "ratio" is -mean(pi(action) /
            pi_acting(action) A), with the same gradient, and a second derivative nearer to that of
            the expected return.
        distribution: What the policy's outputs say; None takes the policy's `distribution`, and
            `Gaussian()` if it has none.
        vectorize: Use `torch.vmap` over the tasks; else loop (for modules without batching rules).

    Raises:
        InputError: an argument is out of its range, or the policy has buffers.

    Deviation: by default the second derivative of L_k at its own samples leaves out how theta moves
        the samples, as the authors' code does; "ratio" has what each action's chance adds, and
        leaves out what it does to later observations.

    Reference: Finn, Abbeel and Levine, Model-Agnostic Meta-Learning, ICML 2017, arXiv:1703.03400,
        algorithm 3.
    """

    def __init__(
        self,
        policy: nn.Module,
        num_steps: int = 1,
        inner_rate: InnerRate | None = None,
        *,
        inner_step: InnerStep | None = None,
        derivative_order: Literal[1, 2] = 2,
        adapted: AdaptedParameters | None = None,
        outer: TrustRegion | None = None,
        episodes: int = 20,
        discount: float = 0.99,
        trace: float = 1.0,
        distribution: Distribution | None = None,
        support_loss: Literal["log probability", "ratio"] = "log probability",
        vectorize: bool = True,
    ) -> None:
        check_name("support_loss", support_loss, SUPPORT_LOSSES)
        check_at_least(1, episodes=episodes)
        for name, value in (("discount", discount), ("trace", trace)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value} must be between 0 and 1")
        if any(True for _ in policy.buffers()):
            raise InputError(
                f"{type(policy).__name__} has buffers, which no policy here may have; take "
                "LayerNorm in place of batch normalisation"
            )
        self.episodes, self.discount, self.trace = episodes, discount, trace
        self.outer = outer or TrustRegion()
        said: Distribution = getattr(policy, "distribution", Gaussian())
        self.distribution = said if distribution is None else distribution
        algorithm = Algorithm(
            num_steps,
            ConstantRate(0.1) if inner_rate is None else inner_rate,
            derivative_order=FixedOrder(derivative_order),
            adapted=adapted or AdaptedParameters(),
            inner_step=GradientStep() if inner_step is None else inner_step,
        )
        self._meta = MetaParameters(policy, algorithm)
        loss = partial(SUPPORT_LOSSES[support_loss], self.distribution)
        judge = Judge(loss, None, None)
        network = TaskNetwork(policy, judge, vectorize=vectorize, precision="float32")
        self._loop = InnerLoop(network, self._meta, algorithm)
        self.parameters = self._meta.parameters
        self.iteration = 0

    @property
    def policy(self) -> nn.Module:
        """The policy from which the inner loop starts."""
        return self._loop.network.module

    def step(self, tasks: TaskEnvironments, start: int, count: int) -> PolicyMetrics:
        """Do one iteration: episodes, inner steps, episodes of the adapted policies, outer update.

        Args:
            tasks: Where the tasks come from.
            start: Number of the first task.
            count: How many.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; phi is left as it was.
            InputError: `count` is below 1, or the policy does not take the dtype of the
                observations.
        """
        num_steps = self._loop.algorithm.num_steps
        with self._loop.mode(is_training=False, use="batch"):
            gathered = list(self._gather(self._loop, tasks, slice(start, start + count), num_steps))
            of_steps = [self._experience(rollouts) for rollouts in gathered]
            update = self.outer.step(
                list(self.parameters.values()), partial(self._objective, of_steps)
            )
        self.iteration += 1
        returns = torch.stack([rollouts.returns for rollouts in gathered], 1)
        return PolicyMetrics(Returns(returns), update)

    def evaluate(
        self,
        tasks: TaskEnvironments,
        num_tasks: int = 40,
        *,
        start: int = 0,
        num_steps: int | None = None,
        inner_rate: InnerRate | None = None,
        episodes: int | None = None,
        chunk_size: int = 40,
    ) -> Returns:
        """Adapt to `num_tasks` tasks, and return what they gave on the way.

        Args:
            tasks: Where the tasks come from.
            num_tasks: How many.
            start: Number of the first; where the source is that of training, beyond those of
                training.
            num_steps: Inner steps; None takes those of training.
            inner_rate: Fixed rates in place of those of training, such as
                `StepRates((0.1, 0.05))`.
            episodes: After each number of steps; None takes those of training.
            chunk_size: Tasks at once; bounds memory, changes no result.

        Raises:
            InputError: `num_tasks` is below 2, which gives no interval, `episodes` or `chunk_size`
                is below 1, `inner_rate` is a learned one or a number, `num_steps` is more than the
                rates have rows for, or the policy does not take the dtype of the observations.
        """
        check_at_least(2, "to give an interval", num_tasks=num_tasks)
        check_at_least(1, "task", chunk_size=chunk_size)
        returns = []
        for first in range(start, start + num_tasks, chunk_size):
            chunk = slice(first, min(first + chunk_size, start + num_tasks))
            rollouts = self.roll_out(
                tasks, chunk, num_steps=num_steps, inner_rate=inner_rate, episodes=episodes
            )
            returns.append(torch.stack([each.returns for each in rollouts], 1))
        return Returns(torch.cat(returns))

    def roll_out(
        self,
        tasks: TaskEnvironments,
        numbers: slice,
        *,
        num_steps: int | None = None,
        inner_rate: InnerRate | None = None,
        episodes: int | None = None,
    ) -> list[Rollouts]:
        """Return the episodes of tasks after 0, 1, ... inner steps.

        Args:
            tasks: Where the tasks come from.
            numbers: Which tasks, from a start to a stop.
            num_steps: As in `evaluate`, as are the others.
            inner_rate: Fixed rates.
            episodes: After each number of steps.
        """
        loop = self._loop
        if inner_rate is not None:
            loop = replace(loop, algorithm=replace(loop.algorithm, inner_rate=inner_rate))
            if inner_rate.is_learned:
                raise InputError(f"{inner_rate} is learned; give a ConstantRate or StepRates")
        steps = loop.algorithm.num_steps if num_steps is None else num_steps
        loop.algorithm.check_steps(steps)
        with loop.mode(is_training=False, use="batch"):
            return list(self._gather(loop, tasks, numbers, steps, episodes))

    def state_tensors(self) -> Tensors:
        """Return all that training changes, by name."""
        state = self._meta.tensors() | {"iteration": torch.tensor(self.iteration)}
        return {name: t.detach().clone() for name, t in state.items()}

    def load_state_tensors(self, state: Tensors) -> None:
        """Take over what `state_tensors` gave.

        Raises:
            InputError: it is another policy's, or of a policy alone.
        """
        if "iteration" not in state:
            raise InputError(
                "the saved state has no `iteration`; give what state_tensors() returned, or load "
                "parameters alone by policy.load_state_dict(...)"
            )
        self._meta.load({name: t for name, t in state.items() if name != "iteration"})
        self.iteration = int(state["iteration"])

    def _gather(
        self,
        loop: InnerLoop,
        tasks: TaskEnvironments,
        numbers: slice,
        num_steps: int,
        episodes: int | None = None,
    ) -> Iterator[Rollouts]:
        """Yield episodes by theta[0], theta[1], ..., each adapted on those by the one before."""
        start, count = numbers.start, numbers.stop - numbers.start
        episodes = self.episodes if episodes is None else episodes
        if min(count, episodes) < 1:
            raise InputError(f"{count} tasks of {episodes} episodes: give at least one of each")
        point = loop.start(count)
        with closing(tasks.environments(start, count, episodes)) as environments:
            for step in range(num_steps + 1):
                noise = tasks.noise(start, count, episodes, step)
                with torch.no_grad():
                    acting = partial(_act, loop, point)
                    rollouts = roll_out(acting, self.distribution, environments, noise)
                    yield rollouts
                    if step < num_steps:
                        point = _descend(loop, point, self._experience(rollouts), order=1)

    def _objective(self, of_steps: list[Experience], *, differentiable: bool) -> Iterator[Seen]:
        """Yield shares of outer loss and divergence, of some tasks each, for phi as it is now."""
        tasks, examples = of_steps[0].advantages.shape
        at_once = max(1, _EXAMPLES_AT_ONCE // examples)
        for start in range(0, tasks, at_once):
            of_some = [experience.some(slice(start, start + at_once)) for experience in of_steps]
            yield self._share(of_some, tasks, differentiable)

    def _share(self, of_steps: list[Experience], of_tasks: int, differentiable: bool) -> Seen:
        tasks = len(of_steps[0].observations)
        point = self._loop.start(tasks)
        order = self._loop.algorithm.derivative_order(epoch=0) if differentiable else 1
        for experience in of_steps[:-1]:
            point = _descend(self._loop, point, experience, order=order)
        query = of_steps[-1]
        outputs = self._loop.network.outputs(point.theta, query.observations)
        new, old = (
            self.distribution.log_probability(each, query.actions)
            for each in (outputs, query.outputs)
        )
        ratio = torch.exp(new - old)
        loss = -(query.weights * ratio * query.advantages).mean()
        divergence = query.weights * self.distribution.kl_divergence(query.outputs, outputs)
        share = tasks / of_tasks
        return Seen(share * loss, share * divergence.mean(), outputs)

    def _experience(self, rollouts: Rollouts) -> Experience:
        return Experience.of(rollouts, discount=self.discount, trace=self.trace)


def _act(loop: InnerLoop, point: Point, observations: Tensor) -> Tensor:
    """Return what each task's policy gives for observations of it."""
    try:
        return loop.network.outputs(point.theta, observations)
    except RuntimeError as error:  # of a policy that does not convert them itself
        of_policy = next(iter(point.theta.values())).dtype
        if observations.dtype == of_policy:
            raise
        raise InputError(
            f"the environments give {observations.dtype} and the policy is of {of_policy} "
            f"({str(error).splitlines()[0]}); give environments with dtype={of_policy}, or "
            f"policy.to({observations.dtype})"
        ) from error


def _descend(loop: InnerLoop, point: Point, experience: Experience, *, order: int) -> Point:
    """Do the next inner step."""
    *_, after = loop.trajectory(
        experience.support(), point.step + 1, derivative_order=order, start=point
    )
    return after
