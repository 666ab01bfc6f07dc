"""BioViL, BioViL-T and CXR-BERT against microsoft's hi-ml-multimodal; one mistake of each kind misses the tolerance.

Its modules that read DICOM and NIfTI files are not needed: three packages are replaced by empty ones while they load.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.data.transforms import image_transform
from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.named import tower_options
from chiasm.errors import InputError
from chiasm.load import load
from chiasm.testing import make_test_images

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]

WITH_BATCH_NORM, TIGHT = 1e-4, 1e-5
BERT: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 48, "vocab_size": 60, "positions": 40}
PROMPTS = ["There is no pneumonia.", "findings consistent with pneumonia!?", "No evidence of acute pneumonia"]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "there",
    "is",
    "no",
    "pneumonia",
    "findings",
    "consistent",
    "with",
    "evidence",
    "of",
    "acute",
    ".",
    "!",
    "?",
    "##s",
]


@pytest.fixture(scope="module")
def peer() -> Any:
    """The package, with ResNets of one block a stage and 8 channels: torchvision's own class, smaller."""
    pytest.importorskip("torchvision", reason="needs the environment made by `make peers`")
    absent = [name for name in ("pydicom", "SimpleITK", "skimage") if name not in sys.modules]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["skimage"].io = types.ModuleType("io")  # type: ignore[attr-defined]
    try:
        model = pytest.importorskip("health_multimodal.image.model.model", reason="hi-ml-multimodal is not installed")
        from health_multimodal.image.data import io, transforms
        from health_multimodal.image.model import encoder, resnet
        from health_multimodal.text import model as text
    finally:
        for name in absent:
            del sys.modules[name]

    def small_resnet(**_: Any) -> nn.Module:
        found: nn.Module = resnet.ResNetHIML(block=resnet.Bottleneck, layers=[1, 1, 1, 1], width_per_group=64)
        return found

    encoder.resnet50 = small_resnet
    return types.SimpleNamespace(image=model, text=text, io=io, transforms=transforms)


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith("pos_embed"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1 and tensor.shape[0] > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.5 * noise)


def small(name: str, size: int) -> EncoderConfig:
    config = CATALOG.get(name).config
    text = replace(config.text, context_length=40, options={**config.text.options, **BERT})
    tokenizer = {**config.tokenizer, "context_length": 40}
    if name == "cxr-bert":
        return replace(config, text=text, tokenizer=tokenizer)
    image = replace(config.image, image_size=size, options={**config.image.options, "layers": [1, 1, 1, 1]})
    return replace(
        config, image=image, text=text, tokenizer=tokenizer, preprocess=replace(config.preprocess, size=size)
    )


def text_model(peer: Any) -> Any:
    config = peer.text.CXRBertConfig(
        projection_size=128, vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    model = peer.text.CXRBertModel(config)
    randomise(model, 3)
    return model.eval()


def image_model(peer: Any, temporal: bool) -> Any:
    kind = peer.image.MultiImageModel if temporal else peer.image.ImageModel
    name = "resnet50_multi_image" if temporal else "resnet50"
    model = kind(img_encoder_type=name, joint_feature_size=128)
    randomise(model, 2)
    return model.eval()


def written(folder: Path, image: nn.Module | None, text: Any) -> Path:
    """The folder of the hub: an image file beside transformers' own, and a bare vocabulary."""
    if image is not None:
        temporal = isinstance(getattr(image.encoder, "vit_pooler", None), nn.Module)
        torch.save(image.state_dict(), folder / f"biovil{'_t' if temporal else ''}_image_model_proj_size_128.pt")
    torch.save(text.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "cxr-bert", "vocab_size": len(WORDS)}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "tokenizer_class": "CXRBertTokenizer", "auto_map": {"AutoTokenizer": ["x"]}})
    )
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def loaded(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, size: int = 448) -> Encoder:
    entry = CATALOG.get(name)
    monkeypatch.setitem(CATALOG._items, "small", replace(entry, name="small", config=small(name, size)))
    return load(folder, family="small")


def error(ours: Tensor, theirs: Tensor) -> float:
    scale = torch.maximum(theirs.abs(), theirs.square().mean(-1, keepdim=True).sqrt())
    return float(((ours - theirs).abs() / scale).max())


def pixels(size: int, seed: int = 0) -> Tensor:
    grey = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return grey.expand(-1, 3, -1, -1).contiguous()


def test_biovil_images_and_patches_agree(peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, text = image_model(peer, temporal=False), text_model(peer)
    encoder = loaded("biovil", written(tmp_path, theirs, text), monkeypatch, size=96)
    x = pixels(96)
    with torch.inference_mode():
        out = theirs(x)
        expected = out.projected_global_embedding
        assert error(encoder.encode_image(x), expected) <= WITH_BATCH_NORM
        patches = theirs.get_patchwise_projected_embeddings(x, normalize=True)
        assert error(encoder.patch_features(x), patches) <= WITH_BATCH_NORM
        # The mistake: to project the pooled vector.
        wrong = theirs.projector(out.img_embedding[..., None, None]).flatten(1)
        assert error(wrong, expected) > 10 * WITH_BATCH_NORM
    assert encoder.logit_scale is None
    with pytest.raises(InputError, match="takes no prior image"):
        encoder.encode_image(x, prior=x)


def test_biovil_t_agrees_with_and_without_a_prior_image(
    peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, text = image_model(peer, temporal=True), text_model(peer)
    encoder = loaded("biovil-t", written(tmp_path, theirs, text), monkeypatch)
    x, prior = pixels(448), pixels(448, seed=1)
    with torch.inference_mode():
        alone = theirs(x).projected_global_embedding
        assert error(encoder.encode_image(x), alone) <= WITH_BATCH_NORM
        both = theirs(x, prior).projected_global_embedding
        assert error(encoder.encode_image(x, prior=prior), both) <= WITH_BATCH_NORM
        # Mistakes: no embedding of the missing image, images swapped, two images told apart by nothing.
        assert error(encoder.encode_image(prior, prior=x), both) > 10 * WITH_BATCH_NORM
        tower: Any = encoder.model.visual
        for parameter in (tower.trunk.missing_previous, tower.trunk.pooler.type_embed):
            parameter.zero_()
        assert error(encoder.encode_image(x), alone) > 10 * WITH_BATCH_NORM
        assert error(encoder.encode_image(x, prior=prior), both) > 10 * WITH_BATCH_NORM


@pytest.mark.parametrize("name", ["biovil", "cxr-bert"])
def test_texts_agree(peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from transformers import BertTokenizer

    text = text_model(peer)
    image = image_model(peer, temporal=False) if name == "biovil" else None
    encoder = loaded(name, written(tmp_path, image, text), monkeypatch, size=96)
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True)
    batch = tokenizer([p.rstrip("!?.") for p in PROMPTS], padding="longest", return_tensors="pt")
    with torch.inference_mode():
        expected = text.get_projected_text_embeddings(**{k: batch[k] for k in ("input_ids", "attention_mask")},
                                                      normalize_embeddings=False)  # fmt: skip
        hidden = text.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    ours = encoder.tokenizer.encode(PROMPTS)
    assert ours.ids[:, : batch["input_ids"].shape[1]].tolist() == batch["input_ids"].tolist()
    assert error(encoder.encode_text(PROMPTS), expected) <= TIGHT
    assert tower_options(encoder.config.text, {**BERT, "output_dim": 128})["vocab_size"] == len(WORDS)
    # Mistakes: the full stop is read, the first token is not projected, the mean of all tokens is.
    with_marks = tokenizer(PROMPTS, padding="longest", return_tensors="pt")["input_ids"]
    assert error(encoder.encode_text(with_marks), expected) > 10 * TIGHT
    with torch.inference_mode():
        assert error(text.cls_projection_head(hidden.mean(1)), expected) > 10 * TIGHT
    with pytest.raises(InputError, match="longer than 40 tokens, which this model refuses"):
        encoder.encode_text("no pneumonia " * 30)


@pytest.mark.parametrize(("name", "crop"), [("biovil", 480), ("biovil-t", 448)])
def test_pixels_agree(peer: Any, name: str, crop: int) -> None:
    import numpy as np
    from PIL import Image

    preprocess = CATALOG.get(name).config.preprocess
    theirs = peer.transforms.create_chest_xray_transform_for_inference(512, crop)
    for i, image in enumerate(make_test_images(4)):
        grey = image.convert("L") if i % 2 else image
        values = np.asarray(grey) // 2 + 30  # does not fill the range
        expected = theirs(Image.fromarray(peer.io.remap_to_uint8(values)).convert("L"))
        picture = Image.fromarray(values)
        assert torch.equal(image_transform(preprocess)(picture), expected)
        # Mistakes: another filter, the crop's size for the resize, the range as it is, OpenAI's statistics.
        for wrong in (
            {"interpolation": "bicubic"}, {"resize_size": None}, {"stretch": None}, {"mean": (0.48,) * 3},
        ):  # fmt: skip
            different = image_transform(replace(preprocess, **wrong))(picture)  # type: ignore[arg-type]
            assert float((different - expected).abs().max()) >= 0.99 / 255, wrong  # ours agrees to the bit
