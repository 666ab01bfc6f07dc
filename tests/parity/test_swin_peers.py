"""MedCLIP's Swin, read by the names of transformers 4, against timm's and transformers' own. Runs in .venv-peers only.

timm is given the tensors by the table of the specification, in which the ``downsample`` of a stage lies one stage later.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chiasm.checkpoints.medclip import swin_names

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("default"),  # the peers warn about their own dependencies
]
timm = pytest.importorskip("timm", reason="needs the environment made by `make peers`")
plain = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "plain_towers.py"))
SHAPE = {
    "embed_dim": 24,
    "depths": [2, 2, 2],
    "num_heads": [2, 3, 4],
    "window_size": 4,
    "image_size": 64,
    "patch_size": 4,
}


def to_timm(tensors: dict[str, Tensor], *, shift: int = 1) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (
            name.endswith("relative_position_index")
            or ".attention.self.key." in name
            or ".attention.self.value." in name
        ):
            continue
        if ".attention.self.query." in name:
            fused = torch.cat([tensors[name.replace("query", part)] for part in ("query", "key", "value")])
        new = re.sub(r"encoder\.layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + shift}.downsample", name)
        for theirs, ours in (
            ("encoder.layers", "layers"), ("attention.self.query", "attn.qkv"), ("attention.output.dense", "attn.proj"),
            ("attention.self.relative", "attn.relative"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
            ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"), ("embeddings.norm", "patch_embed.norm"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("layernorm.", "norm."),
        ):  # fmt: skip
            new = new.replace(theirs, ours)
        found[new] = fused if ".self.query." in name else tensor
    return found


def ours(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    from transformers import SwinConfig, SwinModel

    model = SwinModel(SwinConfig(**SHAPE)).eval()
    model.load_state_dict(swin_names(tensors), strict=True)
    with torch.inference_mode():
        return model(pixels).pooler_output


def test_equal_to_timm_and_only_with_the_moved_downsample() -> None:
    tensors = plain["drawn"](plain["swin_shapes"]("", SHAPE), 5)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=24, depths=(2, 2, 2), num_heads=(2, 3, 4), window_size=4, num_classes=0
    ).eval()
    model.load_state_dict(to_timm(tensors), strict=True)
    with torch.inference_mode():
        theirs = model(pixels)
    found = ours(tensors, pixels)
    scale = torch.maximum(theirs.abs(), theirs.square().mean(1, keepdim=True).sqrt())
    assert float(((found - theirs).abs() / scale).max()) <= 1e-5
    with pytest.raises(RuntimeError, match="downsample"):
        model.load_state_dict(to_timm(tensors, shift=0), strict=True)
    independent = plain["swin"](tensors, "", SHAPE, pixels).mean(1)
    assert float(((independent - theirs).abs() / scale).max()) <= 1e-5
