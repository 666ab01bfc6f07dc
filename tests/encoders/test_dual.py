from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.encoders.base import ImageTowerConfig
from chiasm.encoders.dual import DualEncoder, ProjectedImageTower, ProjectedTextTower
from chiasm.errors import InputError

Make = Callable[..., Any]


def batch(model: DualEncoder, make_texts: Make, n: int = 4) -> tuple[Tensor, Tensor]:
    size = model.config.image.image_size
    pixels = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    return pixels, make_texts([3, 8, 5, 16][:n])


def test_forward_is_the_two_encoders_and_the_multiplier(tiny: Make, make_texts: Make) -> None:
    model = tiny()
    pixels, ids = batch(model, make_texts)
    out = model(pixels, ids)
    assert sorted(out) == ["image_features", "logit_scale", "text_features"]
    assert torch.equal(out["image_features"], model.encode_image(pixels, normalize=True))
    assert torch.equal(out["text_features"], model.encode_text(ids, normalize=True))
    torch.testing.assert_close(out["image_features"].norm(dim=1), torch.ones(4))
    assert float(out["logit_scale"].detach()) == pytest.approx(1 / 0.07, rel=1e-6)
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07), rel=1e-6)
    assert float(model.encode_image(pixels).norm(dim=1).std().detach()) > 0


def test_a_bias_is_there_only_when_declared(make_config: Make) -> None:
    import dataclasses

    from chiasm.encoders.build import build_encoder_model

    config = dataclasses.replace(make_config(), logit_bias_init=-10.0, logit_scale_init=math.log(10))
    model = build_encoder_model(config, seed=0)
    assert float(model.state_dict()["logit_bias"]) == -10.0
    assert model.state_dict()["logit_bias"].shape == model.state_dict()["logit_scale"].shape == ()
    pixels = torch.zeros(1, 3, 32, 32)
    out = model(pixels, torch.full((1, 16), 99))
    assert float(out["logit_bias"].detach()) == -10.0
    assert "logit_bias" not in build_encoder_model(make_config(), seed=0).state_dict()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_state_dict_round_trip_is_the_identity(tiny: Make, make_texts: Make, kind: str) -> None:
    model, other = tiny(image={"kind": kind}), tiny(image={"kind": kind}, seed=9)
    pixels, ids = batch(model, make_texts)
    assert not torch.equal(model.encode_image(pixels), other.encode_image(pixels))
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert torch.equal(model.encode_image(pixels), other.encode_image(pixels))
    assert torch.equal(model.encode_text(ids), other.encode_text(ids))


def test_assigned_weights_are_the_ones_that_run(make_config: Make, tiny: Make, make_texts: Make) -> None:
    """A model built without memory and filled by assignment uses the new tensors everywhere, the text parts too."""
    from chiasm.encoders.build import build_encoder_model

    model = tiny()
    shell = build_encoder_model(make_config(), device="meta").eval()
    shell.load_state_dict(model.state_dict(), strict=True, assign=True)
    pixels, ids = batch(model, make_texts)
    assert torch.equal(shell.encode_image(pixels), model.encode_image(pixels))
    assert torch.equal(shell.encode_text(ids), model.encode_text(ids))


def test_native_keys_are_openais(tiny: Make) -> None:
    tops = {name.split(".")[0] for name in tiny().state_dict()}
    assert tops == {
        "visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection",
        "logit_scale",
    }  # fmt: skip


def test_every_parameter_learns_from_the_contrastive_loss(tiny: Make, make_texts: Make) -> None:
    model = tiny().train()
    out = model(*batch(model, make_texts))
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    (nn.functional.cross_entropy(logits, torch.arange(4)) + logits.T.logsumexp(1).mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_copy_and_double_precision_do_not_share_or_lose_parts(tiny: Make, make_texts: Make) -> None:
    model = tiny()
    ids = make_texts([3, 8])
    before = model.encode_text(ids)
    twin = copy.deepcopy(model).double()
    assert twin.encode_text(ids).dtype == torch.float64
    torch.testing.assert_close(twin.encode_text(ids).float(), before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        twin.token_embedding.weight.zero_()
    assert torch.equal(model.encode_text(ids), before)


def test_checkpointing_changes_neither_loss_nor_gradient(tiny: Make, make_texts: Make) -> None:
    model = tiny().train()
    data = batch(model, make_texts)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out = model(*data)
        (out["image_features"] @ out["text_features"].T).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.set_grad_checkpointing()
    assert model.transformer.grad_checkpointing
    assert model.visual.transformer.grad_checkpointing
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)
    model.set_grad_checkpointing(False)
    assert not model.transformer.grad_checkpointing


def test_patch_features_are_unit_vectors_on_request(tiny: Make) -> None:
    model = tiny()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.patch_features(pixels).norm(dim=-1), torch.ones(2, 4, 4))
    raw = model.patch_features(pixels, normalize=False, mode="tokens")
    assert torch.equal(raw, model.visual.patch_features(pixels, "tokens"))


def test_patch_modes_belong_to_the_vit(tiny: Make) -> None:
    model = tiny(image={"kind": "resnet"})
    pixels = torch.randn(2, 3, 64, 64)
    assert model.patch_features(pixels).shape == (2, 2, 2, 20)
    with pytest.raises(InputError, match="native `vit` only"):
        model.patch_features(pixels, mode="values")


class Blurry(nn.Module):
    """A foreign image tower without patches; the dropout shows whether it is in training mode."""

    output_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.drop(self.linear(self.norm(pixels).mean((2, 3))))
        return out


class Bag(nn.Module):
    """A foreign text tower: the mean of the embeddings under the mask; it remembers how much padding it was shown."""

    output_dim = 5

    def __init__(self, pad_id: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 5)
        self.seen = 0
        if pad_id is not None:
            self.pad_id = pad_id

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.seen = ids.shape[1]
        weights = mask[..., None].float()
        out: Tensor = (self.embed(ids) * weights).sum(1) / weights.sum(1)
        return out


def foreign(make_config: Make, *, can_trim: bool = True, pad_id: int | None = None, **image: Any) -> DualEncoder:
    visual = ProjectedImageTower(Blurry(), nn.Linear(6, 20), 20)
    text = ProjectedTextTower(Bag(pad_id), nn.Linear(5, 20), 20, can_trim=can_trim)
    return DualEncoder(visual, text, make_config(image=image))


def test_foreign_towers_lie_under_their_own_names(make_config: Make) -> None:
    names = set(foreign(make_config).state_dict())
    assert {
        "visual.trunk.linear.weight",
        "visual.head.weight",
        "text.transformer.embed.weight",
        "text.proj.bias",
    } <= names
    assert not any(name.startswith(("transformer", "token_embedding")) for name in names)


@pytest.mark.parametrize("can_trim", [True, False])
def test_foreign_text_gets_its_mask_and_is_cut_only_where_that_is_exact(make_config: Make, can_trim: bool) -> None:
    model = foreign(make_config, can_trim=can_trim).eval()
    ids = torch.randint(1, 100, (3, 16))
    lengths = torch.tensor([2, 7, 5])
    got = model.encode_text(ids, lengths)
    bag: Any = model.text.transformer  # type: ignore[union-attr]
    assert bag.seen == (7 if can_trim else 16)
    expected = torch.stack([bag.embed(row[:n]).mean(0) for row, n in zip(ids, lengths.tolist(), strict=True)])
    torch.testing.assert_close(got, model.text.proj(expected))  # type: ignore[union-attr, operator]


def test_foreign_text_without_lengths_needs_a_padding_id(make_config: Make) -> None:
    ids = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])
    with pytest.raises(InputError, match="need their lengths"):
        foreign(make_config).encode_text(ids)
    model = foreign(make_config, pad_id=0)
    assert torch.equal(model.encode_text(ids), model.encode_text(ids, torch.tensor([2, 3])))


def test_a_tower_without_patches_says_so(make_config: Make) -> None:
    with pytest.raises(InputError, match="no patch tokens"):
        foreign(make_config).patch_features(torch.zeros(1, 3, 8, 8))


def test_a_tower_without_checkpointing_says_so(make_config: Make) -> None:
    model = foreign(make_config)
    model.set_grad_checkpointing(False)
    with pytest.raises(InputError, match="image tower does not offer gradient checkpointing"):
        model.set_grad_checkpointing()


def test_a_locked_tower_stands_still_in_training(make_config: Make) -> None:
    model = foreign(make_config, freeze=True)
    model.visual.trunk.requires_grad_(False)  # type: ignore[union-attr, operator]
    model.train()
    pixels = torch.randn(4, 3, 8, 8) + 3
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))
    assert float(model.state_dict()["visual.trunk.norm.running_mean"].abs().sum()) == 0
    assert model.visual.head.training  # type: ignore[union-attr]


def test_locked_batch_norms_stand_still_even_when_the_rest_trains(make_config: Make) -> None:
    model = foreign(make_config)
    norm: Any = model.visual.trunk.norm  # type: ignore[union-attr]
    norm.requires_grad_(False)
    model.train()
    model.encode_image(torch.randn(4, 3, 8, 8) + 3)
    assert float(norm.running_mean.abs().sum()) == 0
    norm.requires_grad_(True)
    model.train()
    model.encode_image(torch.randn(4, 3, 8, 8) + 3)
    assert float(norm.running_mean.abs().sum()) > 0


def test_the_stored_declaration_is_complete_in_itself(make_config: Make, tiny: Make) -> None:
    assert tiny().stored_config == tiny().config
    model = foreign(make_config)
    assert model.stored_config == model.config
    stored = ImageTowerConfig(kind="python", source="mine:tower", image_size=32, options={"all": "of it"})
    model.visual.trunk.stored = stored  # type: ignore[union-attr, assignment]
    assert model.stored_config.image == stored
    assert model.stored_config.text == model.config.text
