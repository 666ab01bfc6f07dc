"""An encoder's two towers as they run for inference: which fast form each of them takes, and when it is made anew.

In: a model and a precision. Out: :class:`Engine`, with the model's own signatures. A tower that has no fast form (a
foreign one, an adapted one, half-precision weights) runs as the model does, and says why. Nothing here is ever saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders.dual import DualEncoder, ProjectedTextTower
from chiasm.encoders.ensemble import EnsembleModel, side_by_side
from chiasm.encoders.image_side import ProjectedImageTower
from chiasm.encoders.inference.gate import Gate
from chiasm.encoders.inference.packed import NotPackable, require_plain
from chiasm.encoders.precision import Precision, resolve_precision
from chiasm.encoders.text import TextTransformer
from chiasm.encoders.vit import VisionTransformer
from chiasm.errors import PrecisionRefused

if TYPE_CHECKING:
    from chiasm.encoders.inference.gpu import GpuEngine

T = TypeVar("T")
ImageForm = Callable[[Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class TextForm(Protocol):
    """Token ids (batch, tokens) and, where known, lengths -> embeddings (batch, dim), float32."""

    def __call__(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Embed a batch."""
        ...


def make_engine(model: DualEncoder, precision: Precision, *, static_batch: int | None = None) -> Engine | GpuEngine:
    """Return how a model runs where it lies: packed on a CPU, under autocast elsewhere.

    Args:
        model: In eval mode.
        precision: Resolved for its device.
        static_batch: Of a GPU alone, see :class:`~chiasm.encoders.inference.gpu.GpuEngine`.
    """
    if model.device.type == "cpu":
        return Engine(model, precision)
    from chiasm.encoders.inference.gpu import GpuEngine

    return GpuEngine(model, precision, static_batch=static_batch)


class Engine:
    """A model's fast forms.

    Args:
        model: On the CPU, in eval mode; its weights are copied where packing needs it.
        precision: ``fp32``, ``bf16`` or ``int8``; int8 is for the images of native ViTs alone, texts then run in what
            ``auto`` means.

    Attributes:
        plain: Side -> why it has no fast form; empty when both have one.
        gate: What compares int8 vectors with float32 ones; None in other precisions.
    """

    def __init__(self, model: DualEncoder, precision: Precision) -> None:
        self.plain: dict[str, str] = {}
        self._model = model
        dtype = DTYPES[precision]
        words = dtype if precision != "int8" else DTYPES[_beside_int8()]
        self.gate = Gate(model.encode_image) if precision == "int8" else None
        self._image: ImageForm | None = None
        self._text: TextForm | None = None
        with torch.inference_mode():
            if model.config.has_image:
                self._image = self._form("image", lambda: image_form(model, dtype))
            if model.config.has_text:
                self._text = self._form("text", lambda: text_form(model, words))

    def encode_image(self, pixels: Tensor, normalize: bool = False, *, warn: bool = True) -> Tensor:
        """As :meth:`DualEncoder.encode_image`, without prior images.

        Raises:
            PrecisionRefused: int8 is too far from float32 on these images, or this tower has no int8 form.
        """
        if self._image is None:
            if self.gate is not None and "image" in self.plain:
                raise PrecisionRefused(
                    f"this image tower has no int8 form: {self.plain['image']}", hint="use precision `bf16` or `fp32`"
                )
            return self._model.encode_image(pixels, normalize=normalize)
        features = self._image(pixels)
        if self.gate is not None:
            self.gate.see(pixels, features, warn=warn)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: Tensor, lengths: Tensor | None = None, normalize: bool = False) -> Tensor:
        """As :meth:`DualEncoder.encode_text`."""
        if self._text is None:
            return self._model.encode_text(ids, lengths, normalize=normalize)
        features = self._text(ids, lengths)
        return F.normalize(features, dim=-1) if normalize else features

    def _form(self, side: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except NotPackable as reason:
            self.plain[side] = str(reason)
            return None


def _beside_int8() -> Precision:
    """What texts are encoded in while images are int8."""
    chosen = resolve_precision("auto")
    return "fp32" if chosen == "int8" else chosen


def image_form(model: DualEncoder, dtype: torch.dtype) -> ImageForm:
    """Return the fast form of a model's image side.

    Raises:
        NotPackable: It has none.
    """
    if isinstance(model, EnsembleModel):
        forms = [image_form(member, dtype) for member in model.models()]
        return lambda pixels: side_by_side([form(pixels) for form in forms])
    side = model.image_side()
    if isinstance(side, ProjectedImageTower):
        require_plain(side, ProjectedImageTower)
        trunk, head = tower_form(side.trunk, dtype), side.head
        return lambda pixels: head(trunk(pixels))
    return tower_form(side, dtype)


def tower_form(tower: nn.Module, dtype: torch.dtype) -> ImageForm:
    """Return the fast form of an image tower; ``NotPackable`` where it has none."""
    if isinstance(tower, VisionTransformer):
        from chiasm.encoders.inference.vit import PackedViT

        return PackedViT(tower, dtype=dtype)
    if dtype == torch.int8:
        raise NotPackable(f"{type(tower).__name__} is not VisionTransformer")
    from chiasm.encoders.inference.resnet import RESNETS, resnet_form

    if type(tower) in RESNETS:
        return resnet_form(tower, dtype)
    from chiasm.encoders.inference.foreign import foreign_form

    return foreign_form(tower, dtype)


def text_form(model: DualEncoder, dtype: torch.dtype) -> TextForm:
    """Return the fast form of a model's text side; ``NotPackable`` where it has none."""
    if isinstance(model, EnsembleModel):
        members = [text_form(member, dtype) for member in model.models()]
        return lambda ids, lengths: side_by_side([form(ids, lengths) for form in members])
    require_plain(model, DualEncoder)
    side: Any = model.text
    if isinstance(side, ProjectedTextTower):
        if not isinstance(side.transformer, TextTransformer):
            return projected_text_form(side, dtype)
        require_plain(side, ProjectedTextTower)
        require_plain(side.transformer, TextTransformer)
        trunk, proj = text_parts_form(side.transformer, dtype), side.proj
        return lambda ids, lengths=None: proj(trunk(ids, lengths))
    if side is not None:
        raise NotPackable(f"{type(side).__name__} has no fast form")
    return text_parts_form(model, dtype)


def projected_text_form(side: ProjectedTextTower, dtype: torch.dtype) -> TextForm:
    """Return the fast form of a text tower that is not native: BERT's own, or in bfloat16 that of any module."""
    from chiasm.encoders.inference.bert import PackedBertTower

    try:
        return PackedBertTower(side, dtype=dtype)
    except NotPackable:
        if dtype != torch.bfloat16:
            raise
    from chiasm.encoders.inference.foreign import foreign_text_form

    twin: Any = foreign_text_form(side, dtype)
    form: TextForm = twin
    return form


def text_parts_form(parts: Any, dtype: torch.dtype) -> TextForm:
    """Return the fast form of whatever holds the parts of a native text tower; see :class:`PackedText`."""
    from chiasm.encoders.inference.text import PackedText

    return PackedText(parts, dtype=dtype)
