"""What the heads cost: counted, equal to the formula, little beside a real backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from chiasm.classifier import VisionClassifier
from chiasm.deploy.cost import count_flops, example_input, measure_cost, transformer_flops
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.fold import fold_heads
from chiasm.encoders.heads import DistilledHeads, HeadsConfig, extra_multiplications, extra_parameters
from chiasm.encoders.image_side import build_backbone
from chiasm.errors import InputError
from chiasm.types import Preprocess

#: Width, blocks, heads of a ViT/16, and the share of weights in % that the specification states for C = 2 (2.7).
SHAPES = {"S": (384, 12, 6, 2.1), "B": (768, 12, 12, 0.77), "L": (1024, 24, 16, 0.26)}


def without_memory(shape: str, heads: HeadsConfig) -> tuple[VisionClassifier, VisionClassifier]:
    """A ViT/16 at 224 pixels on the meta device, with trained and folded heads."""
    width, layers, attention, _ = SHAPES[shape]
    image = ImageTowerConfig(kind="vit", image_size=224, width=width, layers=layers, heads=attention, patch_size=16)
    config = EncoderConfig(
        image=image, projection=ProjectionConfig(dim=width, image="none"), preprocess=Preprocess(), sides="image"
    )
    tower = build_backbone(config, device="meta")
    classes = [str(i) for i in range(heads.classes)]
    plain = DistilledHeads(heads)
    trained = VisionClassifier(tower, plain, classes=classes, config=config)
    folded = VisionClassifier(tower, fold_heads(plain), classes=classes, config=config)
    return trained.to("meta"), folded.to("meta")


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_beside_a_real_backbone_the_heads_cost_next_to_nothing(shape: str, classes: int) -> None:
    width, _, _, percent = SHAPES[shape]
    heads = HeadsConfig(width=width, classes=classes, text_length=None)
    cost = measure_cost(*without_memory(shape, heads))
    assert cost.agrees
    assert cost.parameters == cost.backbone_parameters + (width + 1) * classes + extra_parameters(heads)
    assert cost.flops == cost.unimodal_flops + 2 * extra_multiplications(heads)
    assert cost.overhead <= cost.overhead_trained <= 0.03
    assert cost.overhead_flops <= 0.001
    if classes == 2:
        assert cost.overhead_trained * 100 == pytest.approx(percent, rel=0.03)
        assert cost.unimodal_flops / 2e9 == pytest.approx({"S": 4.6, "B": 17, "L": 60}[shape], rel=0.1)
    assert cost.exported_parameters < cost.parameters
    assert cost.exported_flops < cost.flops


def test_small_operations_are_counted_by_hand() -> None:
    """A linear layer, a convolution and an attention: two operations a product."""
    assert count_flops(nn.Linear(5, 7), torch.zeros(3, 5)) == 2 * 3 * 5 * 7
    assert count_flops(nn.Conv2d(3, 4, 2, 2), torch.zeros(1, 3, 8, 8)) == 2 * (3 * 2 * 2) * 4 * (4 * 4)

    class Attends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_flops(Attends(), torch.zeros(1, 2, 6, 4)) == 2 * (2 * 6 * 6 * 4) * 2


def test_a_classifier_without_text_has_no_overhead(make: Callable[..., VisionClassifier]) -> None:
    trained = make(fused=False)
    cost = measure_cost(trained, replace_heads(trained))
    assert cost.agrees
    assert cost.formula_parameters == cost.formula_flops == 0
    assert cost.overhead == cost.overhead_trained == 0


def replace_heads(trained: VisionClassifier) -> VisionClassifier:
    return VisionClassifier(trained.tower, fold_heads(trained.heads), classes=trained.classes, config=trained.config)


def test_features_are_counted_without_a_tower() -> None:
    heads = DistilledHeads(replace(HeadsConfig(width=6, classes=2), text_dim=5))
    trained = VisionClassifier(None, heads, classes=("a", "b"))
    cost = measure_cost(trained, VisionClassifier(None, fold_heads(heads), classes=("a", "b")))
    assert cost.agrees
    assert cost.backbone_parameters == 0
    assert cost.unimodal_parameters == 14
    assert torch.equal(example_input(trained, 2, seed=4), example_input(trained, 2, seed=4))


@pytest.mark.parametrize(
    "change",
    [{}, {"pool": "mean"}, {"registers": 2}, {"pool": "mean", "class_token": False, "patch_size": 16},
     {"activation": "swiglu", "mlp_ratio": 3.0}, {"layers": 1}],
)  # fmt: skip
def test_the_formula_of_a_vit_is_what_torch_counts(change: dict[str, Any]) -> None:
    image = ImageTowerConfig(**{"image_size": 64, "width": 64, "layers": 3, "heads": 2, "patch_size": 8} | change)
    config = EncoderConfig(
        image=image, projection=ProjectionConfig(dim=24), preprocess=Preprocess(size=64), sides="image"
    )
    tower: Any = build_backbone(config, projected=True, device="meta")

    class Whole(nn.Module):
        """All rows of the last block and the projection, as the formula has it."""

        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.tower.forward_features(pixels).tokens  # type: ignore[no-any-return]

    counted = count_flops(Whole(), torch.zeros(1, 3, 64, 64, device="meta"))
    assert transformer_flops(image, 24) == counted


def test_the_formula_of_a_text_grows_with_its_tokens() -> None:
    """Linear layers grow with the tokens, attention with their square."""
    text = TextTowerConfig(width=512, layers=12, heads=8, context_length=77)
    whole = transformer_flops(text, 512)
    assert whole == transformer_flops(text, 512, tokens=77)
    linears = 2 * 77 * 12 * 12 * 512**2
    assert whole == linears + 2 * 2 * 12 * 77**2 * 512 + 2 * 512**2
    assert whole / transformer_flops(text, 512, tokens=11) > 7


def test_other_towers_have_no_formula() -> None:
    resnet = ImageTowerConfig(kind="resnet", layers=(1, 1), width=16, image_size=64)
    for config in (resnet, ImageTowerConfig(pool="attention")):
        with pytest.raises(InputError, match="no formula") as refusal:
            transformer_flops(config, 32)
        assert "count_flops" in (refusal.value.hint or "")
