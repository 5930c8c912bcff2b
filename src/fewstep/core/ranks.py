"""Several processes that share the tasks of a batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.core.tasks import TaskBatch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that work on one batch, each on its share of the tasks; alone by default.

    Each is given the whole batch and takes a share, and what they find is added up, so that all end
    with the gradient, the metrics and the buffers of one process that does it all, up to rounding.

    Args:
        rank: Which of them this one is.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_torchrun(cls, device: str = "cpu") -> Ranks:
        """Join the processes that `torchrun` started; alone without it.

        Args:
            device: "cpu" takes gloo; "cuda" nccl for tensors on GPUs, and each process the GPU of
                its local rank.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            is_cuda = device.startswith("cuda")
            if is_cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    def span(self, tasks: int) -> slice:
        """Return this one's share of so many tasks; shares differ by one task at most.

        Raises:
            InputError: there are fewer tasks than processes.
        """
        if tasks < self.size:
            raise InputError(
                f"{tasks} tasks cannot be shared by {self.size} processes; "
                "give more tasks or start fewer processes"
            )
        return slice(self.rank * tasks // self.size, (self.rank + 1) * tasks // self.size)

    def count(self, tasks: int) -> int:
        """Return how many tasks this one's share of so many has."""
        return len(range(tasks)[self.span(tasks)])

    def share(self, batch: TaskBatch) -> TaskBatch:
        """Return this one's tasks."""
        if self.size == 1:
            return batch
        return TaskBatch(*(t[self.span(len(batch))] for t in batch.tensors()))

    def all_reduce(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the sums over the processes of each tensor."""
        if self.size == 1:
            return tensors
        sums: dict[int, Tensor] = {}
        # One message for all tensors of a kind; a set's order would differ between processes.
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            which = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].detach().flatten() for i in which])
            dist.all_reduce(flat)
            parts = torch.split(flat, [tensors[i].numel() for i in which])
            sums |= {i: p.view(tensors[i].shape) for i, p in zip(which, parts, strict=True)}
        return [sums[i] for i in range(len(tensors))]

    def gather(self, tensors: list[Tensor], tasks: int) -> list[Tensor]:
        """Return the tensors of all `tasks`, given those of this one's share, (tasks, ...) each."""
        if self.size == 1:
            return tensors
        whole = [t.new_zeros(tasks, *t.shape[1:]) for t in tensors]
        for w, t in zip(whole, tensors, strict=True):
            w[self.span(tasks)] = t
        return self.all_reduce(whole)

    def any(self, wish: bool) -> bool:
        """Whether any of them has the wish; asked between CPUs, so that no GPU is waited for."""
        return bool(self.all_reduce([torch.tensor(int(wish))])[0])

    def close(self) -> None:
        """Wait for all of them, then leave the group."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def broadcast(self, value: T) -> T:
        """Return the first one's value, whatever it is, to all."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Ranks()
