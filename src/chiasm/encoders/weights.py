"""What tells whether a model is still the same: a digest of its weights, and a cheap key that changes when they may have.

In: a module or its state dict. Out: hexadecimal digits, or a tuple to compare with an earlier one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits of the SHA-256 of all tensors: sorted names, dtypes, shapes and bytes.

    The device, the order of the names and the file format do not matter; any changed bit does.
    """
    sha = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def weights_key(model: nn.Module) -> tuple[tuple[int, int, torch.dtype], ...]:
    """Return what changes when any weight is replaced or changed in place: addresses, version counters and types.

    Writes that go past autograd (``weight.data.add_(...)``, a NumPy view) leave no trace: whoever makes them calls
    ``torch.autograd.graph.increment_version(weight)`` behind them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)


def structure_key(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Return what changes when a module is replaced or a hook comes or goes: a fast form knows of those alone that were
    there when it was made."""
    return tuple((id(m), *m._forward_hooks, *m._forward_pre_hooks, "forward" in m.__dict__) for m in model.modules())


def _count_fused_steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers change weights without counting a version, other optimizers count one: torch 2.13."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                if parameter.grad is not None and not parameter.is_inference():
                    torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_fused_steps)
