"""The declaration of an encoder: frozen configurations of both towers, their projections and the whole.

In: plain values (a TOML table, a JSON object of a model directory). Out: validated, hashable-by-digest values that
``encoders.build`` turns into modules. torch is not imported here, so recipes and the catalog stay light. The face that
users hold, :class:`Encoder`, lives in ``encoders.face`` and is re-exported lazily from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from chiasm.config import build, to_mapping
from chiasm.errors import ConfigError
from chiasm.types import Preprocess, digest_of

if TYPE_CHECKING:
    from chiasm.encoders.face import Encoder, weights_digest

__all__ = [
    "Activation",
    "Encoder",
    "EncoderConfig",
    "ImageTowerConfig",
    "LoraConfig",
    "ProjectionConfig",
    "TextTowerConfig",
    "weights_digest",
]

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "swiglu"]
MAX_LOG_LOGIT_SCALE = math.log(100.0)


def __getattr__(name: str) -> Any:
    if name in ("Encoder", "weights_digest"):
        from chiasm.encoders import face

        return getattr(face, name)
    raise AttributeError(f"module `{__name__}` has no attribute {name!r}")


def _check(condition: bool, field_name: str, problem: str, *, hint: str | None = None) -> None:
    if not condition:
        raise ConfigError(f"`{field_name}` {problem}", hint=hint)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a tower whose own weights stay locked (Hu et al. 2021).

    Attributes:
        rank: Rank of the update.
        alpha: The update is multiplied by ``alpha / rank``.
        dropout: On the input of the update.
        targets: Ends of names of the linear layers to adapt; empty: the adapter's default for the tower.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.rank >= 1, "lora.rank", f"must be at least 1, got {self.rank}")
        _check(self.alpha > 0, "lora.alpha", f"must be positive, got {self.alpha}")
        _check(0 <= self.dropout < 1, "lora.dropout", f"must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class ImageTowerConfig:
    """One image tower.

    Attributes:
        kind: ``vit`` and ``resnet`` are the native CLIP towers; ``named`` is one of the field's other towers that
            chiasm has (``encoders.named``); ``huggingface`` is any vision model of transformers; ``python`` is a
            factory in the user's own package.
        image_size: Side of the square input, in pixels.
        width: Channels of the ViT, or of the ResNet's stem (64 in RN50).
        layers: Blocks of the ViT, or blocks per stage of the ResNet, ``(3, 4, 6, 3)``.
        heads: Attention heads; None: ``width // 64`` (ViT), ``final channels // 64`` (ResNet's attention pool).
        patch_size: Side of a ViT's patch, in pixels.
        mlp_ratio: Hidden width of the ViT's MLP over its width.
        activation: Of the ViT's MLP. OpenAI's weights and all fine-tunes of them need ``quick_gelu``. ``swiglu`` is a
            SiLU gate (Shazeer 2020): the first half of the hidden width, through SiLU, times the second half.
        pool: ``cls`` takes the class token, ``mean`` averages the patch tokens, ``attention`` pools with a learned
            query, ``map`` pools with SigLIP's learned query and MLP, ``none`` takes what a foreign tower itself
            returns. ``auto`` is resolved at construction: ``cls`` for ``vit``, ``attention`` for ``resnet``, ``none``
            otherwise.
        pre_norm: Whether the ViT has CLIP's LayerNorm before the first block (``ln_pre``).
        ln_eps: Epsilon of every LayerNorm of the ViT.
        patch_bias: Whether the ViT's patch embedding has a bias (timm's and transformers' do, CLIP's does not).
        layer_scale: Whether each branch of the ViT's blocks is multiplied channel by channel (Touvron et al. 2021,
            LayerScale; ``ls_1`` and ``ls_2``).
        registers: Learned tokens of the ViT between the class token and the patches, without positions (Darcet et al.
            2024).
        class_token: Whether a ViT has a class token; None: it has one (SigLIP's has none).
        position_std: Standard deviation of the positions of a ResNet's attention pool at the start of training; None:
            OpenAI's 1/sqrt(channels). With 1.0 the heads look at different places from the first step, which a small
            model on little data needs to learn left from right (measured: docs/lab-notes.md, 2026-11-21).
        source: Foreign towers only: name in ``encoders.named``, model directory or hub name, or
            ``package.module:factory``.
        options: Foreign towers only: passed to the builder (checked there).
        output_dim: Foreign towers only: the width that the tower must have, when it is worth stating; None: its own.
        freeze: Lock the tower's weights; its projection still trains.
        lora: Adapt a locked tower with low-rank updates.
    """

    kind: Literal["vit", "resnet", "named", "huggingface", "python"] = "vit"
    image_size: int = 224
    width: int = 768
    layers: int | tuple[int, ...] = 12
    heads: int | None = None
    patch_size: int = 32
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"
    pool: Literal["auto", "cls", "mean", "attention", "map", "none"] = "auto"
    pre_norm: bool = True
    ln_eps: float = 1e-5
    patch_bias: bool = False
    layer_scale: bool = False
    registers: int = 0
    class_token: bool | None = None
    position_std: float | None = None
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    output_dim: int | None = None
    freeze: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.pool == "auto":
            natural = {"vit": "cls", "resnet": "attention"}.get(self.kind, "none")
            object.__setattr__(self, "pool", natural)
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("image_size", "width", "patch_size"):
            _check(getattr(self, name) >= 1, f"image.{name}", f"must be at least 1, got {getattr(self, name)}")
        _check(
            self.output_dim is None or self.output_dim >= 1,
            "image.output_dim",
            f"must be at least 1, got {self.output_dim}",
        )
        if self.kind == "vit":
            self._check_vit()
        elif self.kind == "resnet":
            self._check_resnet()
        else:
            _check(bool(self.source), "image.source", f"is missing for a `{self.kind}` tower")
        if self.position_std is not None:
            _check(self.position_std >= 0, "image.position_std", f"must not be negative, got {self.position_std}")
            _check(
                self.kind == "resnet" and self.pool == "attention",
                "image.position_std",
                "belongs to a `resnet` with an attention pool",
            )
        if self.kind != "vit":
            _check(
                not (self.patch_bias or self.layer_scale or self.registers),
                "image.kind",
                f"is `{self.kind}`, but `patch_bias`, `layer_scale` and `registers` belong to a `vit`",
            )
        _check(self.registers >= 0, "image.registers", f"must not be negative, got {self.registers}")
        if self.is_native:
            _check(self.source is None, "image.source", f"has no meaning for the native kind `{self.kind}`")
            _check(not self.options, "image.options", f"has no meaning for the native kind `{self.kind}`")

    def _check_vit(self) -> None:
        _check(isinstance(self.layers, int) and self.layers >= 1, "image.layers", "must be a number ≥ 1 for a `vit`")
        if self.has_class_token:  # others may leave pixels over at the right and the bottom, as SigLIP's 384 / 14 does
            _check(
                self.image_size % self.patch_size == 0,
                "image.image_size",
                f"must be a multiple of the patch size {self.patch_size}, got {self.image_size}",
            )
        _check(
            self.image_size >= self.patch_size,
            "image.image_size",
            f"must be at least the patch size {self.patch_size}, got {self.image_size}",
        )
        _check(
            self.has_class_token or self.pool in ("mean", "map"),
            "image.pool",
            f"is `{self.pool}`, which needs the class token that `image.class_token` takes away",
            hint='use `pool = "map"` or `"mean"`',
        )
        _check(
            self.pool_heads >= 1 and self.width % self.pool_heads == 0,
            "image.heads",
            f"must divide the width {self.width}, got {self.heads}",
            hint="state `heads` when the width is no multiple of 64",
        )
        _check(self.pool != "none", "image.pool", "is `none`, which only foreign towers know")
        _check(self.mlp_ratio > 0, "image.mlp_ratio", f"must be positive, got {self.mlp_ratio}")
        _check(
            self.activation != "swiglu" or int(self.width * self.mlp_ratio) % 2 == 0,
            "image.mlp_ratio",
            f"must give an even hidden width for `swiglu`, got {int(self.width * self.mlp_ratio)}",
        )
        _check(self.ln_eps > 0, "image.ln_eps", f"must be positive, got {self.ln_eps}")

    def _check_resnet(self) -> None:
        _check(
            isinstance(self.layers, tuple) and 1 <= len(self.layers) <= 4 and min(self.layers) >= 1,
            "image.layers",
            "must list the blocks of one to four stages for a `resnet`",
            hint="RN50 is `layers = [3, 4, 6, 3]`, `width = 64`",
        )
        _check(self.width % 2 == 0, "image.width", f"must be even for a `resnet`, got {self.width}")
        stride = self.stride_px
        _check(
            self.image_size % stride == 0,
            "image.image_size",
            f"must be a multiple of the stride {stride}, got {self.image_size}",
        )
        _check(self.pool in ("attention", "mean"), "image.pool", f"must be `attention` or `mean`, got `{self.pool}`")
        _check(
            self.pool_heads >= 1 and self.final_channels % self.pool_heads == 0,
            "image.heads",
            f"must divide the final channels {self.final_channels}, got {self.heads}",
            hint="state `heads` when the final channels are no multiple of 64",
        )

    @property
    def is_native(self) -> bool:
        """Whether the tower is one of chiasm's own (``vit``, ``resnet``)."""
        return self.kind in ("vit", "resnet")

    @property
    def has_class_token(self) -> bool:
        """Whether a ViT has a class token."""
        return self.class_token is not False

    @property
    def final_channels(self) -> int:
        """Channels before pooling of a native tower."""
        return self.width if self.kind == "vit" else self.width * 4 * 2 ** (self._stages - 1)

    @property
    def stride_px(self) -> int:
        """Pixels between two neighbouring positions of a native tower's feature map."""
        return self.patch_size if self.kind == "vit" else 4 * 2 ** (self._stages - 1)

    @property
    def _stages(self) -> int:
        return len(self.layers) if isinstance(self.layers, tuple) else 1

    @property
    def pool_heads(self) -> int:
        """Attention heads, with OpenAI's rule of 64 channels a head where none are stated."""
        return self.heads if self.heads is not None else self.final_channels // 64


@dataclass(frozen=True)
class TextTowerConfig:
    """One text tower.

    Attributes:
        kind: ``clip`` is the native transformer; ``named`` is one of the field's other towers that chiasm has
            (``encoders.named``); ``huggingface`` is any text encoder of transformers; ``python`` is a factory in the
            user's own package.
        context_length: Tokens per text, special tokens included.
        vocab_size: Rows of the token embedding (native only).
        width: Channels (native only).
        layers: Blocks (native only).
        heads: Attention heads; None: ``width // 64`` (native only).
        mlp_ratio: Hidden width of the MLP over the width (native only).
        activation: Of the MLP (native only).
        pool: ``eot`` takes the end-of-text token, ``mean`` averages the text's own tokens (padding excluded), ``last``
            takes the last position of the full context (SigLIP), ``cls`` takes the first token, ``appended`` takes a
            learned token behind the full context (CoCa; native only). ``auto`` is resolved at construction: ``eot``
            for ``clip``, ``mean`` otherwise.
        causal: Whether a token sees only what precedes it (native only). Without it padding is seen, as in SigLIP.
        cls_mask: What the token of ``appended`` sees. ``published``, the default, is open_clip's mask, with which all
            its CoCa models were trained: moved by one position, so that the first padding is seen and the token itself
            is not, unless the text fills the context. ``correct`` is what was meant: the text and the token itself.
        ln_eps: Of all LayerNorms (native only); None: 1e-5, CLIP's.
        source: Foreign towers only: name in ``encoders.named``, model directory or hub name, or
            ``package.module:factory``.
        options: Foreign towers only: passed to the builder (checked there).
        freeze: Lock the tower's weights; its projection still trains.
        lora: Adapt a locked tower with low-rank updates.
    """

    kind: Literal["clip", "named", "huggingface", "python"] = "clip"
    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int | None = None
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"
    pool: Literal["auto", "eot", "cls", "mean", "last", "appended"] = "auto"
    causal: bool = True
    cls_mask: Literal["published", "correct"] | None = None
    ln_eps: float | None = None
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    freeze: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.pool == "auto":
            object.__setattr__(self, "pool", "eot" if self.kind == "clip" else "mean")
        for name in ("context_length", "vocab_size", "width", "layers"):
            _check(getattr(self, name) >= 1, f"text.{name}", f"must be at least 1, got {getattr(self, name)}")
        _check(self.cls_mask is None or self.pool == "appended", "text.cls_mask", 'belongs to `text.pool = "appended"`')
        if self.kind != "clip":
            _check(bool(self.source), "text.source", f"is missing for a `{self.kind}` tower")
            _check(self.pool != "appended", "text.pool", "is `appended`, which only native towers know")
            return
        _check(self.activation != "swiglu", "text.activation", "is `swiglu`, which only image towers know")
        _check(self.ln_eps is None or self.ln_eps > 0, "text.ln_eps", f"must be positive, got {self.ln_eps}")
        _check(self.source is None, "text.source", "has no meaning for the native kind `clip`")
        _check(not self.options, "text.options", "has no meaning for the native kind `clip`")
        _check(self.mlp_ratio > 0, "text.mlp_ratio", f"must be positive, got {self.mlp_ratio}")
        _check(
            self.attention_heads >= 1 and self.width % self.attention_heads == 0,
            "text.heads",
            f"must divide the width {self.width}, got {self.heads}",
            hint="state `heads` when the width is no multiple of 64",
        )
        _check(
            self.causal or self.pool != "appended", "text.causal", "is false, but `appended` is made for a causal mask"
        )
        _check(
            not (self.causal and self.pool == "cls"),
            "text.pool",
            "is `cls`, but under a causal mask the first token sees nothing of the text",
            hint='use `pool = "eot"` or `causal = false`',
        )

    @property
    def is_native(self) -> bool:
        """Whether the tower is chiasm's own."""
        return self.kind == "clip"

    @property
    def attention_heads(self) -> int:
        """Attention heads, with OpenAI's rule of 64 channels a head where none are stated."""
        return self.heads if self.heads is not None else self.width // 64


@dataclass(frozen=True)
class ProjectionConfig:
    """How the towers' outputs enter the joint space.

    Attributes:
        dim: Dimensions of the joint space.
        image: ``linear`` without bias (CLIP's), ``mlp`` with one hidden layer, or ``none`` (widths must agree).
        text: The same for the text side.
        hidden: Width of the hidden layer of ``mlp``; None: the mean of its input and output widths.
        dropout: Inside ``mlp``, before its last layer.
        input_dropout: Before the first layer of ``mlp``.
        biased: Sides whose ``linear`` has a bias (the text side of SigLIP); None: neither.
        standardize: Towers whose output is first brought to mean 0 and deviation 1, number by number, with statistics
            gathered in training; for locked towers, whose statistics stand still.
    """

    dim: int = 512
    image: Literal["linear", "mlp", "none"] = "linear"
    text: Literal["linear", "mlp", "none"] = "linear"
    hidden: int | None = None
    dropout: float = 0.0
    input_dropout: float = 0.0
    biased: tuple[Literal["image", "text"], ...] | None = None
    standardize: tuple[Literal["image", "text"], ...] = ()

    def __post_init__(self) -> None:
        _check(self.dim >= 1, "projection.dim", f"must be at least 1, got {self.dim}")
        _check(self.hidden is None or self.hidden >= 1, "projection.hidden", f"must be at least 1, got {self.hidden}")
        for name in ("dropout", "input_dropout"):
            _check(0 <= getattr(self, name) < 1, f"projection.{name}", f"must be in [0, 1), got {getattr(self, name)}")
        for side in self.biased or ():
            _check(
                getattr(self, side) == "linear",
                "projection.biased",
                f"names `{side}`, whose projection is `{getattr(self, side)}`",
            )
        for side in self.standardize:
            _check(
                getattr(self, side) != "none", "projection.standardize", f"names `{side}`, whose projection is `none`"
            )

    def is_fused(self, side: Literal["image", "text"]) -> bool:
        """Whether a native tower holds its projection itself: one matrix (``proj``, ``text_projection``), or none."""
        return getattr(self, side) != "mlp" and side not in self.standardize and side not in (self.biased or ())


@dataclass(frozen=True)
class EncoderConfig:
    """A whole encoder: two towers, projections, scale, tokenizer and preprocessing. The default is OpenAI's ViT-B/32.

    Attributes:
        image: Image tower.
        text: Text tower.
        projection: Joint space.
        logit_scale_init: NATURAL LOG of the multiplier of cosines at the start of training, as the parameter
            ``logit_scale`` stores it: ln(1/0.07) = 2.6592 for CLIP, ln 10 for SigLIP; at most ln 100.
        logit_bias_init: Start of SigLIP's bias (-10); None: the model has no bias.
        tokenizer: What ``data.tokenizers.make_tokenizer`` reads.
        preprocess: How images are prepared; its size must be the image tower's.
        sides: ``both``; or ``image`` or ``text`` for a backbone of which the other side does not exist (its declaration
            is ignored).
        scale: ``learned``, or ``none`` for a model that was published without a logit scale.
        members: How many models of this kind stand side by side (``encoders.ensemble``); None: one.
    """

    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    logit_scale_init: float = math.log(1 / 0.07)
    logit_bias_init: float | None = None
    tokenizer: Mapping[str, Any] = field(default_factory=lambda: {"kind": "clip", "context_length": 77})
    preprocess: Preprocess = field(default_factory=Preprocess)
    sides: Literal["both", "image", "text"] = "both"
    scale: Literal["learned", "none"] = "learned"
    members: int | None = None

    def __post_init__(self) -> None:
        _check(
            0 <= self.logit_scale_init <= MAX_LOG_LOGIT_SCALE + 1e-6,
            "logit_scale_init",
            f"must be the natural log of a scale in [1, 100], got {self.logit_scale_init}",
            hint="ln(1/0.07) = 2.6592 is CLIP's",
        )
        _check(
            not self.has_image or self.preprocess.size == self.image.image_size,
            "preprocess.size",
            f"is {self.preprocess.size}, but `image.image_size` is {self.image.image_size}",
        )
        _check(self.members is None or self.members >= 2, "members", f"must be at least 2, got {self.members}")
        context = self.tokenizer.get("context_length", self.text.context_length)
        _check(
            not self.has_text or context == self.text.context_length,
            "tokenizer.context_length",
            f"is {context}, but `text.context_length` is {self.text.context_length}",
        )

    @property
    def dim(self) -> int:
        """Dimensions of the vectors: those of the joint space, of all members."""
        return self.projection.dim * (self.members or 1)

    @property
    def has_image(self) -> bool:
        """Whether there is an image tower."""
        return self.sides != "text"

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return self.sides != "image"

    @property
    def is_native(self) -> bool:
        """Whether all towers are chiasm's own: such a model can be built without memory (``device="meta"``)."""
        image = self.image.is_native or not self.has_image
        return image and (self.text.is_native or not self.has_text)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain JSON values; None fields are left out."""
        return to_mapping(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ConfigError: Unknown field (with a suggestion), wrong type or impossible value, with the dotted name.
        """
        return build(cls, values)

    @property
    def digest(self) -> str:
        """Short hash that changes with any field."""
        return digest_of(self.to_dict())
