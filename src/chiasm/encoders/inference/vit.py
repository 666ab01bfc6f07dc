"""CLIP's vision transformer for inference: packed layers, one matrix of tokens, and of the last block what is pooled.

In: pixels (batch, 3, size, size), float32. Out: (batch, output_dim), float32, as :class:`VisionTransformer` gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chiasm.encoders.inference.blocks import attend_equal, attend_one, pack_blocks
from chiasm.encoders.inference.int8 import make_linear
from chiasm.encoders.inference.packed import require_plain
from chiasm.encoders.vit import VisionTransformer, check_pixels


class PackedViT:
    """A :class:`VisionTransformer` with packed weights; what is small (positions, norms, pooling) is shared with it.

    With class-token pooling the last block computes the class token alone. Whoever wants patch tokens or attention
    weights asks the module itself.

    Args:
        tower: Its weights are copied.
        dtype: Of the linear layers in the blocks and of the patch embedding; ``torch.int8`` quantises them.

    Raises:
        NotPackable: A part of it is not chiasm's own.
    """

    def __init__(self, tower: VisionTransformer, *, dtype: torch.dtype) -> None:
        require_plain(tower, VisionTransformer)
        require_plain(tower.conv1, nn.Conv2d)
        self._tower = tower
        self._few = tower.pool == "cls"
        self._patches = make_linear(tower.conv1.weight.flatten(1), tower.conv1.bias, dtype=dtype)
        self._blocks = pack_blocks(tower.transformer, dtype=dtype, few=self._few)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (batch, output_dim), float32, not normalised."""
        tower = self._tower
        check_pixels(pixels, tower.image_size)
        if not len(pixels):
            return pixels.new_zeros(0, tower.output_dim)
        x = self._embed(pixels)
        batch, tokens, width = x.shape
        x = x.view(batch * tokens, width)
        for block in self._blocks[: -1 if self._few else None]:
            x = block.all(x, lambda qkv, heads=block.heads: attend_equal(qkv, batch, heads))  # type: ignore[misc]
        if not self._few:
            return tower.pooled(x.view(batch, tokens, width))
        last = self._blocks[-1]
        rows = torch.arange(0, batch * tokens, tokens)
        x = last.few(x, rows, lambda query, keys: attend_one(query, keys, batch, last.heads))
        return tower.project(tower.ln_post(x))

    def _embed(self, pixels: Tensor) -> Tensor:
        tower, p = self._tower, self._tower.patch_size
        side = tower.grid * p
        batch = len(pixels)
        cut = pixels[:, :, :side, :side].reshape(batch, 3, tower.grid, p, tower.grid, p)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch * tower.grid**2, 3 * p * p)
        return tower.with_positions(self._patches(patches).float().view(batch, tower.grid**2, -1))
