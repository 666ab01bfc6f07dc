"""Folders as transformers saves them: ``CLIPModel`` (PLIP), ``SiglipModel``, ``VisionTextDualEncoderModel``.

Same ids, pixels within 1/255 of its processor, same embeddings; one wrong setting each must miss.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chiasm.checkpoints.huggingface import to_openai
from chiasm.data.transforms import image_transform
from chiasm.encoders.base import Encoder
from chiasm.encoders.fill import filled_model
from chiasm.load import load
from chiasm.testing import make_test_images

pytestmark = pytest.mark.peer

TIGHT = 1e-5
TEXTS = ["a chest radiograph", "Small left pleural effusion; no pneumothorax.", "x", "an h&e image of tumour " * 5]


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("logit_scale"):
                tensor.fill_(3.0)
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(name.endswith("weight") + 0.2 * noise)


def error(ours: Tensor, theirs: Tensor) -> float:
    rms = theirs.square().mean(1, keepdim=True).sqrt()
    return float(((ours - theirs).abs() / torch.maximum(theirs.abs(), rms)).max())


def with_config(encoder: Encoder, **changed: Any) -> Encoder:
    config = replace(
        encoder.config,
        image=replace(encoder.config.image, **changed.get("image", {})),
        text=replace(encoder.config.text, **changed.get("text", {})),
    )
    return Encoder(filled_model(config, encoder.model.state_dict()), config, name="wrong")


def save(model: Any, folder: Path, processor: dict[str, Any] | None = None) -> Any:
    randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval().save_pretrained(str(folder))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def save_tokenizer(folder: Path, *, siglip: bool) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:()&-'"
    pieces = ["<pad>", "</s>", "<unk>", *letters, *(f"##{c}" for c in letters), "chest", "no"]
    engine = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad = "</s>" if siglip else "<pad>"  # SigLIP pads with its end token, although it has another
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, pad_token=pad, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def small(vocabulary: int = 100) -> tuple[dict[str, Any], dict[str, Any]]:
    shape = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3}
    return shape | {"vocab_size": vocabulary, "max_position_embeddings": 16}, shape | {
        "image_size": 56, "patch_size": 16
    }  # fmt: skip


def features(output: Any) -> Tensor:
    return getattr(output, "pooler_output", output)  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_siglip(tmp_path: Path, activation: str) -> None:
    from transformers import SiglipConfig, SiglipModel

    text, vision = small()
    act = {"hidden_act": activation, "layer_norm_eps": 1e-3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = SiglipConfig(text_config={**text, **act, "projection_size": 48}, vision_config={**vision, **act})
    model = save(SiglipModel(config), tmp_path)
    tokenizer = save_tokenizer(tmp_path, siglip=True)
    ours = load(tmp_path)
    with torch.inference_mode():
        ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
        pixels = torch.stack([ours.preprocess(i) for i in make_test_images(3)])
        images, words = features(model.get_image_features(pixels)), features(model.get_text_features(ids))
        assert ours.tokenizer.pad_id == 1
        assert error(ours.encode_image(pixels), images) <= TIGHT
        assert error(ours.model.encode_text(ids), words) <= TIGHT
        assert ours.logit_bias == pytest.approx(float(model.logit_bias.detach()))
        for change in ({"activation": "quick_gelu"}, {"causal": True}, {"pool": "mean"}, {"ln_eps": 1e-6}):
            wrong = with_config(ours, text=change).model
            assert error(wrong.encode_text(ids, torch.full((4,), 9)), words) > 10 * TIGHT, change
        for change in ({"activation": "quick_gelu"}, {"ln_eps": 1e-6}):
            assert error(with_config(ours, image=change).encode_image(pixels), images) > 10 * TIGHT, change
        padded = torch.where(ids == 1, 0, ids)
        assert error(ours.model.encode_text(padded), words) > 10 * TIGHT  # the other padding is seen
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stated, "tokenizer_class": "SiglipTokenizer"}))
    canonical = load(tmp_path).tokenizer
    assert torch.equal(canonical("No, CHEST-x."), canonical("no chestx"))
    assert not torch.equal(ours.tokenizer("No, CHEST-x."), ours.tokenizer("no chestx"))


def towers(kind: str) -> Any:
    from transformers import BertConfig, CLIPVisionConfig, RobertaConfig, ViTConfig

    text, vision = small()
    if kind == "clip":
        return CLIPVisionConfig(**{**vision, "image_size": 64}), BertConfig(**text)
    return ViTConfig(**{**vision, "image_size": 64}), RobertaConfig(**{**text, "pad_token_id": 0})


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_vision_text_dual_encoder(tmp_path: Path, kind: str) -> None:
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    config = VisionTextDualEncoderConfig.from_vision_text_configs(*towers(kind), projection_dim=40)
    processor = {"size": {"height": 64, "width": 64}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    model = save(VisionTextDualEncoderModel(config), tmp_path, processor)
    tokenizer = save_tokenizer(tmp_path, siglip=False)
    ours = load(tmp_path)
    batch = tokenizer(
        TEXTS, padding=True, truncation=True, max_length=ours.tokenizer.context_length, return_tensors="pt"
    )
    pixels = torch.stack([ours.preprocess(i) for i in make_test_images(3)])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = features(model.get_image_features(pixels))
        words = features(model.get_text_features(batch.input_ids, attention_mask=batch.attention_mask))
        unmasked = features(model.get_text_features(batch.input_ids))
        assert error(ours.encode_image(pixels), images) <= TIGHT
        assert error(ours.encode_text(TEXTS), words) <= TIGHT
        if kind == "clip":  # RoBERTa makes its own positions of padding
            assert error(ours.encode_text(TEXTS), unmasked) > 10 * TIGHT
        config_without = {k: v for k, v in ours.config.text.options.items() if k != "pooler"}
        state = {k: v for k, v in ours.model.state_dict().items() if ".pooler." not in k or not k.startswith("text.")}
        first = replace(ours.config, text=replace(ours.config.text, options=config_without))
        wrong = Encoder(filled_model(first, state), first, name="wrong")
        assert error(wrong.encode_text(TEXTS), words) > 10 * TIGHT


PLIP_PROCESSOR = {
    "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_resize": True, "crop_size": 64,
    "size": 64, "resample": 3, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def plip(folder: Path) -> Any:
    from transformers import CLIPConfig, CLIPModel

    text, vision = small(49408)
    act = {"hidden_act": "quick_gelu"}
    config = CLIPConfig(
        text_config={**text, **act, "max_position_embeddings": 77, "hidden_size": 64, "num_attention_heads": 1,
                     "intermediate_size": 256, "eos_token_id": 2},
        vision_config={**vision, **act, "image_size": 64, "hidden_size": 64, "num_attention_heads": 1,
                       "intermediate_size": 256},
        projection_dim=40,
    )  # fmt: skip
    return save(CLIPModel(config), folder, PLIP_PROCESSOR)


def test_plip_as_a_folder_and_as_its_authors_checkpoint(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    model = plip(tmp_path / "plip")
    state = {**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    (tmp_path / "plip" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "plip" / "pytorch_model.bin")  # as the hub has it: old names besides
    torch.save(to_openai(model.state_dict()), tmp_path / "epoch_7.pt")
    folder = load(tmp_path / "plip")
    file = load(tmp_path / "epoch_7.pt", family="openai")
    processor = CLIPImageProcessor.from_pretrained(str(tmp_path / "plip"))
    images = [image.crop((0, 0, 67, 64)) for image in make_test_images(3)]  # half of the margin is 1.5 pixels
    theirs = torch.from_numpy(np.stack([np.asarray(processor(i)["pixel_values"][0]) for i in images]))
    ours = torch.stack([folder.preprocess(i) for i in images])
    std = torch.tensor(PLIP_PROCESSOR["image_std"])[:, None, None]
    assert float(((ours - theirs) * std).abs().max()) <= 1 / 255 + 1e-6
    other = image_transform(replace(folder.preprocess_spec, crop_rounding="even"))
    torchvisions = torch.stack([other(i) for i in images])
    assert float(((torchvisions - theirs) * std).abs().max()) > 5 / 255
    ids = folder.tokenizer(TEXTS)
    ids_padded_with_end = torch.where((ids == 0), 49407, ids)
    with torch.inference_mode():
        images_theirs = features(model.get_image_features(ours))
        words = features(model.get_text_features(ids_padded_with_end))
        for encoder in (folder, file):
            assert error(encoder.encode_image(ours), images_theirs) <= TIGHT
            assert error(encoder.encode_text(TEXTS), words) <= TIGHT
        assert error(folder.encode_image(torchvisions), images_theirs) > 10 * TIGHT
        wrong = load(tmp_path / "plip", activation="gelu")
        assert error(wrong.encode_image(ours), images_theirs) > 10 * TIGHT
        assert error(wrong.encode_text(TEXTS), words) > 10 * TIGHT
        blind = ids.clone()
        blind[:, -1] = 49406  # the first end token counts, whatever comes behind it
        assert error(folder.model.encode_text(blind, None), words) <= TIGHT
