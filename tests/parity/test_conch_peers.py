"""CONCH against the parts it is made of, by their own code: timm's ViT, open_clip's pooler and CoCa text tower."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chiasm.encoders.base import Encoder, ProjectionConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.load import load
from chiasm.testing import make_test_images
from chiasm.types import Preprocess

pytestmark = pytest.mark.peer

make = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_conch.py"))
TIGHT = 1e-5


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    entry, s = CATALOG.get("conch"), make["SHAPE"]
    options = {
        "width": s["width"], "layers": s["layers"], "heads": s["heads"], "patch_size": 16,
        "output_dim": s["pool_dim"], "pool_heads": s["pool_heads"],
    }  # fmt: skip
    text = replace(
        entry.config.text, context_length=s["context"], vocab_size=s["vocab_size"], width=s["text_width"],
        layers=s["text_layers"], heads=s["text_heads"],
    )  # fmt: skip
    config = replace(
        entry.config,
        image=replace(entry.config.image, image_size=64, options=options),
        text=text,
        projection=ProjectionConfig(dim=s["pool_dim"]),
        tokenizer={**entry.config.tokenizer, "context_length": s["context"]},
        preprocess=Preprocess(size=64),
    )
    monkeypatch.setitem(CATALOG._items, "conch-small", replace(entry, name="conch-small", config=config))
    torch.save(make["weights"](), tmp_path / "pytorch_model.bin")
    return load(tmp_path, family="conch-small")


def under(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in make["weights"]().items() if k.startswith(prefix)}


def error(ours: Tensor, theirs: Tensor) -> float:
    scale = torch.maximum(theirs.abs(), theirs.square().mean(1, keepdim=True).sqrt())
    return float(((ours - theirs).abs() / scale).max())


def test_images_agree_with_timm_and_open_clips_pooler(encoder: Encoder) -> None:
    from open_clip.transformer import AttentionalPooler, LayerNorm
    from timm.models.vision_transformer import VisionTransformer

    s = make["SHAPE"]
    trunk: Any = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=s["width"], depth=s["layers"], num_heads=s["heads"], num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    trunk.load_state_dict(under("visual.trunk."), strict=True)
    pooler: Any = AttentionalPooler(s["pool_dim"], s["width"], n_head=s["pool_heads"], n_queries=1)
    pooler.load_state_dict(under("visual.attn_pool_contrast."), strict=True)
    norm = LayerNorm(s["pool_dim"])
    norm.load_state_dict(under("visual.ln_contrast."), strict=True)
    pixels = make["pixels"]()
    with torch.inference_mode():
        pooled = norm(pooler(trunk.eval().forward_features(pixels))[:, 0])
        theirs = pooled @ make["weights"]()["visual.proj_contrast"]
        assert error(encoder.encode_image(pixels), theirs) <= TIGHT
        trunk_of_ours: Any = encoder.model.visual
        assert error(trunk_of_ours.trunk(pixels), pooled) <= TIGHT


def test_texts_agree_with_open_clips_coca(encoder: Encoder) -> None:
    from open_clip.transformer import TextTransformer

    s = make["SHAPE"]
    theirs: Any = TextTransformer(
        context_length=s["context"], vocab_size=s["vocab_size"], width=s["text_width"], heads=s["text_heads"],
        layers=s["text_layers"], output_dim=s["pool_dim"], embed_cls=True, pad_id=0,
    )  # fmt: skip
    theirs.load_state_dict(under("text."), strict=True)
    tokens = make["ids"]()
    with torch.inference_mode():
        assert error(encoder.encode_text(tokens), theirs.eval()(tokens)) <= TIGHT


def test_pixels_agree_with_open_clips_transform() -> None:
    import open_clip

    from chiasm.data.transforms import image_transform

    for name, size in (("conch", 448), ("conch-224", 224)):
        ours = image_transform(CATALOG.get(name).config.preprocess)
        theirs: Any = open_clip.image_transform(size, is_train=False)
        for image in make_test_images(4):
            assert np.array_equal(ours(image).numpy(), theirs(image).numpy())
