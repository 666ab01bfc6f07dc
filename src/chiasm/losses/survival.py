"""The partial likelihood of Cox's model: log risks of patients to a scalar.

Comes in: one log risk a patient (higher is worse), times, event flags. Goes out: the negative log partial likelihood.
A patient counts through the order of the times only, so patients of a batch form one risk set: a small batch gives a
small risk set and another loss, not a noisy estimate of the whole one. Use all patients at once where they fit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from chiasm.errors import InputError, UnknownName

Ties = Literal["breslow", "efron"]


def cox_loss(
    log_risk: Tensor,
    time: Tensor,
    event: Tensor,
    *,
    ties: Ties = "breslow",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Return the negative log partial likelihood of Cox's model.

    Args:
        log_risk: (n,) linear predictor, higher is worse; any floating dtype, summed in at least float32.
        time: (n,) in any one unit; patients with equal times are at risk together.
        event: (n,) 1 or True: seen, 0 or False: censored.
        ties: What events at equal times contribute: ``breslow`` keeps all of them in each other's risk set, ``efron``
            takes them out step by step on average (nearer to the exact likelihood).
        reduction: ``mean`` over events, or ``sum``.

    Returns:
        A scalar with gradient. Without any event 0, with a gradient of 0. Adding a constant to all risks changes nothing.

    Raises:
        InputError: Shapes that differ.
        UnknownName: For ``ties`` or ``reduction``.

    References:
        Cox, 1975, Partial likelihood; Breslow, 1974; Efron, 1977. As a loss of networks: Katzman et al., 2018 (DeepSurv),
        https://doi.org/10.1186/s12874-018-0482-1, which has Breslow's form.
    """
    if ties not in ("breslow", "efron"):
        raise UnknownName("handling of ties", ties, ("breslow", "efron"))
    if reduction not in ("mean", "sum"):
        raise UnknownName("reduction", reduction, ("mean", "sum"))
    if log_risk.ndim != 1 or time.shape != log_risk.shape or event.shape != log_risk.shape:
        raise InputError(
            f"log risks, times and event flags must have one shape (n,), got {tuple(log_risk.shape)}, "
            f"{tuple(time.shape)}, {tuple(event.shape)}"
        )
    if log_risk.dtype in (torch.float16, torch.bfloat16):
        log_risk = log_risk.float()
    seen = event.to(torch.bool)
    if not bool(seen.any()):
        return log_risk.sum() * 0.0
    order = torch.argsort(time, descending=True, stable=True)
    risk, seen = log_risk[order], seen[order]
    _, of_row, sizes = torch.unique_consecutive(time[order], return_inverse=True, return_counts=True)
    at_risk = torch.logcumsumexp(risk, 0)[sizes.cumsum(0) - 1]  # all with this time or a later one
    mine = at_risk[of_row[seen]]
    loss = (mine - risk[seen]).sum()
    if ties == "efron":
        loss = loss + _efron(risk[seen], of_row[seen], mine, len(sizes))
    return loss / seen.sum() if reduction == "mean" else loss


def _efron(risk: Tensor, of_row: Tensor, at_risk: Tensor, groups: int) -> Tensor:
    """Return what Efron's form adds: log(1 − l/d · share of the tied events in their risk set), l = 0 … d − 1."""
    tied = torch.bincount(of_row, minlength=groups)
    share = torch.zeros(groups, dtype=risk.dtype, device=risk.device).index_add(0, of_row, torch.exp(risk - at_risk))
    starts = tied.cumsum(0) - tied
    step = torch.arange(len(risk), device=risk.device) - starts[of_row]  # rows of a group lie side by side
    part = step.to(risk.dtype) / tied[of_row].to(risk.dtype)
    return torch.log1p(-part * share[of_row]).sum()
