"""Several processes at one run, each with a GPU of its own, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(days=1)  # while the first process measures, the others have nothing to do
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that work on one run. Alone, it does everything, and waits for nobody.

    Attributes:
        index: this one's number, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of some items."""
        return items[self.index :: self.count]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier()

    def says(self, yes: bool) -> bool:
        """What the first process says; what the others say does not matter."""
        if self.count == 1:
            return yes
        import torch

        said = torch.tensor(int(yes))
        torch.distributed.broadcast(said, 0)
        return bool(said)

    def begin_alike(self, parameters: Sequence[torch.Tensor]) -> None:
        """Give the parameters of all processes the values that those of the first have."""
        if self.count > 1:
            import torch

            for parameter in parameters:
                torch.distributed.broadcast(parameter.detach(), 0)

    def add_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Sum the gradients over all processes, in place; a parameter that has none in any of them gets none."""
        if self.count == 1:
            return
        import torch

        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        torch.distributed.all_reduce(has)
        for parameter, number in zip(parameters, has.tolist(), strict=True):
            if number:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad)


@cache
def here() -> Processes:
    """This process, and how many others `accelerate launch` or `torchrun` has started for the same command."""
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    gpu = torch.cuda.is_available()
    state = PartialState(cpu=not gpu, backend="cuda:nccl,cpu:gloo" if gpu else "gloo", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)
