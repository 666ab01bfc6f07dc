"""The process group as it is given: one process, or the ranks that ``torchrun`` started.

Comes in: what ``torch.distributed`` knows. Goes out: rank, world, and a gather whose backward pass hands every rank the
gradient of its own rows. Nothing here opens sockets or averages gradients by hand: DistributedDataParallel does.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chiasm.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """This process among its peers.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def current_group() -> Group:
    """Return the group that ``torch.distributed`` has been set up with, else a group of one."""
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    return Group()


def join_group(device: str) -> Group:
    """Set up the group that ``torchrun`` announces in the environment, unless that has been done.

    Args:
        device: Decides the backend: ``nccl`` for CUDA, ``gloo`` otherwise.
    """
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return current_group()
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return current_group()


def wrap(model: nn.Module, group: Group) -> nn.Module:
    """Return the module whose forward pass must be called: DistributedDataParallel around ``model``, or ``model``."""
    if group.world == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    # Foreign towers carry parameters that the pooled output does not use; native ones do not.
    is_native = bool(getattr(getattr(model, "config", None), "is_native", False))
    return DistributedDataParallel(_NoLeaves(model), find_unused_parameters=not is_native)


class _NoLeaves(nn.Module):
    """Returns views of outputs that are parameters themselves, which DistributedDataParallel takes for unused."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor | None) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.model(*inputs)
        return {name: value.view_as(value) for name, value in outputs.items()}


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward passes keep gradients local."""
    from torch.nn.parallel import DistributedDataParallel

    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def gather_rows(rows: Tensor, group: Group) -> Tensor:
    """Return the rows of all ranks, in rank order, with a gradient for this rank's own.

    Every rank must hold equally many. The backward pass sums what all ranks' losses say about a row; as
    DistributedDataParallel then averages over ranks, a loss that is the mean over local rows gives the gradient of the
    mean over all rows.
    """
    if group.world == 1:
        return rows
    gathered: Tensor = _AllGather.apply(rows, group)  # type: ignore[no-untyped-call]
    return gathered


class _AllGather(torch.autograd.Function):
    """all_gather with a backward pass; torch's own is private and has changed its name in most releases since 2.6."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.place = (group.rank * len(rows), len(rows))
        return gather_constants(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        start, count = ctx.place
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed[start : start + count], None


def gather_constants(rows: Tensor, group: Group) -> Tensor:
    """Return the rows of all ranks, in rank order, without a gradient."""
    if group.world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(group.world)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_over_ranks(value: float, group: Group, device: torch.device) -> float:
    """Return the mean of a number over all ranks; not a number on one rank is so on all."""
    if group.world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor) / group.world


def local_slice(batch_size: int, group: Group) -> slice:
    """Return this rank's part of a batch: consecutive rows, so that gathered rows keep the batch's order.

    Raises:
        ConfigError: When the batch cannot be divided evenly.
    """
    if batch_size % group.world:
        raise ConfigError(
            f"`optim.batch_size` is {batch_size}, which {group.world} processes cannot share evenly",
            hint=f"use a multiple of {group.world}",
        )
    size = batch_size // group.world
    return slice(group.rank * size, (group.rank + 1) * size)
