"""What is trained at which rate: parameter groups, AdamW, and a schedule that is a pure function of the step.

Comes in: a module and :class:`chiasm.train.recipe.OptimConfig`. Goes out: an optimizer whose groups carry their factor,
and the rate of any step. The schedule holds no state, so a resumed run cannot drift from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from chiasm.errors import ConfigError

if TYPE_CHECKING:
    from chiasm.train.recipe import OptimConfig

Part = Literal["image", "text", "projection", "scale"]

# Position tables and class tokens are matrices in shape only: pulling them to zero has no meaning as regularisation.
_TABLES = ("embedding", "pos_embed", "cls_token", "class_token", "relative_position", "query_token")
_PROJECTIONS = ("visual.proj", "visual.head.", "text_projection", "text.proj.", "visual.attnpool.c_proj.", "visual.fc.")


def part_of(name: str) -> Part:
    """Return which part of a dual encoder a parameter belongs to, by its name in the open_clip layout.

    LoRA updates belong to their tower. A name without a known prefix counts as text, as in OpenAI's layout.
    """
    name = plain_name(name)
    if name in ("logit_scale", "logit_bias"):
        return "scale"
    if any(name == p or (p.endswith(".") and name.startswith(p)) for p in _PROJECTIONS):
        return "projection"
    return "image" if name.startswith("visual.") else "text"


def plain_name(name: str) -> str:
    """Return a parameter's name without what wrappers (DistributedDataParallel) put in front of it."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def is_decayed(name: str, parameter: nn.Parameter, embeddings: Iterable[int] = ()) -> bool:
    """Return whether weight decay applies: to matrices and filters, never to biases, norms, scales or tables.

    Args:
        name: Dotted name.
        parameter: The tensor.
        embeddings: ``id`` of every parameter that an ``nn.Embedding`` owns.
    """
    if parameter.ndim < 2 or id(parameter) in embeddings:
        return False
    return not any(table in name.lower() for table in _TABLES)


def _factors(config: OptimConfig) -> dict[Part, float]:
    return {
        "image": config.image_lr_factor,
        "text": config.text_lr_factor,
        "projection": config.projection_lr_factor,
        "scale": 1.0,
    }


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return AdamW groups of the parameters that train: part × decay, each with its ``factor`` of the rate.

    Raises:
        ConfigError: When nothing is left to train.
    """
    factors = _factors(config)
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    groups: dict[tuple[Part, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if not parameter.requires_grad:
            continue
        decayed = is_decayed(name, parameter, tables)
        group = groups.setdefault(
            (part, decayed),
            {
                "params": [],
                "names": [],
                "part": part,
                "factor": factors[part],
                "weight_decay": config.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(plain_name(name))
    if not groups:
        raise ConfigError("nothing is left to train: both towers are locked and have no projection")
    return list(groups.values())


def lock_parts(model: nn.Module, config: OptimConfig) -> None:
    """Lock the parts of a model whose factor of the rate is 0."""
    for part, factor in _factors(config).items():
        if factor == 0.0:
            for name, parameter in model.named_parameters():
                if part_of(name) == part:
                    parameter.requires_grad_(False)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over :func:`parameter_groups`, fused where every parameter allows it.

    Parts whose factor is 0 are locked first, so that no gradient is computed for them.
    """
    lock_parts(model, config)
    groups = parameter_groups(model, config)
    tensors = [p for g in groups for p in g["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in tensors)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Return the number of warm-up steps: the count if stated, else the fraction of the run, at most all of it."""
    steps = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_fraction * total_steps)
    return min(steps, total_steps)


def learning_rate(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """Return the rate of step ``step`` (the first is 0), before the factor of a group.

    It rises linearly to ``lr`` over the warm-up, reaching it on the warm-up's last step, then falls along half a cosine
    to ``lr · final_lr_fraction`` on the last step (or stays, for ``constant``).

    References:
        Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, one period. open_clip's ``cosine_lr`` falls to 0
        one step after the last; ours lands on its end within the run.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    last = total_steps - 1 - warmup
    progress = min(1.0, (step - warmup) / last) if last > 0 else 0.0
    floor = config.final_lr_fraction
    return config.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group ``rate`` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
