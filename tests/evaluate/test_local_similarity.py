"""Regions compared with words: BioViL's heat map on the image, GLoRIA's similarity through an encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from chiasm.encoders.base import Encoder
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import InputError, UnknownName
from chiasm.evaluate.local_similarity import (
    has_local_features,
    heat_map_on_image,
    local_similarities,
    text_heat_map,
)
from chiasm.explain.methods import explain
from chiasm.explain.similarity import biovil_maps, patch_text_maps
from chiasm.testing import TinyEncoder, make_test_images


@pytest.mark.parametrize(("width", "height"), [(700, 512), (512, 901), (1023, 611), (480, 480)])
def test_margins_and_cells_of_the_heat_map(width: int, height: int) -> None:
    values = np.random.default_rng(0).normal(size=(15, 15)).astype(np.float32)
    full = heat_map_on_image(values, (width, height), crop_px=480)
    assert full.shape == (height, width)
    side = int(480 * min(height, width) / 512)
    seen = np.isfinite(full)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert (len(rows), len(columns)) == (side, side)
    assert seen.sum() == side * side
    assert rows[0] == int(np.floor((height - side) / 2))
    assert height - 1 - rows[-1] == int(np.ceil((height - side) / 2))
    assert columns[0] == int(np.floor((width - side) / 2))
    assert width - 1 - columns[-1] == int(np.ceil((width - side) / 2))
    blurred = gaussian_filter(values, 1.5)
    for y, x in ((0, 0), (side // 2, side // 3), (side - 1, side - 1)):  # a nearest cell by its own formula
        assert full[rows[0] + y, columns[0] + x] == blurred[int(y * 15 / side), int(x * 15 / side)]
    assert np.abs(blurred - values).max() > 0.1  # the trap: without the blur


def test_bilinear_heat_maps_and_refusals() -> None:
    values = np.arange(9.0).reshape(3, 3)
    smooth = heat_map_on_image(values, (64, 64), crop_px=480, sigma=1e-6, interpolation="bilinear")
    blocks = heat_map_on_image(values, (64, 64), crop_px=480, sigma=1e-6)
    assert len(np.unique(blocks[np.isfinite(blocks)])) == 9
    assert len(np.unique(smooth[np.isfinite(smooth)])) > 100
    with pytest.raises(InputError):
        heat_map_on_image(values[0], (64, 64), crop_px=480)
    with pytest.raises(InputError):
        heat_map_on_image(values, (1, 1), crop_px=480)
    with pytest.raises(UnknownName):
        heat_map_on_image(values, (64, 64), crop_px=480, interpolation="cubic")  # type: ignore[arg-type]


def test_the_heat_map_of_an_encoder() -> None:
    encoder, image = TinyEncoder(), make_test_images(1)[0]
    prompts = ["a chest radiograph", "x"]
    full = text_heat_map(encoder, image, prompts)
    patches = F.normalize(encoder.patch_features(encoder.preprocess(image))[0], dim=-1)
    direction = F.normalize(encoder.encode_text(prompts).mean(0), dim=0)
    expected = heat_map_on_image((patches @ direction).numpy(), image.size, crop_px=32, resize_px=32)
    np.testing.assert_allclose(full, expected, atol=1e-6)
    assert full.shape == image.size[::-1]
    with pytest.raises(InputError, match="empty"):
        text_heat_map(encoder, image, " ")


def test_explain_knows_biovils_map() -> None:
    encoder, image = TinyEncoder(), make_test_images(1)[0]
    found = explain(encoder, image, "x", method="biovil")
    plain = explain(encoder, image, "x", method="similarity")
    np.testing.assert_allclose(found.values, gaussian_filter(plain.values, 1.5), atol=1e-6)
    assert np.abs(found.values - plain.values).max() > 1e-3
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    maps = biovil_maps(encoder.model.image_side(), pixels, directions)
    for k, single in enumerate(patch_text_maps(encoder.model.image_side(), pixels, directions)):
        np.testing.assert_allclose(maps[k], gaussian_filter(single.numpy(), 1.5), atol=1e-6)
    assert biovil_maps(encoder.model.image_side(), pixels[:0], directions[:0]).shape == (0, 4, 4)


def test_a_plain_encoder_has_no_local_features() -> None:
    assert not has_local_features(TinyEncoder())
    with pytest.raises(InputError, match="regions and words"):
        local_similarities(TinyEncoder(), [], ["a"])


# --- GLoRIA at reduced depth ----------------------------------------------------------------------------------------

WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "mild",
    "left",
    "pleural",
    "eff",
    "##usion",
    "##s",
    "edema",
    "at",
    "the",
    "base",
]
PROMPTS = ["mild pleural effusion", "edema at the left base", "left effusions"]


@pytest.fixture(scope="module")
def gloria() -> Encoder:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    engine = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    named = CATALOG.get("gloria").config
    bert = {"width": 32, "layers": 4, "heads": 2, "mlp_width": 48, "vocab_size": 30, "positions": 97}
    config = replace(
        named,
        image=replace(
            named.image, image_size=64, options={"width": 8, "layers": [1, 1, 1, 1], "output_dim": 32, "upsample": 75}
        ),
        text=replace(named.text, options=bert),
        projection=replace(named.projection, dim=32),
        preprocess=replace(named.preprocess, size=64, resize_size=80),
        tokenizer={"kind": "huggingface", "context_length": 97, "tokenizer": json.loads(engine.to_str())},
    )
    return Encoder(build_encoder_model(config, seed=3), config, name="gloria")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for path, image in zip(paths, make_test_images(3), strict=True):
        image.save(path)
    return paths


def gloria_oracle(encoder: Encoder, paths: list[Path], prompts: list[str], peer: bool) -> np.ndarray:
    """GLoRIA's recipe word by word and place by place, from the specification, in float64 loops."""
    from PIL import Image

    vocabulary = {w: i for i, w in enumerate(WORDS)}
    bert, rows = encoder.model.text.transformer.model, []  # type: ignore[union-attr]
    texts = []
    for prompt in prompts:
        pieces = encoder.tokenizer.encode([prompt])
        ids = pieces.ids[:, : int(pieces.lengths[0])]
        with torch.no_grad():
            layers = bert(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
        total = sum(layer[0].double().numpy() for layer in layers[-4:])
        slots = np.zeros((97, 32))
        slot = -1
        for piece, vector in zip(ids[0].tolist(), total, strict=True):
            slot += not WORDS[piece].startswith("##")
            slots[slot] += vector
        count = sum(c != "[" for c in prompt) if peer else slot - 1
        texts.append(slots[1 : count + 1])
    assert vocabulary["##usion"] == 8
    for path in paths:
        with torch.no_grad():
            regions = encoder.model.visual.trunk.image_locals(encoder.preprocess(Image.open(path))[None])  # type: ignore[union-attr]
        places = regions[0].double().numpy().reshape(32, -1).T
        row = []
        for words in texts:
            dots = words @ places.T
            shares = np.exp(dots - dots.max(0)) / np.exp(dots - dots.max(0)).sum(0)
            best = -np.inf
            for word, share in zip(words, shares, strict=True):
                attention = np.exp(4 * share) / np.exp(4 * share).sum()
                context = attention @ places
                norms = np.linalg.norm(word) * np.linalg.norm(context)
                best = max(best, 5 * float(word @ context) / max(norms, 1e-8))
            row.append(best)
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("words", ["words", "characters"])
def test_local_similarities_are_those_of_the_recipe(gloria: Encoder, pictures: list[Path], words: str) -> None:
    found = local_similarities(gloria, pictures, PROMPTS, words=words, batch_size=2)  # type: ignore[arg-type]
    expected = gloria_oracle(gloria, pictures, PROMPTS, words == "characters")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # a batch norm stands in the tower
    other = gloria_oracle(gloria, pictures, PROMPTS, words != "characters")
    assert np.abs(found - other).max() > 1e-3  # the trap: the other count of words
    alone = local_similarities(gloria, pictures[1:2], PROMPTS[:1], words=words)  # type: ignore[arg-type]
    np.testing.assert_allclose(alone[0, 0], found[1, 0], rtol=1e-4, atol=1e-5)
    assert local_similarities(gloria, [], PROMPTS).shape == (0, 3)


def test_a_prompt_of_one_word_is_refused_by_the_count_of_words(gloria: Encoder, pictures: list[Path]) -> None:
    with pytest.raises(InputError, match="has no word left"):
        local_similarities(gloria, pictures, ["mild edema", ""])


def test_glorias_protocol_with_both_halves(gloria: Encoder, pictures: list[Path], tmp_path: Path) -> None:
    from functools import partial

    from chiasm.embed import embed_images, embed_texts
    from chiasm.tasks.prompts import LabelPrompts, PromptSet
    from chiasm.tasks.protocol import get_protocol
    from chiasm.tasks.protocol_run import run_protocol

    assert has_local_features(gloria)
    prompts = PromptSet((LabelPrompts("effusion", (PROMPTS[0], PROMPTS[2])), LabelPrompts("edema", (PROMPTS[1],))))
    images = embed_images(gloria, pictures)
    local = local_similarities(gloria, pictures, PROMPTS)
    result = run_protocol(
        get_protocol("gloria-chexpert5x200"), images, partial(embed_texts, gloria), prompts=prompts, variant="words",
        local=lambda wanted, _: local[:, [PROMPTS.index(t) for t in wanted]],
    )  # fmt: skip
    whole = images.vectors @ embed_texts(gloria, PROMPTS).vectors.T
    both = (whole + local) / 2
    classes = np.stack([both[:, [0, 2]].max(1), both[:, 1]], axis=1)
    np.testing.assert_allclose(result.logits, (classes - classes.mean(0)) / classes.std(0), rtol=1e-4, atol=1e-4)
    assert not any("global half" in note for note in result.notes)
    with pytest.raises(UnknownName):
        local_similarities(gloria, pictures, PROMPTS, words="letters")  # type: ignore[arg-type]
