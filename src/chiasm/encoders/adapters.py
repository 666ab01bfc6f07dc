"""What is put on towers: projections, locks and low-rank adapters.

In: a tower. Out: the same tower, locked or adapted in place. Linear layers and convolutions are adapted by peft. The
native transformers keep query, key and value in one matrix (``in_proj_weight``), which peft cannot adapt; they get a
parametrization that adds three independent updates, one each, as peft would give to three separate layers.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from chiasm.encoders.base import LoraConfig
from chiasm.encoders.transformer import Attention
from chiasm.errors import ConfigError

FUSED = "in_proj_weight"


class Standardize(nn.Module):
    """Bring every number of (..., width) to mean 0 and deviation 1 over the batch, in eval mode over all of training.

    Towers give numbers of very different spread, and weight decay and dropout treat all alike. The statistics are the
    plain mean over all batches seen, which suits locked towers. No weights.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, momentum=None)

    def forward(self, features: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        standard: Tensor = self.norm(features.reshape(-1, features.shape[-1]))
        return standard.view_as(features)


def make_projection(
    kind: Literal["linear", "mlp", "none"],
    in_dim: int,
    out_dim: int,
    hidden: int | None = None,
    dropout: float = 0.0,
    *,
    input_dropout: float = 0.0,
    standardize: bool = False,
    bias: bool = False,
) -> nn.Module:
    """Return the bridge from a tower's output into the joint space.

    Args:
        kind: ``linear`` without bias (CLIP's); ``mlp``: linear, GELU, linear, both without bias (open_clip's
            ``mlp`` head); ``none``.
        in_dim: Width of the tower's output.
        out_dim: Dimensions of the joint space.
        hidden: Width between the two layers of ``mlp``; None: the mean of the two widths, as in open_clip.
        dropout: Before the last layer of ``mlp``.
        input_dropout: Before the first layer of ``mlp``.
        standardize: Put :class:`Standardize` in front.
        bias: Whether ``linear`` has a bias after all (SigLIP's).

    Raises:
        ConfigError: ``none`` between different widths.
    """
    if kind == "none":
        if in_dim != out_dim:
            raise ConfigError(f"`projection` is `none`, but the tower has {in_dim} and the joint space {out_dim}")
        return nn.Identity()
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    if standardize:
        steps["standardize"] = Standardize(in_dim)
    if kind == "linear":
        linear = nn.Linear(in_dim, out_dim, bias=bias)
        if not standardize:
            return linear
        steps["0"] = linear
        return nn.Sequential(steps)
    width = hidden if hidden is not None else (in_dim + out_dim) // 2
    if input_dropout:
        steps["input_dropout"] = nn.Dropout(input_dropout)
    steps["0"] = nn.Linear(in_dim, width, bias=False)
    steps["1"] = nn.GELU()
    if dropout:
        steps["dropout"] = nn.Dropout(dropout)
    steps["2"] = nn.Linear(width, out_dim, bias=False)  # open_clip's name, with or without dropout before it
    return nn.Sequential(steps)


def freeze(module: nn.Module) -> nn.Module:
    """Lock all weights and switch to eval mode, so that dropout and batch statistics stand still; return the module."""
    return module.requires_grad_(False).eval()


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training would change, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class FusedLora(nn.Module):
    """A low-rank update of a matrix that holds query, key and value: each third gets its own (Hu et al. 2021).

    Deviation: dropout falls on the input features of the update for the whole batch at once, because a parametrization
    does not see the batch.
    """

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        rows, width = weight.shape
        self.scaling = config.alpha / config.rank
        self.dropout = config.dropout
        self.lora_A = nn.Parameter(torch.empty(3, config.rank, width, device=weight.device, dtype=weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(3, rows // 3, config.rank, device=weight.device, dtype=weight.dtype))
        for third in range(3):
            nn.init.kaiming_uniform_(self.lora_A[third], a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted matrix."""
        down: Tensor = self.lora_A
        if self.training and self.dropout:
            keep = F.dropout(torch.ones_like(down[:, :1]), self.dropout)
            down = down * keep
        return weight + (self.lora_B @ down).flatten(0, 1) * self.scaling


def apply_lora(module: nn.Module, config: LoraConfig) -> nn.Module:
    """Lock a tower and give it trainable low-rank updates, in place; return it.

    At first the updates are zero, so the tower's output does not change.

    Args:
        module: Any tower.
        config: Rank, alpha, dropout and targets. Without targets: all linear layers and fused QKV matrices, and in
            towers whose convolutions hold more weights than their linear layers also the ungrouped convolutions. A
            target may name an ungrouped convolution in any tower: ``conv1`` is the patch embedding of a ViT.

    Raises:
        ConfigError: Nothing to adapt, targets that match nothing, or a tower that is adapted already.
    """
    layers, fused = check_lora(module, config)
    module.requires_grad_(False)
    if layers:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        names = "|".join(re.escape(name) for name in layers)
        peft_config = PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=names,
            bias="none",
        )
        inject_adapter_in_model(peft_config, module)
    for name in fused:
        attention = module.get_submodule(name)
        update = FusedLora(attention.in_proj_weight, config)  # type: ignore[arg-type]
        parametrize.register_parametrization(attention, FUSED, update, unsafe=True)
    return module


def check_lora(module: nn.Module, config: LoraConfig) -> tuple[list[str], list[str]]:
    """Return the names of the layers and of the native attentions that :func:`apply_lora` would adapt; change nothing.

    Raises:
        ConfigError: As :func:`apply_lora`.
    """
    if has_lora(module):
        raise ConfigError("the tower has low-rank adapters already", hint="merge them first: `merge_lora(tower)`")
    layers, fused = _candidates(module, every=bool(config.targets))
    if config.targets:
        layers = [name for name in layers if _matches(name, config.targets)]
        fused = [name for name in fused if _matches(f"{name}.{FUSED}", config.targets)]
    if not layers and not fused:
        wanted = ", ".join(config.targets)
        raise ConfigError(
            f"no layer of the tower ends in one of `lora.targets` = {wanted}" if wanted else "nothing to adapt",
            hint="leave `lora.targets` empty to adapt every linear layer",
        )
    return layers, fused


def has_lora(module: nn.Module) -> bool:
    """Return whether a module has low-rank adapters that are not merged."""
    return any("lora_" in name for name, _ in module.named_parameters())


def merge_lora(module: nn.Module) -> nn.Module:
    """Add all low-rank updates to the weights and remove the adapters, in place; return the module.

    The names in the state dict are then those of the plain tower again, and outputs are the same up to rounding.
    """
    module.eval()
    for _, child in list(module.named_modules()):
        if isinstance(child, Attention) and parametrize.is_parametrized(child, FUSED):
            # torch takes the property off the class, which a deep copy shares with its original: give this one its own.
            kind = type(child)
            child.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
            parametrize.remove_parametrizations(child, FUSED, leave_parametrized=True)
            child.in_proj_weight.requires_grad_(False)
    if not has_lora(module):
        return module
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        layer.merge()  # type: ignore[operator]
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, layer.get_base_layer())
    return module


def _candidates(module: nn.Module, *, every: bool) -> tuple[list[str], list[str]]:
    """Names of layers that peft can adapt, and of native attentions; ``every``: convolutions whatever their share."""
    hidden = {
        f"{name}.{child}"
        for name, owner in module.named_modules()
        if isinstance(owner, nn.MultiheadAttention)  # reads its layers' weights directly, past any wrapper
        for child, _ in owner.named_modules()
    }
    linear, convolutions, fused = [], [], []
    sizes = {"linear": 0, "convolution": 0}
    for name, child in module.named_modules():
        if name in hidden or not name:
            continue
        if isinstance(child, nn.Linear):
            linear.append(name)
            sizes["linear"] += child.weight.numel()
        elif isinstance(child, nn.Conv2d):
            sizes["convolution"] += child.weight.numel()
            if child.groups == 1:
                convolutions.append(name)
        elif isinstance(child, Attention):
            fused.append(name)
            sizes["linear"] += child.in_proj_weight.numel()
    if every or sizes["convolution"] > sizes["linear"]:
        return linear + convolutions, fused
    return linear, fused


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
