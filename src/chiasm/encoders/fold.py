"""CLIP-IT's heads with everything linear multiplied out: the same logits with fewer weights and fewer layers.

In: trained :class:`DistilledHeads`. Out: :class:`FoldedHeads`. Only what is exact in real numbers is folded:

- the standardisation of the features goes into the layers behind it;
- ``h_d`` and the first layer of ``h_t`` become one layer, unless the predicted embedding is brought to a fixed length in
  between: the length depends on the image, so no constant matrix can stand for it. (Nor where the one layer would have
  more weights than the two: a text embedding narrower than what lies around it.)
- the fusion layer goes into the last layers of ``h_v`` and ``h_t``; where nothing nonlinear is left, all is one layer.

Products are computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.config import build, to_mapping
from chiasm.encoders.heads import SLOPE, DistilledHeads, FeatureNorm
from chiasm.errors import ConfigError

Between = Literal["leaky_relu", "normalize", "nothing"]
#: |mean| / deviation of a feature from which on its mean is subtracted first: multiplied out, the two large numbers
#: ``w·x`` and ``w·mean`` would lose in float32 what the fold must keep.
LARGEST_OFFSET = 30.0
#: Heads have at most two layers each.
MAX_LAYERS = 8


@dataclass(frozen=True)
class FoldedConfig:
    """Shapes of folded heads.

    Attributes:
        width: Numbers per image that the backbone gives.
        classes: Classes.
        vision: Outputs of each layer from the features to logits; LeakyReLU stands between two.
        text: The same of the path by way of the predicted text embedding; empty where that was folded away.
        between: What stands between two layers of ``text``.
        centred: Whether the mean of the features is subtracted first instead of being folded.
        kept: What could not be folded, one sentence each.
    """

    width: int
    classes: int
    vision: tuple[int, ...]
    text: tuple[int, ...] = ()
    between: tuple[Between, ...] = ()
    centred: bool = False
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vision", "text"):
            sizes = getattr(self, name)
            if any(n < 1 for n in sizes) or (sizes and sizes[-1] != self.classes):
                raise ConfigError(f"`folded.{name}` must be positive sizes that end in {self.classes}")
        if not self.vision or self.width < 1 or self.classes < 2 or len(self.vision) + len(self.text) > MAX_LAYERS:
            raise ConfigError("`folded` states no classifier")
        if len(self.between) != max(len(self.text) - 1, 0):
            raise ConfigError(f"`folded.between` must have {max(len(self.text) - 1, 0)} entries")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return to_mapping(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ConfigError: Unknown field, wrong type or impossible sizes.
        """
        return build(cls, values, where="folded.")

    @property
    def multiplications(self) -> int:
        """Multiply-adds per image: the weights without the biases."""
        total = 0
        for sizes in (self.vision, self.text):
            total += sum(a * b for a, b in zip((self.width, *sizes)[:-1], sizes, strict=True))
        return total


class FoldedHeads(nn.Module):
    """``logits = vision(v) + text(v)``, without a predicted text embedding that could be looked at."""

    mean: Tensor | None

    def __init__(self, config: FoldedConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.width) if config.centred else None)
        self.vision = _layers(config.width, config.vision)
        self.text = _layers(config.width, config.text)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (batch, classes) of features (batch, width)."""
        if self.mean is not None:
            features = features - self.mean
        between: list[Between] = ["leaky_relu"] * (len(self.vision) - 1)
        logits = _run(self.vision, features, tuple(between))
        return logits + _run(self.text, features, self.config.between) if len(self.text) else logits


def fold_heads(heads: DistilledHeads) -> FoldedHeads:
    """Multiply out what is linear; the argument is not changed.

    Args:
        heads: Trained, in any mode.

    Returns:
        Heads with the same logits up to the rounding of float32, in eval mode on the same device;
        ``config.kept`` says what could not be folded and why.
    """
    config = heads.config
    vision, text = [_affine(x) for x in _linears(heads.vision)], list[_Affine]()
    between: list[Between] = []
    kept: list[str] = []
    if heads.distill is not None and heads.text is not None and heads.fusion is not None:
        fusion = _affine(heads.fusion)
        toward, after = [_affine(x) for x in _linears(heads.distill)], [_affine(x) for x in _linears(heads.text)]
        by_vision, by_text = fusion.weight[:, : config.classes], fusion.weight[:, config.classes :]
        vision[-1] = _Affine(by_vision @ vision[-1].weight, by_vision @ vision[-1].bias + fusion.bias)
        after[-1] = _Affine(by_text @ after[-1].weight, by_text @ after[-1].bias)
        between = ["leaky_relu"] * (len(toward) - 1)
        if config.text_length is None:
            joined = after[0].behind(toward[-1])
            all_linear = len(vision) == len(toward) == len(after) == 1
            if all_linear or joined.weight.numel() <= toward[-1].weight.numel() + after[0].weight.numel():
                text = [*toward[:-1], joined, *after[1:]]
            else:
                kept.append("h_d and h_t: the text embedding is so narrow that one layer would have more weights")
                text = [*toward, *after]
                between.append("nothing")
        else:
            kept.append("h_d and h_t: the predicted text embedding is brought to a fixed length between them")
            scaled = _Affine(after[0].weight * config.text_length, after[0].bias)
            text = [*toward, scaled, *after[1:]]
            between.append("normalize")
        between += ["leaky_relu"] * (len(after) - 1)
    mean, scale = _statistics(heads.norm, config.width)
    centred = bool((mean * scale).abs().max() > LARGEST_OFFSET)
    if centred:
        kept.append(f"the features' means: one is more than {LARGEST_OFFSET:.0f} deviations from 0")
    inner = torch.zeros_like(mean) if centred else mean
    for path in (vision, text):
        if path:
            weight = path[0].weight * scale
            path[0] = _Affine(weight, path[0].bias - weight @ inner)
    if len(vision) == len(text) == 1:
        vision, text = [_Affine(vision[0].weight + text[0].weight, vision[0].bias + text[0].bias)], []
    folded = FoldedHeads(
        FoldedConfig(
            width=config.width,
            classes=config.classes,
            vision=tuple(len(a.bias) for a in vision),
            text=tuple(len(a.bias) for a in text),
            between=tuple(between),
            centred=centred,
            kept=tuple(kept),
        )
    )
    with torch.no_grad():
        for head, path in ((folded.vision, vision), (folded.text, text)):
            for layer, affine in zip(_linears(head), path, strict=True):
                layer.weight.copy_(affine.weight)
                layer.bias.copy_(affine.bias)
        if folded.mean is not None:
            folded.mean.copy_(mean)
    return folded.to(next(heads.parameters()).device).eval()


class _Affine(NamedTuple):
    """``weight @ x + bias`` in float64."""

    weight: Tensor
    bias: Tensor

    def behind(self, first: _Affine) -> _Affine:
        """Return the one layer that does ``first`` and then this."""
        return _Affine(self.weight @ first.weight, self.weight @ first.bias + self.bias)


def _affine(layer: nn.Linear) -> _Affine:
    return _Affine(layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu())


def _linears(head: nn.Module) -> list[nn.Linear]:
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


def _statistics(norm: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    if isinstance(norm, FeatureNorm):
        return norm.mean.detach().double().cpu(), norm.scale.detach().double().cpu()
    return torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)


def _layers(width: int, sizes: tuple[int, ...]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b) for a, b in zip((width, *sizes)[:-1], sizes, strict=True))


def _run(layers: nn.ModuleList, x: Tensor, between: tuple[Between, ...]) -> Tensor:
    for i, layer in enumerate(layers):
        if i and between[i - 1] != "nothing":
            x = F.leaky_relu(x, SLOPE) if between[i - 1] == "leaky_relu" else F.normalize(x, dim=-1)
        x = layer(x)
    return x
