"""Small CLIP weights in the layouts of the field, drawn at random."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Make = Callable[..., dict[str, Tensor]]


@pytest.fixture
def openai_vit() -> Make:
    """A factory of ViT state dicts in OpenAI's layout (width 64, patch 8, 2 and 3 blocks)."""

    def make(*, size: int = 24, dim: int = 16, seed: int = 0, vocabulary: int = 49408) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * 0.1

        def blocks(prefix: str, width: int, layers: int) -> dict[str, Tensor]:
            result = {}
            for i in range(layers):
                p = f"{prefix}.resblocks.{i}"
                for part in ("weight", "bias"):
                    wide = (width,) if part == "weight" else ()
                    result |= {
                        f"{p}.attn.in_proj_{part}": draw(3 * width, *wide),
                        f"{p}.attn.out_proj.{part}": draw(width, *wide),
                        f"{p}.ln_1.{part}": draw(width) + 1,
                        f"{p}.ln_2.{part}": draw(width) + 1,
                        f"{p}.mlp.c_fc.{part}": draw(4 * width, *wide),
                        f"{p}.mlp.c_proj.{part}": draw(width, *((4 * width,) if wide else ())),
                    }
            return result

        return {
            "positional_embedding": draw(77, 128),
            "text_projection": draw(128, dim),
            "logit_scale": torch.tensor(4.0),
            "visual.class_embedding": draw(64),
            "visual.positional_embedding": draw((size // 8) ** 2 + 1, 64),
            "visual.proj": draw(64, dim),
            "visual.conv1.weight": draw(64, 3, 8, 8),
            "visual.ln_pre.weight": draw(64) + 1,
            "visual.ln_pre.bias": draw(64),
            **blocks("visual.transformer", 64, 2),
            "visual.ln_post.weight": draw(64) + 1,
            "visual.ln_post.bias": draw(64),
            **blocks("transformer", 128, 3),
            "token_embedding.weight": draw(vocabulary, 128),
            "ln_final.weight": draw(128) + 1,
            "ln_final.bias": draw(128),
        }

    return make
