"""GLoRIA's two towers (Huang et al. 2021), which keep image regions and words beside the whole image and text.

In: pixels, or ids with their mask. Out: (batch, ``output_dim``), projected already, since regions and words share the
joint space: ``image_locals`` and ``word_features`` give them, ``losses.local`` compares them.

References: marshuang80/gloria ``gloria/models/vision_model.py`` and ``text_model.py``. Deviation: a ``[SEP]`` written out
inside of a text does not end it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders.base import ImageTowerConfig, TextTowerConfig
from chiasm.encoders.bert import BERT_OPTIONS, build_bert, hidden_layers, no_rows
from chiasm.encoders.classic_resnet import ClassicResNet
from chiasm.encoders.named import tower_options
from chiasm.encoders.vit import check_pixels
from chiasm.errors import ConfigError, InputError

if TYPE_CHECKING:
    from chiasm.data.tokenizers import Tokenizer

IMAGE_OPTIONS: Mapping[str, Any] = {"layers": (3, 4, 6, 3), "width": 64, "output_dim": 768, "upsample": 299}
#: ``last_layers``: how many hidden layers are added up.
TEXT_OPTIONS: Mapping[str, Any] = {**BERT_OPTIONS, "last_layers": 4}


class GloriaImageTower(nn.Module):
    """A ResNet on the enlarged image: its last stage is the image, its third stage the regions.

    Args:
        config: The declaration; its options are those of :data:`IMAGE_OPTIONS`. ``upsample`` is the side, in pixels, to
            which the tower itself enlarges its input, with aligned corners.

    Raises:
        ConfigError: Fewer than two stages.

    Attributes:
        output_dim: Dimensions of the joint space.
    """

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        options = tower_options(config, IMAGE_OPTIONS)
        if len(options["layers"]) < 2:
            raise ConfigError(
                "`image.options.layers` must list at least two stages: regions come from the last but one"
            )
        self.image_size = config.image_size
        self.upsample: int = options["upsample"]
        self.backbone = ClassicResNet(options["layers"], width=options["width"])
        self.output_dim: int = options["output_dim"]
        self.global_embedder = nn.Linear(self.backbone.channels[-1], self.output_dim)
        self.local_embedder = nn.Conv2d(self.backbone.channels[-2], self.output_dim, 1, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (batch, output_dim), not normalised."""
        embedded: Tensor = self.global_embedder(self._maps(pixels)[-1].mean((2, 3)))
        return embedded

    def image_locals(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of regions (batch, output_dim, rows, columns), not normalised; 19 × 19 as published."""
        embedded: Tensor = self.local_embedder(self._maps(pixels)[-2])
        return embedded

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Return :meth:`image_locals` as (batch, rows, columns, output_dim); their mean is not the image's embedding."""
        return self.image_locals(pixels).permute(0, 2, 3, 1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage of the ResNet in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        check_pixels(pixels, self.image_size)
        sides = (self.upsample, self.upsample)
        if pixels.shape[0]:
            enlarged = F.interpolate(pixels, sides, mode="bilinear", align_corners=True)
        else:
            enlarged = pixels.new_zeros(0, 3, *sides)
        return self.backbone.feature_maps(enlarged)


class GloriaTextTower(nn.Module):
    """BERT; the sum of its last layers, summed over the pieces of each word, averaged over all slots of the context.

    The slots after the last word hold zeros but count in the average, so a text's vector is the sum over its tokens,
    divided by the context (97): padding, however much there is, changes nothing.

    Args:
        config: The declaration; its options are those of :data:`TEXT_OPTIONS`.

    Attributes:
        output_dim: Width of BERT, which is the joint space.
        pad_id: The id that fills texts up.
        can_trim: Padding may be cut off without a change.
    """

    pad_id = 0
    can_trim = True

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        options = tower_options(config, TEXT_OPTIONS)
        if options["last_layers"] > options["layers"] + 1:
            raise ConfigError(
                f"`text.options.last_layers` is {options['last_layers']}, the tower has {options['layers'] + 1}"
            )
        self.model = build_bert(options, config.context_length)
        self.last_layers: int = options["last_layers"]
        self.slots = config.context_length
        self.output_dim: int = options["width"]
        self._continues: Tensor | None = None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, output_dim) for ids and mask (batch, tokens); the mask is 1 on the texts' own tokens."""
        if len(ids) == 0:
            return no_rows(ids, self.output_dim, self)
        return self._tokens(ids, mask).sum(1) / self.slots

    def read_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Learn which ids continue a word (``##ing``); an encoder does this when it makes its tokenizer.

        Args:
            tokenizer: The one that makes the ids. One without pieces of that kind makes every token a word.
        """
        content = tokenizer.to_dict().get("tokenizer", {}).get("model", {})
        vocabulary, mark = content.get("vocab", {}), content.get("continuing_subword_prefix") or "##"
        table = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        if isinstance(vocabulary, Mapping):
            table[[i for piece, i in vocabulary.items() if piece.startswith(mark) and piece != mark]] = True
        self._continues = table

    def word_features(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of words, not normalised, and how many words each text has.

        Args:
            ids: (batch, tokens).
            mask: (batch, tokens), 1 on the texts' own tokens.

        Returns:
            (batch, context, output_dim): ``[CLS]`` at slot 0, the words from slot 1 on, ``[SEP]`` after them, then
            zeros. And (batch,) integers, the words between ``[CLS]`` and ``[SEP]``.

        Raises:
            InputError: The tower has not read a vocabulary.
        """
        if self._continues is None:
            raise InputError(
                "the text tower does not know which ids continue a word",
                hint="use the encoder's own `tokenizer`, or call `read_vocabulary(tokenizer)` on the tower",
            )
        words = torch.zeros(len(ids), self.slots, self.output_dim, device=ids.device)
        if len(ids) == 0:
            return words, torch.zeros(0, dtype=torch.long, device=ids.device)
        tokens = self._tokens(ids, mask)
        starts = ~self._continues.to(ids.device)[ids] & (mask > 0)
        slot = (starts.cumsum(1) - 1).clamp(min=0)
        words = words.to(tokens.dtype).scatter_add(1, slot[..., None].expand_as(tokens), tokens)
        return words, starts.sum(1) - 2

    def _tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The sum of the last layers (batch, tokens, output_dim), zero on padding."""
        layers = hidden_layers(self.model, ids, mask)[-self.last_layers :]
        return torch.stack(layers).sum(0) * mask[..., None].to(layers[0].dtype)
