"""GLoRIA's map equals a word-by-word, place-by-place derivation; it is refused where there are no words or regions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from chiasm.encoders.base import Encoder
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import InputError
from chiasm.explain.methods import explain, explain_batch, methods_for
from chiasm.explain.word_attention import has_word_attention, word_maps
from chiasm.losses.local import word_attention
from chiasm.testing import TinyEncoder, make_test_images

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "mild", "left", "pleural", "eff", "##usion", "##s", "edema", "base"]


@pytest.fixture(scope="module")
def gloria() -> Encoder:
    """The published architecture at reduced depth, with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    engine = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    named = CATALOG.get("gloria").config
    options = {"width": 8, "layers": [1, 1, 1, 1], "output_dim": 32, "upsample": 75}
    config = replace(
        named,
        image=replace(named.image, image_size=64, options=options),
        text=replace(
            named.text,
            options={"width": 32, "layers": 4, "heads": 2, "mlp_width": 48, "vocab_size": 30, "positions": 97},
        ),
        projection=replace(named.projection, dim=32),
        preprocess=replace(named.preprocess, size=64, resize_size=80),
        tokenizer={"kind": "huggingface", "context_length": 97, "tokenizer": json.loads(engine.to_str())},
    )
    return Encoder(build_encoder_model(config, seed=3), config, name="gloria")


def by_hand(encoder: Encoder, image: object, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Equations 3 and 5 in float64 loops: attention (words, places) and the cosine of each word with its context."""
    with torch.no_grad():
        regions = encoder.model.visual.trunk.image_locals(encoder.preprocess(image)[None])[0].double().numpy()
        tokens = encoder.tokenizer.encode([text])
        slots, counts = encoder.model.text.transformer.word_features(tokens.ids, tokens.mask)
    places = regions.reshape(32, -1).T
    words = slots[0, 1 : 1 + int(counts[0])].double().numpy()
    shares = np.zeros((len(words), len(places)))
    for j, place in enumerate(places):
        dots = [float(word @ place) for word in words]
        raised = [math.exp(d - max(dots)) for d in dots]
        shares[:, j] = [r / sum(raised) for r in raised]
    attention = np.exp(4.0 * shares)
    attention /= attention.sum(1, keepdims=True)
    seen = attention @ places
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(seen, words, strict=True)]
    return attention, np.asarray(cosines)


@pytest.mark.parametrize("text", ["mild pleural effusion", "edema left base effusions"])
def test_the_map_of_a_word_is_the_published_attention(gloria: Encoder, text: str) -> None:
    for image in make_test_images(2):
        attention, cosines = by_hand(gloria, image, text)
        found = word_maps(gloria, image, text)
        assert [m.text for m in found] == text.split()
        for k, heat in enumerate(found):
            np.testing.assert_allclose(heat.values.ravel(), attention[k], rtol=2e-4, atol=1e-7)
            assert float(heat.values.sum()) == pytest.approx(1, abs=1e-5)
            assert heat.image_size == image.size
        whole = explain(gloria, image, text, method="gloria")
        np.testing.assert_allclose(whole.values.ravel(), attention[int(cosines.argmax())], rtol=2e-4, atol=1e-7)
        assert np.ptp(attention, axis=1).max() > 1e-6  # something to compare


def test_without_the_softmax_over_words_it_would_differ(gloria: Encoder) -> None:
    """The trap: equation 3 as printed leaves out what the published code does first."""
    context, words = torch.randn(1, 6, 9), torch.randn(3, 6)
    plain = (4.0 * (words @ context)).softmax(dim=2)
    assert float((word_attention(context, words) - plain).abs().max()) > 0.05


def test_one_word_has_nothing_to_compete_with(gloria: Encoder) -> None:
    """A single word takes all of every region, so the map says nothing, and says so by being flat."""
    heat = word_maps(gloria, make_test_images(1)[0], "edema")[0]
    assert float(np.ptp(heat.values)) < 1e-6


def test_ensembles_and_batches(gloria: Encoder) -> None:
    images = make_test_images(2)
    both = explain_batch(gloria, images, [("left edema", "mild base")] * 2, method="gloria")
    one = [explain(gloria, images[1], t, method="gloria").values for t in ("left edema", "mild base")]
    np.testing.assert_allclose(both[1].values, np.mean(one, axis=0), rtol=1e-4)
    assert both[0].method == "gloria"
    assert "gloria" in methods_for(gloria)
    with pytest.raises(InputError, match="set texts against"):
        explain(gloria, images[0], "left edema", method="gloria", against=["base"])


def test_other_encoders_are_refused() -> None:
    encoder = TinyEncoder()
    assert not has_word_attention(encoder)
    assert "gloria" not in methods_for(encoder)
    with pytest.raises(InputError, match="regions and words"):
        explain(encoder, make_test_images(1)[0], "left edema", method="gloria")
