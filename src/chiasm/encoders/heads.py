"""The small heads of CLIP-IT: vision features to class logits, by themselves and by way of a predicted text embedding.

In: features of a backbone (batch, width). Out: logits, and the text embedding that was predicted from the image. No text
enters here, neither in training nor later: reports act only through the loss on the prediction
(:mod:`chiasm.losses.distillation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.config import build, to_mapping
from chiasm.errors import ConfigError

Kind = Literal["linear", "mlp"]
#: Slope of LeakyReLU below zero, as in the reference.
SLOPE = 0.1


@dataclass(frozen=True)
class HeadsConfig:
    """Shapes of the heads.

    Attributes:
        width: Numbers per image that the backbone gives (D).
        classes: Classes (C).
        text_dim: Dimensions of the text embedding that is predicted (512 for CONCH and OpenAI's ViT-B).
        hidden: Hidden width of every ``mlp`` head; None: ``text_dim``.
        vision: Head ``h_v``: features to class logits.
        distill: Head ``h_d``: features to a text embedding.
        text: Head ``h_t``: a text embedding to class logits.
        text_length: The predicted embedding is scaled to this length before ``h_t``; None: left as it is, as the
            reference does. A cosine loss leaves the length free, and ``h_t`` suffers from that.
        detach_text: Whether the classification loss stops before ``h_d``, so that only the text teaches it.
        standardize: Bring every feature to mean 0 and deviation 1 with statistics of the training images.
        fused: False: ``h_v`` alone, the unimodal classifier.
    """

    width: int
    classes: int
    text_dim: int = 512
    hidden: int | None = None
    vision: Kind = "linear"
    distill: Kind = "linear"
    text: Kind = "mlp"
    text_length: float | None = 3.0
    detach_text: bool = False
    standardize: bool = True
    fused: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "text_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`heads.{name}` must be at least 1, got {getattr(self, name)}")
        if self.classes < 2:
            raise ConfigError(f"`heads.classes` must be at least 2, got {self.classes}")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"`heads.hidden` must be at least 1, got {self.hidden}")
        if self.text_length is not None and self.text_length <= 0:
            raise ConfigError(f"`heads.text_length` must be positive, got {self.text_length}")

    @property
    def hidden_width(self) -> int:
        """Hidden width of the ``mlp`` heads."""
        return self.hidden if self.hidden is not None else self.text_dim

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; None fields are left out."""
        values = to_mapping(self)
        if self.text_length is None:
            values["text_length"] = 0.0  # None is left out and would come back as the default
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ConfigError: Unknown field or wrong type.
        """
        values = dict(values)
        if values.get("text_length") == 0.0:
            values["text_length"] = None
        return build(cls, values, where="heads.")


class HeadsOutput(NamedTuple):
    """What the heads say of a batch.

    Attributes:
        logits: (batch, classes), unnormalised: the loss is cross-entropy of these, never of their softmax.
        text: (batch, text_dim), the predicted text embedding as ``h_d`` gives it; None for a unimodal classifier.
        vision_logits: (batch, classes) of ``h_v`` alone.
        text_logits: (batch, classes) of ``h_t`` on the predicted embedding; None for a unimodal classifier.
    """

    logits: Tensor
    text: Tensor | None
    vision_logits: Tensor
    text_logits: Tensor | None


class FeatureNorm(nn.Module):
    """Subtract the mean and divide by the deviation of the training images' features; no weights.

    Attributes:
        mean: (width,).
        scale: (width,), 1 / standard deviation; 1 where a feature is constant.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, features: Tensor) -> None:
        """Take the statistics of features (n, width)."""
        values = features.double()
        deviation = values.std(dim=0, unbiased=False)
        self.mean.copy_(values.mean(dim=0))
        self.scale.copy_(torch.where(deviation > 1e-8, 1 / deviation.clamp_min(1e-8), torch.ones_like(deviation)))

    def forward(self, features: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return (features - self.mean) * self.scale


def make_head(kind: Kind, inputs: int, outputs: int, hidden: int) -> nn.Module:
    """Return ``linear`` (with bias), or ``mlp``: linear, LeakyReLU(0.1), linear, as CLIP-IT's text head."""
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LeakyReLU(SLOPE), nn.Linear(hidden, outputs))


class DistilledHeads(nn.Module):
    """``logits = W [h_v(v); h_t(h_d(v))] + b`` (CLIP-IT's ``FuserModel``), or ``h_v(v)`` alone.

    The state dict has ``norm.*``, ``vision.*`` and, when fused, ``distill.*``, ``text.*``, ``fusion.*``.

    References:
        Karimian et al. 2025, CLIP-IT, arXiv:2504.16181. Deviations: the predicted embedding is scaled to a fixed length
        before ``h_t`` (``text_length``), features are standardised, and cross-entropy is of logits.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        hidden, classes = config.hidden_width, config.classes
        self.norm = FeatureNorm(config.width) if config.standardize else nn.Identity()
        self.vision = make_head(config.vision, config.width, classes, hidden)
        self.distill = make_head(config.distill, config.width, config.text_dim, hidden) if config.fused else None
        self.text = make_head(config.text, config.text_dim, classes, hidden) if config.fused else None
        self.fusion = nn.Linear(2 * classes, classes) if config.fused else None

    def forward(self, features: Tensor) -> HeadsOutput:
        """Return logits and predicted text embeddings of features (batch, width)."""
        features = self.norm(features)
        vision: Tensor = self.vision(features)
        if self.distill is None or self.text is None or self.fusion is None:
            return HeadsOutput(vision, None, vision, None)
        predicted: Tensor = self.distill(features)
        entering = self.enter_text_head(predicted.detach() if self.config.detach_text else predicted)
        text: Tensor = self.text(entering)
        return HeadsOutput(self.fusion(torch.cat([vision, text], dim=-1)), predicted, vision, text)

    def enter_text_head(self, embeddings: Tensor) -> Tensor:
        """Return text embeddings, predicted or real, at the length at which ``h_t`` takes them."""
        if self.config.text_length is None:
            return embeddings
        return F.normalize(embeddings, dim=-1) * self.config.text_length


def extra_parameters(config: HeadsConfig) -> int:
    """Return how many weights the fused heads have beyond ``h_v``.

    For linear ``h_d`` and ``mlp`` ``h_t`` of hidden width H and text dimension T this is
    ``T·D + T + H·T + H + H·C + C + 2·C² + C``.
    """
    return extra_multiplications(config) + sum(_outputs(config))


def extra_multiplications(config: HeadsConfig) -> int:
    """Return the multiply-adds per image of the fused heads beyond ``h_v``: their weights without the biases."""
    if not config.fused:
        return 0
    hidden, classes, dim = config.hidden_width, config.classes, config.text_dim

    def products(kind: Kind, inputs: int, outputs: int) -> int:
        return inputs * outputs if kind == "linear" else hidden * (inputs + outputs)

    return products(config.distill, config.width, dim) + products(config.text, dim, classes) + 2 * classes * classes


def _outputs(config: HeadsConfig) -> list[int]:
    if not config.fused:
        return []
    hidden = config.hidden_width
    distill = [config.text_dim] if config.distill == "linear" else [hidden, config.text_dim]
    text = [config.classes] if config.text == "linear" else [hidden, config.classes]
    return [*distill, *text, config.classes]
