"""Numbers of very different spread are brought to one, with statistics that stand still after training."""

from __future__ import annotations

import pytest
import torch

from chiasm.encoders.adapters import Standardize, make_projection
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import ConfigError
from chiasm.types import Preprocess


def spread(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1e-2, 1, 10, 1, 100]) + 3


def test_statistics_are_those_of_all_training_batches() -> None:
    standard = Standardize(5)
    batches = [spread(64, seed) for seed in range(6)]
    for batch in batches:
        out = standard.train()(batch)
        assert torch.allclose(out.mean(0), torch.zeros(5), atol=1e-4)
    standard.eval()
    everything = standard(torch.cat(batches))
    assert torch.allclose(everything.mean(0), torch.zeros(5), atol=1e-3)
    assert torch.allclose(everything.std(0), torch.ones(5), atol=0.05)
    assert torch.equal(standard(batches[0]), standard(batches[0])), "eval mode must not move the statistics"
    assert not list(standard.parameters())


def test_patches_use_the_statistics_of_whole_images() -> None:
    standard = Standardize(5)
    standard(spread(64, 0))
    standard.eval()
    grid = spread(24, 1).reshape(2, 3, 4, 5)
    assert torch.equal(standard(grid).flatten(0, 2), standard(grid.flatten(0, 2)))


def test_it_stands_in_front_of_either_projection() -> None:
    rows = spread(8, 0)
    for kind in ("linear", "mlp"):
        head = make_projection(kind, 5, 3, input_dropout=0.5, standardize=True)  # type: ignore[arg-type]
        head(rows)
        head.eval()
        other = make_projection(kind, 5, 3, input_dropout=0.5, standardize=True).eval()  # type: ignore[arg-type]
        other.load_state_dict(head.state_dict())
        assert torch.equal(head(rows), other(rows)), "the statistics travel with the weights"
    dropped = make_projection("mlp", 5, 3, input_dropout=0.9)
    assert not torch.equal(dropped(rows), dropped(rows))
    assert torch.equal(dropped.eval()(rows), dropped(rows))


def test_in_a_whole_encoder() -> None:
    def config(**projection: object) -> EncoderConfig:
        return EncoderConfig(
            image=ImageTowerConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, freeze=True),
            text=TextTowerConfig(context_length=4, vocab_size=64, width=16, layers=1, heads=2),
            projection=ProjectionConfig(dim=8, **projection),  # type: ignore[arg-type]
            tokenizer={"kind": "clip", "context_length": 4},
            preprocess=Preprocess(size=16),
        )

    both = config(standardize=("image", "text"))
    assert EncoderConfig.from_dict(both.to_dict()) == both
    model = build_encoder_model(both, seed=0)
    pixels, ids = torch.randn(6, 3, 16, 16), torch.tensor([[62, k, 63, 0] for k in range(1, 7)])
    lengths = torch.full((6,), 3)
    model(pixels, ids, lengths)
    model.eval()
    assert model(pixels, ids, lengths)["image_features"].shape == (6, 8)
    assert model.patch_features(pixels).shape == (6, 2, 2, 8)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("visual")}
    assert trained == {"visual.head.0.weight"}
    with pytest.raises(ConfigError, match=r"projection\.standardize"):
        config(image="none", standardize=("image",))
    with pytest.raises(ConfigError, match=r"projection\.input_dropout"):
        config(input_dropout=1.0)
