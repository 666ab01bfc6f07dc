from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.encoders.base import ImageTowerConfig, TextTowerConfig
from chiasm.encoders.dual import ProjectedTextTower
from chiasm.encoders.external import ExternalImageTower
from chiasm.encoders.huggingface import build_huggingface_image_tower, build_huggingface_text_tower
from chiasm.encoders.inference import foreign, packed
from chiasm.encoders.inference.engine import projected_text_form, tower_form
from chiasm.encoders.inference.foreign import PackedLayer, foreign_form, foreign_text_form, make_twin
from chiasm.encoders.inference.packed import NotPackable, can_pack

BF16 = torch.bfloat16
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": SMALL | {"image_size": 32, "patch_size": 8},
    "swin": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "image_size": 32,
        "patch_size": 4,
        "window_size": 4,
    },
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0},
}
TEXTS: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 60},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 60},
}


class Mixer(nn.Module):
    """A user's own module, with everything that may go wrong with a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(27, 24)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.again = self.first
        self.tied = nn.Linear(24, 24, bias=False)
        self.head = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 10))
        self.register_buffer("shift", torch.full((27,), 0.3))
        self.absent: nn.Module | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        rows = pixels[:, :, :6, :6].unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = self.first(rows) + self.again(rows - self.shift)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.linear(x, self.tied.weight)  # reads the weight itself
        found: Tensor = self.head(x).mean(1)
        return found


def mixer() -> Mixer:
    torch.manual_seed(0)
    return Mixer().eval()


def pixels(batch: int = 3, side: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def angle(found: Tensor, expected: Tensor) -> float:
    return 1 - float(F.cosine_similarity(found.double(), expected.double()).min())


def image_tower(kind: str) -> Any:
    options = {"config": {"model_type": kind, **IMAGES[kind]}}
    config = ImageTowerConfig(kind="huggingface", source=kind, image_size=32, pool="mean", options=options)
    torch.manual_seed(0)
    return build_huggingface_image_tower(config).eval()


def text_side(kind: str) -> Any:
    options = {"config": {"model_type": kind, **TEXTS[kind]}}
    config = TextTowerConfig(kind="huggingface", source=kind, context_length=12, pool="mean", options=options)
    torch.manual_seed(0)
    trunk = build_huggingface_text_tower(config)
    return ProjectedTextTower(trunk, nn.Linear(trunk.output_dim, 8), 8, can_trim=True).eval()


@pytest.mark.parametrize("kind", IMAGES)
@torch.inference_mode()
def test_vision_models_of_transformers(kind: str) -> None:
    tower = image_tower(kind)
    form: Any = tower_form(tower, BF16)
    assert any(isinstance(part, PackedLayer) for part in form.modules())
    for batch in (1, 3):
        expected = tower(pixels(batch))
        found = form(pixels(batch))
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        assert angle(found, expected) < 1e-4
    assert form(pixels(0)).shape == tower(pixels(0)).shape


@pytest.mark.parametrize("kind", TEXTS)
@torch.inference_mode()
def test_text_models_that_are_no_bert(kind: str) -> None:
    side = text_side(kind)
    ids = torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([3, 12, 7, 1])
    form = projected_text_form(side, BF16)
    assert 0 < angle(form(ids, lengths), side(ids, lengths)) < 1e-4
    with pytest.raises(NotPackable):
        projected_text_form(side, torch.float32)


@torch.inference_mode()
def test_a_users_module_in_a_tower() -> None:
    tower = ExternalImageTower(mixer(), None, 32).eval()
    form: Any = tower_form(tower, BF16)
    assert 0 < angle(form(pixels()), tower(pixels())) < 1e-4
    assert form(pixels(0)).shape == (0, 10)
    # Read by the attention and by F.linear themselves: exact parameters, not packed ones.
    assert form.module.attention.out_proj.weight is tower.module.attention.out_proj.weight
    assert form.module.tied.weight is tower.module.tied.weight


@torch.inference_mode()
def test_parameters_are_shared_and_the_module_is_as_before() -> None:
    module = mixer()
    before = module(pixels())
    twin = make_twin(module, BF16)
    assert {n: id(p) for n, p in twin.named_parameters()} == {n: id(p) for n, p in module.named_parameters()}
    assert twin.shift is module.shift
    assert twin.again is twin.first  # what stands in two places stays one layer
    assert type(module.first) is nn.Linear
    assert torch.equal(module(pixels()), before)
    assert twin.state_dict().keys() == module.state_dict().keys()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3), inputs=st.integers(1, 40), outputs=st.integers(1, 40),
    bias=st.booleans(), kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_a_layer_takes_any_shape_and_gives_the_type_that_came(
    shape: list[int], inputs: int, outputs: int, bias: bool, kind: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.inference_mode():
        x = torch.randn(*shape, inputs)
        found = PackedLayer(linear, BF16)(x.to(kind))
        expected = linear(x)
        assert found.dtype == kind
        assert found.shape == expected.shape
        if x.numel():
            assert float((found.float() - expected).abs().max()) < 2e-2 * max(1.0, float(expected.abs().max()))


def test_what_has_no_twin() -> None:
    module = mixer()
    for dtype in (torch.float32, torch.int8):
        with pytest.raises(NotPackable, match="runs as it is"):
            make_twin(module, dtype)
    handle = module.head[1].register_forward_pre_hook(lambda *a: None)
    with pytest.raises(NotPackable, match="hooks"):
        make_twin(module, BF16)
    handle.remove()
    module.head.train()
    with pytest.raises(NotPackable, match="training mode"):
        make_twin(module, BF16)
    with pytest.raises(NotPackable, match=r"torch\.float16"):
        make_twin(mixer().half(), BF16)
    with pytest.raises(NotPackable, match="no linear layers"):
        make_twin(nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), BF16)


def test_adapted_layers_are_never_packed() -> None:
    class LoraLinear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    module = mixer()
    module.first.__class__ = LoraLinear
    twin = make_twin(module, BF16)
    assert type(twin.first) is LoraLinear
    with torch.inference_mode():
        assert angle(twin(pixels()), module(pixels())) < 1e-4


class Random(Mixer):
    def forward(self, pixels: Tensor) -> Tensor:
        return F.dropout(super().forward(pixels), training=True)


class Sharp(Mixer):
    """Rounding decides which way its result points."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.sin(1e4 * super().forward(pixels))


class Louder(Mixer):
    """Its result is longer where its layers are not plain ones: the same direction, another vector."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) * (1 if type(self.first) is nn.Linear else 2)


class Pair(Mixer):
    def forward(self, pixels: Tensor) -> Any:
        return super().forward(pixels), 1


class Strict(Mixer):
    def forward(self, pixels: Tensor) -> Tensor:
        if type(self.first) is not nn.Linear:
            raise TypeError("what is this")
        return super().forward(pixels)


@pytest.mark.parametrize(
    ("kind", "why"), [(Random, "other vectors"), (Sharp, "other vectors"), (Louder, "other vectors"),
                      (Pair, "no tensor"), (Strict, "cannot be tried: TypeError")],
)  # fmt: skip
def test_a_twin_that_gives_something_else_is_not_used(kind: type[Mixer], why: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(NotPackable, match=why):
        foreign_form(kind().eval(), BF16, side=32)


def test_the_comparison_is_what_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "BOUND", 4.0)
    torch.manual_seed(0)
    foreign_form(Sharp().eval(), BF16, side=32)


def test_without_onednn_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module = mixer()
    with torch.inference_mode():
        fast = foreign_form(module, BF16)(pixels())

        def absent() -> Any:
            raise AttributeError("no operator")

        monkeypatch.setattr(packed, "_operators", absent)
        can_pack.cache_clear()
        slow: Any = foreign_form(module, BF16)
        can_pack.cache_clear()
        assert not slow.first.packed.packed
        assert angle(slow(pixels()), fast) < 1e-5


def test_a_text_tower_with_few_ids() -> None:
    """A vocabulary smaller than the ids that are tried: the tower runs as it is, nobody sees an error."""
    side = text_side("distilbert")
    with torch.no_grad():
        side.transformer.model.embeddings.word_embeddings = nn.Embedding(3, 32)
    with pytest.raises(NotPackable, match="cannot be tried: IndexError"):
        foreign_text_form(side.eval(), BF16)


def test_a_linear_layer_with_a_forward_of_its_own_is_not_packed() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).eval()
    module[0].forward = lambda x: x * 2  # type: ignore[method-assign]
    twin = make_twin(module, torch.bfloat16)
    x = torch.ones(2, 8)
    assert torch.equal(twin[0](x), x * 2)
    assert type(twin[1]) is not torch.nn.Linear
