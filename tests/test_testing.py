"""The means of testing that chiasm offers to plug-in authors are themselves right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chiasm.checkpoints.containers import read_state_dict, sniff
from chiasm.testing import TEXTS, TinyEncoder, check_reader, make_test_images, save_openai_archive
from chiasm.types import Sample


def test_tiny_encoder_is_small_real_and_fixed_by_its_seed() -> None:
    first, again, other = TinyEncoder(1), TinyEncoder(1), TinyEncoder(2)
    assert first.space == again.space != other.space
    assert sum(p.numel() for p in first.model.parameters()) < 120_000
    vectors = first.encode([*TEXTS, "any text at all: größe 5 µm"], normalize_embeddings=True)
    assert vectors.shape == (5, 24)
    assert (
        first.tokenizer.decode(first.tokenizer.encode_ids(TEXTS[1])[0])
        == "small left pleural effusion . no pneumothorax ."
    )
    assert first.patch_features(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4, 24)
    assert first.tokenizer.encode(list(TEXTS)).truncated == ()


def test_images_differ() -> None:
    images = make_test_images(3)
    assert len({i.size for i in images}) == 3
    assert np.array_equal(np.asarray(images[0]), np.asarray(make_test_images(3)[0]))


def test_check_reader(tmp_path: Path) -> None:
    make_test_images(1)[0].save(tmp_path / "a.png")
    good = [Sample(id="1", image=tmp_path / "a.png"), Sample(id="2", text="x", patient="p")]
    check_reader(good)
    for bad, message in (
        ([], "no samples"),
        ([{"id": 1}], "row 0 is dict"),
        ([*good, good[0]], "row 2 repeats an id"),
        ([replace(good[0], id="")], "row 0 has an empty id"),
        ([Sample(id="1")], "neither image nor text"),
        ([Sample(id="1", image=tmp_path / "gone.png")], "does not exist"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_reader(bad)


def test_archives_look_like_openais(tmp_path: Path) -> None:
    """Mixed precision as in the published files: matrices halved; norms, embeddings and the scale in full."""
    encoder = TinyEncoder(0, kind="resnet")
    path = save_openai_archive(encoder.model.state_dict(), tmp_path / "a.pt")
    assert sniff(path) == "torchscript"
    tensors = read_state_dict(path).tensors
    assert set(tensors) == {*encoder.model.state_dict(), "input_resolution", "context_length", "vocab_size"}
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert kinds["visual.layer1.0.conv1.weight"] == kinds["text_projection"] == torch.float16
    assert kinds["transformer.resblocks.0.attn.in_proj_weight"] == torch.float16
    for name in ("logit_scale", "ln_final.weight", "token_embedding.weight", "positional_embedding"):
        assert kinds[name] == torch.float32
    assert kinds["visual.bn1.running_mean"] == kinds["visual.layer1.0.downsample.1.weight"] == torch.float32
