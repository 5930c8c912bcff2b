"""The outer loop: what a meta-gradient does to all that is learned."""

from __future__ import annotations

from itertools import chain

import torch

from fewstep.core.algorithm import Algorithm
from fewstep.core.errors import InputError, check_fits
from fewstep.core.meta_parameters import RATE, MetaParameters
from fewstep.core.tensors import Tensors

GROUP = "param_groups."


class OuterLoop:
    """Updates meta-parameters by the algorithm's outer optimiser, its schedule and its clipping.

    Args:
        meta: What is learned.
        algorithm: Says how.
    """

    def __init__(self, meta: MetaParameters, algorithm: Algorithm) -> None:
        self._meta, self._algorithm = meta, algorithm
        self.optimiser = algorithm.outer(list(meta.by_outer.values()))
        self._initial_lrs = [group["lr"] for group in self.optimiser.param_groups]
        self._lrs = list(self._initial_lrs)  # as last set
        self._initial_numbers = self._numbers()

    def step(self, gradients: Tensors, epoch: float) -> None:
        """Update phi and the learned rates.

        Args:
            gradients: Of the meta-loss, by the names of the parameters.
            epoch: What the schedule reads.

        Raises:
            InputError: the optimiser's rate was set by somebody else.
        """
        meta, update = self._meta, self._algorithm.rate_update
        self._follow_schedule(epoch)
        of_one = {n: gradients[n][None] for n in meta.learned}
        clipped = self._algorithm.outer_clipping(of_one)
        check_fits("outer_clipping gave", clipped, of_one)
        for name, parameter in meta.by_outer.items():
            parameter.grad = clipped[name][0] if name in clipped else gradients[name]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if update is not None:
            with torch.no_grad():
                for name, rate in meta.rates.items():
                    gradient = gradients[RATE + name]
                    rate.copy_(update(rate, gradient))
                    meta.hypergradients[name].copy_(-gradient)

    def _follow_schedule(self, epoch: float) -> None:
        factor = self._algorithm.outer_factor_at(epoch)
        for i, group in enumerate(self.optimiser.param_groups):
            if group["lr"] != self._lrs[i]:
                raise InputError(
                    f"the outer rate was set to {group['lr']} from outside, and each step sets it "
                    "by the algorithm's outer_schedule; pass that, a function of the epoch"
                )
            group["lr"] = self._lrs[i] = self._initial_lrs[i] * factor

    def tensors(self) -> Tensors:
        """Return the optimiser's state, by the names of parameter and entry.

        So that of groups, by their numbers, which some optimisers estimate as they go.
        """
        state = {
            f"{name}.{key}": torch.as_tensor(value)
            for name, parameter in self._meta.parameters.items()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }
        moved = self._numbers().items() - self._initial_numbers.items()
        return state | {f"{GROUP}{i}.{key}": torch.tensor(value) for (i, key), value in moved}

    def _numbers(self) -> dict[tuple[int, str], float]:
        """Return the numbers of the groups but the rate, by the group's number and their names."""
        return {
            (i, key): value
            for i, group in enumerate(self.optimiser.param_groups)
            for key, value in group.items()
            if key != "lr" and isinstance(value, int | float)
        }

    def check(self, saved: Tensors) -> None:
        """Check that a state could be of this optimiser.

        Raises:
            InputError: it has entries of parameters that this one does not update, or others than
                this one keeps.
        """
        found = self._by_place(saved)
        if (kept := self._kept()) is None:
            return
        for place, of_parameter in found.items():  # another has not been updated yet
            if (names := kept[place]) != (own := set(of_parameter)):
                odd = min(names ^ own)
                raise InputError(
                    f"the saved state is another outer optimiser's, or not whole: {odd!r} is "
                    f"{'missing' if odd in names else 'unknown'}, and this one keeps "
                    f"{', '.join(sorted(names)) or 'nothing'}; build the learner as it was"
                )

    def _kept(self) -> dict[int, set[str]] | None:
        """Return the entries that the optimiser keeps for each parameter; None if it won't tell."""
        twins = [torch.zeros_like(p, device="cpu") for p in self._meta.by_outer.values()]
        try:
            twin = self._algorithm.outer(twins)
            for p in twins:
                p.grad = torch.zeros_like(p)
            twin.step()
        except Exception:  # of an optimiser of somebody's own, which may want more than gradients
            return None
        updated = chain.from_iterable(group["params"] for group in twin.param_groups)
        return {i: set(twin.state.get(p, {})) for i, p in enumerate(updated)}

    def load(self, saved: Tensors) -> None:
        """Take over what `tensors` gave."""
        groups = self.optimiser.state_dict()["param_groups"]
        for (i, key), initial in self._initial_numbers.items():
            t = saved.get(f"{GROUP}{i}.{key}")
            groups[i][key] = initial if t is None else t.item()
        self.optimiser.load_state_dict({"state": self._by_place(saved), "param_groups": groups})

    def _by_place(self, saved: Tensors) -> dict[int, Tensors]:
        """Return the entries by the number that PyTorch gives to their parameter."""
        updated = chain.from_iterable(group["params"] for group in self.optimiser.param_groups)
        places = {id(parameter): i for i, parameter in enumerate(updated)}
        state: dict[int, Tensors] = {}
        numbers = {f"{GROUP}{i}.{key}" for i, key in self._initial_numbers}
        for full_name, t in saved.items():
            if full_name in numbers:
                continue
            name, _, key = full_name.rpartition(".")  # one parameter's name may begin another's
            place = places.get(id(self._meta.parameters.get(name)))
            if place is None:
                raise InputError(
                    f"the saved state is another outer optimiser's: it has `{full_name}`, which "
                    "this one has no use for; build the learner as it was"
                )
            state.setdefault(place, {})[key] = t.clone()
        return state
