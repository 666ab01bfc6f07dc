"""A CheXzero file written with OpenAI's own code, whose copy CheXzero runs: same embeddings. Runs in .venv-peers only."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chiasm.encoders.base import ProjectionConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.load import load

pytestmark = pytest.mark.peer


def error(ours: Tensor, theirs: Tensor) -> float:
    scale = torch.maximum(theirs.abs(), theirs.square().mean(1, keepdim=True).sqrt())
    return float(((ours - theirs).abs() / scale).max())


def test_a_mixed_precision_state_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer's own imports
        import clip
        from clip.model import CLIP, convert_weights

    model = CLIP(
        embed_dim=48, image_resolution=64, vision_layers=2, vision_width=128, vision_patch_size=16, context_length=77,
        vocab_size=49408, transformer_width=128, transformer_heads=2, transformer_layers=2,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=draw)
            if tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            elif tensor.ndim == 1:
                tensor.copy_(float(name.endswith("weight")) + 0.2 * noise)
    convert_weights(model)
    state = model.state_dict()
    assert {t.dtype for t in state.values()} == {torch.float16, torch.float32}
    torch.save(state, tmp_path / "best_64.pt")
    model.float().eval()

    entry = CATALOG.get("chexzero")
    shape = {"width": 128, "layers": 2, "heads": 2}
    config = replace(
        entry.config,
        image=replace(entry.config.image, image_size=64, patch_size=16, **shape),
        text=replace(entry.config.text, **shape),
        projection=ProjectionConfig(dim=48),
        preprocess=replace(entry.config.preprocess, size=64),
    )
    monkeypatch.setitem(CATALOG._items, "small", replace(entry, name="small", config=config))
    ours = load(tmp_path / "best_64.pt", family="small")
    pixels = torch.randn(3, 3, 64, 64, generator=draw)
    texts = ["Pleural Effusion", "no Pleural Effusion", "no No Finding"]
    with torch.inference_mode():
        assert error(ours.encode_image(pixels), model.encode_image(pixels)) <= 1e-5
        assert error(ours.encode_text(texts), model.encode_text(clip.tokenize(texts))) <= 1e-5
        wrong = load(tmp_path / "best_64.pt", family="open_clip")  # GELU
        assert error(wrong.encode_image(pixels), model.encode_image(pixels)) > 1e-3
