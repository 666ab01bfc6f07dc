"""Loading: the file is mapped into memory, nothing is drawn, nothing is built that the file already holds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chiasm.encoders.base import Encoder
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.load import load, save_encoder
from chiasm.testing import TinyEncoder

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the list of mapped files of Linux")


def mapped(path: Path) -> list[tuple[int, int]]:
    """Address ranges under which a file lies in this process."""
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith(str(path)):
            first, last = line.split()[0].split("-")
            ranges.append((int(first, 16), int(last, 16)))
    return ranges


def share_in_file(encoder: Encoder, path: Path) -> float:
    """Share of the weights' bytes that are the file's own pages."""
    ranges = mapped(path)
    inside = total = 0
    for parameter in encoder.model.parameters():
        size = parameter.numel() * parameter.element_size()
        total += size
        inside += size * any(a <= parameter.data_ptr() < b for a, b in ranges)
    return inside / total


@linux
def test_a_model_folder_is_mapped(tmp_path: Path) -> None:
    save_encoder(TinyEncoder(3), tmp_path / "model")
    encoder = load(tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    assert share_in_file(encoder, file) == 1.0


@linux
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_backbone_in_foreign_names_is_mapped(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming copies nothing; only positions that are resized are new."""
    entry = CATALOG.get("kaiko-vits16")
    image = replace(entry.config.image, width=64, layers=2, heads=1)
    config = replace(entry.config, image=image, projection=replace(entry.config.projection, dim=64))
    monkeypatch.setitem(CATALOG._items, entry.name, replace(entry, config=config))
    path = tmp_path / f"weights.{suffix}"
    state = timm_names(build_encoder_model(config, seed=0).state_dict())
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    encoder = load(entry.name, pretrained=path)
    assert share_in_file(encoder, path) > 0.9


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of chiasm's ViT as timm has them."""
    pairs = (
        ("visual.", ""), ("transformer.resblocks.", "blocks."), ("attn.in_proj_", "attn.qkv."), ("attn.out_proj", "attn.proj"),
        ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("ln_1", "norm1"), ("ln_2", "norm2"), ("ln_post", "norm"),
        ("conv1", "patch_embed.proj"), ("class_embedding", "cls_token"), ("positional_embedding", "pos_embed"),
    )  # fmt: skip
    result = {}
    for name, tensor in state.items():
        new = name
        for ours, theirs in pairs:
            new = new.replace(ours, theirs)
        lead = {"cls_token": 2, "pos_embed": 1}.get(new, 0)
        result[new] = tensor.reshape(*[1] * lead, *tensor.shape).contiguous()
    return result


def test_native_towers_are_built_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the file's tensors are assigned, every weight is on the meta device."""
    save_encoder(TinyEncoder(3), tmp_path / "model")
    from chiasm.encoders import build

    seen = []
    original = build.build_encoder_model

    def spy(*args: object, **kwargs: object) -> object:
        model = original(*args, **kwargs)  # type: ignore[arg-type]
        seen.append({p.device.type for p in model.parameters()})
        return model

    monkeypatch.setattr(build, "build_encoder_model", spy)
    load(tmp_path / "model")
    assert seen == [{"meta"}]


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    save_encoder(TinyEncoder(3), tmp_path / "model")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


def test_a_foreign_tower_is_filled_with_zeros_until_the_file_is_read() -> None:
    """Layers of torch and models of transformers draw when they are made; a loader has no use for that."""
    from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig
    from chiasm.types import Preprocess

    config = EncoderConfig(
        image=ImageTowerConfig(
            kind="huggingface", source="x", image_size=32, pool="cls",
            options={"config": {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1,
                                "num_attention_heads": 2, "image_size": 32, "patch_size": 8}},
        ),
        projection=ProjectionConfig(dim=16, image="linear"), preprocess=Preprocess(32), sides="image",
    )  # fmt: skip
    drawn = build_encoder_model(config, seed=0)
    empty = build_encoder_model(config, seed=0, draw=False)
    constant = {k for k, v in drawn.state_dict().items() if v.unique().numel() == 1}  # norms, biases, scales
    for name, tensor in empty.state_dict().items():
        assert name in constant or not tensor.any(), name
    assert len(constant) < len(drawn.state_dict())
