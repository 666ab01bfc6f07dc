"""The process group as it is given: one process, or the ranks that ``torchrun`` started.

Comes in: what ``torch.distributed`` knows. Goes out: rank, world, and a gather whose backward pass hands every rank the
gradient of its own rows. Gradients are averaged by DistributedDataParallel, where every process holds all weights, or
by FSDP2, where each holds a part of weights, gradients and optimizer state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    if device == "cuda":  # "the current one": without this all processes of a machine would share its first
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return current_group()


def wrap(model: nn.Module, group: Group, *, shard: bool = False) -> nn.Module:
    """Return the module whose forward pass must be called.

    Args:
        model: What trains; one process uses it as it is.
        group: The processes; they must have built the same weights.
        shard: Spread weights over the processes (FSDP2, in place: the module returned is ``model``), instead of a
            DistributedDataParallel around it.
    """
    if group.world == 1:
        return model
    if shard:
        return _sharded(model, group)
    from torch.nn.parallel import DistributedDataParallel

    # Foreign towers carry parameters that the pooled output does not use; native ones do not.
    is_native = bool(getattr(getattr(model, "config", None), "is_native", False))
    return DistributedDataParallel(_NoLeaves(model), find_unused_parameters=not is_native)


def _sharded(model: nn.Module, group: Group) -> nn.Module:
    """Shard every layer of every outermost list of layers by itself, then the rest; single numbers stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (group.world,))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=set(_single_numbers(model)))
    if device == "cpu":  # gloo sums, but does not average
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from (child if isinstance(child, nn.ModuleList) else _layers(child))


def _single_numbers(model: nn.Module) -> list[nn.Parameter]:
    """Parameters without axes (logit scale and bias), which FSDP2 cannot shard."""
    return [p for p in model.parameters() if p.ndim == 0]


def is_sharded(model: nn.Module) -> bool:
    """Return whether :func:`wrap` has spread the weights of a module over the processes."""
    return any(hasattr(t, "full_tensor") for t in model.state_dict().values())


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that is spread over the processes, each of which must call this; others as they are."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def spread_like(value: Tensor, like: Any) -> Tensor:
    """Return this process's part of a whole tensor when ``like`` is spread over the processes, else the tensor."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def finish_gradients(module: nn.Module, group: Group) -> None:
    """Average what FSDP2 leaves to the caller: the gradients of parameters that it does not shard."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return
    for parameter in _single_numbers(module):
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= group.world


def clip_gradients(parameters: Sequence[nn.Parameter], bound: float) -> float:
    """Scale gradients down so that their norm over all processes is at most ``bound``; return the norm before."""
    spread = [p.grad for p in parameters if hasattr(p, "device_mesh") and p.grad is not None]
    if not spread:
        return float(nn.utils.clip_grad_norm_(parameters, bound))
    rest = [p.grad for p in parameters if not hasattr(p, "device_mesh") and p.grad is not None]
    norm = math.hypot(*(float(whole(nn.utils.get_total_norm(part))) for part in (spread, rest) if part))
    if norm > bound:
        for gradient in (*spread, *rest):
            gradient.mul_(bound / (norm + 1e-6))
    return norm


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

    if hasattr(module, "set_requires_gradient_sync"):
        return _local_gradients(module)
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def _local_gradients(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


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


def of_main(values: dict[str, float], group: Group) -> dict[str, float]:
    """Return the numbers of the first process, so that all take the same decision by them."""
    if group.world == 1:
        return values
    held: list[Any] = [values]
    dist.broadcast_object_list(held, src=0)
    return dict(held[0])


def wait_for_all(group: Group) -> None:
    """Return when every process has come here: what the first one wrote before can then be read by all."""
    if group.world > 1:
        dist.barrier()


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
