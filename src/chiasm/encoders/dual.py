"""Two towers, one space: the module that is trained, saved and loaded.

In: pixels and token ids. Out: embeddings, and the scale that turns their cosines into logits. Native towers lie in
OpenAI's and open_clip's key layout (``visual.*``, ``transformer.*``, ``token_embedding.weight``,
``positional_embedding``, ``ln_final.*``, ``text_projection``, ``logit_scale``, for SigLIP ``logit_bias``). Any other
tower lies under ``visual.trunk.*`` and ``visual.head.*``, or ``text.transformer.*`` and ``text.proj.*``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.image_side import ProjectedImageTower
from chiasm.encoders.text import TEXT_PARTS, TextTransformer, check_lengths, text_features
from chiasm.encoders.vit import PatchMode, VisionTransformer
from chiasm.errors import InputError

__all__ = ["DualEncoder", "ProjectedImageTower", "ProjectedTextTower"]


class ProjectedTextTower(nn.Module):
    """Any text tower with a projection behind it.

    Args:
        transformer: A :class:`TextTransformer` without projection (ids, lengths), or a foreign tower (ids, mask); both
            give (batch, ``transformer.output_dim``).
        proj: Projection into the joint space.
        output_dim: Dimensions of the joint space.
        can_trim: Whether the tower ignores padding, so that cutting it off is exact.
    """

    def __init__(self, transformer: nn.Module, proj: nn.Module, output_dim: int, *, can_trim: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.proj = proj
        self.output_dim = output_dim
        self.can_trim = can_trim

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the embeddings (batch, output_dim), not normalised.

        Args:
            ids: (batch, tokens) integers, padded on the right.
            lengths: (batch,) tokens of each text. None: where the tower states its padding id, that marks the padding.
        """
        if isinstance(self.transformer, TextTransformer):
            embedded: Tensor = self.proj(self.transformer(ids, lengths))
            return embedded
        lengths = self.text_lengths(ids, lengths)
        if self.can_trim and len(ids):
            ids = ids[:, : int(lengths.max())]
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        projected: Tensor = self.proj(self.transformer(ids, mask))
        return projected

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return what still trains when the tower is locked."""
        return list(self.proj.parameters())

    def text_lengths(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the tokens of each text, (batch,): those given, or what is not padding, at least one.

        Raises:
            InputError: Lengths that do not fit, or none where the tower does not state its padding id.
        """
        if lengths is not None:
            return check_lengths(ids, lengths)
        pad_id = getattr(self.transformer, "pad_id", None)
        if pad_id is None:
            raise InputError(
                "this text tower does not state its padding id, so token ids need their lengths",
                hint="pass `lengths`, as `tokenizer.encode` returns them",
            )
        found: Tensor = (ids != pad_id).sum(1).clamp(min=1)
        return found


class DualEncoder(nn.Module):
    """An image tower and a text tower with a joint space (Radford et al. 2021).

    Args:
        visual: The image tower with its projection; None for a text backbone.
        text: The text tower with its projection; the parts of a :class:`TextTransformer` become this module's own, as
            in OpenAI's layout. None for an image backbone.
        config: What both were built from.

    Attributes:
        logit_scale: 0-dim parameter, the LOGARITHM of the multiplier of cosines, as in every CLIP checkpoint; None in
            models that were published without one.
        logit_bias: 0-dim parameter (SigLIP), or None.
    """

    def __init__(self, visual: nn.Module | None, text: nn.Module | None, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = visual
        self.text: nn.Module | None = None
        if isinstance(text, TextTransformer):
            for part in TEXT_PARTS:
                setattr(self, part, getattr(text, part))
            self.text_plan = text.text_plan
        else:
            self.text = text
        learned = config.scale == "learned" and config.sides == "both"
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init)) if learned else None
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def stored_config(self) -> EncoderConfig:
        """The declaration to save beside the weights: it rebuilds the architecture where a hub or a source is absent.

        A foreign tower that has an attribute ``stored`` (its own declaration, complete in itself) replaces its part.
        """
        image, text = self.config.image, self.config.text
        if self.config.has_image:
            image = getattr(self._trunk("image"), "stored", image)
        if self.config.has_text:
            text = getattr(self._trunk("text"), "stored", text)
        return dataclasses.replace(self.config, image=image, text=text)

    def encode_image(self, images: Tensor, normalize: bool = False, *, prior: Tensor | None = None) -> Tensor:
        """Return the embeddings (batch, dim) of pixels (batch, 3, size, size).

        Args:
            images: Pixels.
            normalize: Whether to scale rows to unit L2 norm.
            prior: Pixels of an earlier image of each patient, for a tower that compares (BioViL-T).

        Raises:
            InputError: A prior image for a tower that takes none.
        """
        tower: Any = self.image_side()
        if prior is not None and not getattr(getattr(tower, "trunk", None), "takes_prior", False):
            raise InputError("this image tower takes no prior image", hint="`biovil-t` does")
        features: Tensor = tower(images) if prior is None else tower(images, prior)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: Tensor, lengths: Tensor | None = None, normalize: bool = False) -> Tensor:
        """Return the embeddings (batch, dim) of token ids.

        Args:
            ids: (batch, tokens) integers.
            lengths: (batch,) tokens of each text, special tokens included, as ``tokenizer.encode`` gives them. None:
                native towers look for CLIP's end-of-text token, others for the padding id.
            normalize: Whether to scale rows to unit L2 norm.
        """
        if not self.config.has_text:
            raise InputError("this encoder has no text side", hint="`chiasm models` lists those that have both")
        parts: Any = self
        features: Tensor = text_features(parts, ids, lengths) if self.text is None else self.text(ids, lengths)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, ids: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``image_features`` and ``text_features`` of unit norm, and ``logit_scale``, the multiplier (a tensor).

        ``logit_bias`` is there too when the model has one.
        """
        if self.logit_scale is None:
            raise InputError("this encoder has no logit scale to train with")
        out = {
            "image_features": self.encode_image(images, normalize=True),
            "text_features": self.encode_text(ids, lengths, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias.clone()  # not the leaf itself, on which wrappers would hang their hooks
        return out

    def patch_features(self, images: Tensor, normalize: bool = True, mode: PatchMode = "auto") -> Tensor:
        """Return one vector of the joint space for every patch: (batch, rows, columns, dim).

        Args:
            images: (batch, 3, size, size).
            normalize: Whether to scale each to unit L2 norm.
            mode: Of a native ViT, see :meth:`VisionTransformer.patch_features`; others know ``auto`` only.

        Raises:
            InputError: A foreign tower that has no patch tokens, or a mode that the tower does not know.
        """
        tower: Any = self.image_side()
        if isinstance(tower, VisionTransformer):
            features = tower.patch_features(images, mode)
        elif mode != "auto":
            raise InputError(f"patch mode `{mode}` is known to a native `vit` only", hint="leave the mode at `auto`")
        else:
            features = tower.patch_features(images)
        return F.normalize(features, dim=-1) if normalize else features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass in both towers: less memory, the same gradients.

        Raises:
            InputError: A tower that cannot.
        """
        for side in self._sides():
            _checkpoint_tower(self._trunk(side), side, enable)

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; locked towers stay in eval mode, so their dropout and batch statistics stand still."""
        super().train(mode)
        if not mode:
            return self
        for side in self._sides():
            tower = self.config.image if side == "image" else self.config.text
            if tower.freeze and tower.lora is None:
                self._trunk(side).eval()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def _sides(self) -> tuple[str, ...]:
        return ("image", "text") if self.config.sides == "both" else (self.config.sides,)

    def image_side(self) -> nn.Module:
        """Return the image tower with its projection; ``InputError`` where there is none."""
        if self.visual is None:
            raise InputError("this encoder has no image side", hint="`chiasm models` lists those that have both")
        return self.visual

    def _trunk(self, side: str) -> nn.Module:
        tower: Any
        if side == "image":
            tower = self.visual.trunk if isinstance(self.visual, ProjectedImageTower) else self.visual
        elif self.text is None:
            tower = self.transformer
        else:
            tower = self.text.transformer if isinstance(self.text, ProjectedTextTower) else self.text
        assert isinstance(tower, nn.Module)
        return tower


def _checkpoint_tower(trunk: nn.Module, side: str, enable: bool) -> None:
    switch = "gradient_checkpointing_enable" if enable else "gradient_checkpointing_disable"
    tower: Any = trunk
    if hasattr(tower, "set_grad_checkpointing"):
        tower.set_grad_checkpointing(enable)
        return
    for module in tower.modules():
        if hasattr(module, switch):  # transformers' models
            getattr(module, switch)()
            return
    if enable:
        raise InputError(f"the {side} tower does not offer gradient checkpointing", hint="switch it off in the recipe")
