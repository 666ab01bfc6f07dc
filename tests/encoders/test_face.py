from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.tokenizers import ClipTokenizer
from chiasm.data.tokens import TruncationWarning
from chiasm.encoders.base import Encoder, weights_digest
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import ConfigError, FileFormatError, InputError, SpaceMismatch
from chiasm.types import Embeddings

Make = Callable[..., Any]
TEXTS = ["no effusion", "left pleural effusion", "a large heart", "x", "clear lungs, no pneumothorax"]
LAW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def encoder(make_config: Make, scramble: Make) -> Encoder:
    import dataclasses

    torch.set_num_threads(1)
    tokenizer = ClipTokenizer.compact_from(TEXTS, context_length=16)
    config = make_config(text={"vocab_size": tokenizer.vocab_size})
    config = dataclasses.replace(config, tokenizer=tokenizer.to_dict())
    model = build_encoder_model(config, seed=0)
    scramble(model)
    return Encoder(model, config, name="tiny")


def picture(seed: int = 0, size: tuple[int, int] = (40, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def test_the_parts_belong_to_each_other(encoder: Encoder) -> None:
    assert encoder.dim == encoder.space.dim == 20
    assert encoder.preprocess(picture()).shape == (3, 32, 32)
    assert encoder.preprocess_spec.size == 32
    assert encoder.tokenizer.context_length == 16
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert encoder.logit_bias is None
    assert str(encoder.device) == "cpu"
    assert "tiny" in repr(encoder)


def test_encode_image_and_text_are_the_models_own(encoder: Encoder) -> None:
    pixels = torch.stack([encoder.preprocess(picture(i)) for i in range(3)])
    with torch.inference_mode():
        expected = encoder.model.encode_image(pixels)
    torch.testing.assert_close(encoder.encode_image(pixels), expected, rtol=1e-5, atol=1e-5)  # packed weights
    torch.testing.assert_close(encoder.encode_image(pixels[0])[0], expected[0], rtol=1e-5, atol=1e-5)
    tokens = encoder.tokenizer.encode(TEXTS)
    by_text = encoder.encode_text(TEXTS)
    assert torch.equal(by_text, encoder.encode_text(tokens))
    assert torch.equal(by_text, encoder.encode_text(encoder.tokenizer(TEXTS)))
    torch.testing.assert_close(encoder.encode_text(TEXTS[0])[0], by_text[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.encode_text(tokens.ids[0])[0], by_text[0], rtol=1e-5, atol=1e-5)
    assert not by_text.requires_grad
    torch.testing.assert_close(encoder.encode_text(TEXTS, normalize=True).norm(dim=1), torch.ones(5))
    assert encoder.patch_features(pixels).shape == (3, 4, 4, 20)


@given(st.lists(st.sampled_from([*TEXTS, 0, 1, 2]), max_size=9), st.integers(1, 4), st.booleans())
@LAW
def test_encode_keeps_the_order_of_a_mixed_list(
    encoder: Encoder, picks: list[str | int], batch_size: int, normalize: bool
) -> None:
    items = [picture(p) if isinstance(p, int) else p for p in picks]
    got = encoder.encode(items, batch_size=batch_size, normalize_embeddings=normalize)
    assert isinstance(got, np.ndarray)
    assert got.shape == (len(items), 20)
    assert got.dtype == np.float32
    for row, item in zip(got, items, strict=True):
        np.testing.assert_allclose(row, encoder.encode(item, normalize_embeddings=normalize), rtol=1e-4, atol=1e-5)


def test_encode_speaks_sentence_transformers(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(4).save(path)
    items = ["x", path, picture(4)]
    array = encoder.encode(items)
    tensor = encoder.encode(items, convert_to_tensor=True)
    rows = encoder.encode(items, convert_to_numpy=False)
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(rows, list)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, tensor.numpy())
    assert torch.equal(torch.stack(rows), tensor)
    np.testing.assert_array_equal(array[1], array[2])
    assert encoder.encode("x").shape == (20,)  # type: ignore[union-attr]
    assert encoder.encode(path).shape == (20,)  # type: ignore[union-attr]
    assert encoder.encode([]).shape == (0, 20)  # type: ignore[union-attr]
    assert encoder.encode(items, precision="float16", device="cpu", show_progress_bar=True).dtype == np.float16  # type: ignore[union-attr]


def test_empty_texts_give_no_rows(encoder: Encoder) -> None:
    assert encoder.encode_text([]).shape == (0, 20)


def test_a_text_that_is_cut_is_reported(encoder: Encoder) -> None:
    long = "clear lungs " * 20
    with pytest.warns(TruncationWarning):
        encoder.encode_text(long)
    with pytest.warns(TruncationWarning):
        encoder.encode([long])


@pytest.mark.parametrize("item", [3, None, b"x", np.zeros((4, 4, 3), np.uint8)])
def test_an_item_that_is_neither_text_nor_image_is_refused(encoder: Encoder, item: Any) -> None:
    with pytest.raises(InputError, match="cannot embed a"):
        encoder.encode(["x", item])


def test_impossible_options_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int8"):
        encoder.encode("x", precision="int8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_size"):
        encoder.encode("x", batch_size=0)
    broken = tmp_path / "secret-name" / "b.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no image")
    with pytest.raises(FileFormatError) as caught:
        encoder.encode(broken)
    assert "secret-name" not in str(caught.value)


def test_similarity_is_the_cosine_and_knows_spaces(encoder: Encoder) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5, 20)).astype(np.float32)
    expected = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    np.testing.assert_allclose(encoder.similarity(a, torch.from_numpy(b)), expected, atol=1e-6)
    assert float(np.abs(encoder.similarity(np.zeros(20), b)).max()) == 0
    mine = Embeddings(a, tuple("abcde"), encoder.space, "image", normalized=False)
    np.testing.assert_allclose(encoder.similarity(mine, b), expected, atol=1e-6)
    import dataclasses

    foreign = dataclasses.replace(mine, space=dataclasses.replace(encoder.space, weights="other"))
    with pytest.raises(SpaceMismatch):
        encoder.similarity(foreign, b)


def test_the_space_follows_the_weights(encoder: Encoder, make_config: Make) -> None:
    space = encoder.space
    assert space == encoder.space
    assert space.preprocess == encoder.config.preprocess.digest
    with torch.no_grad():
        encoder.model.ln_final.bias[0] += 1  # type: ignore[union-attr, operator, index]
    assert encoder.space != space
    with torch.no_grad():
        encoder.model.ln_final.bias[0] -= 1  # type: ignore[union-attr, operator, index]
    state = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    model = build_encoder_model(encoder.config, seed=77)
    other = Encoder(model, encoder.config, name="tiny")
    assert other.space != encoder.space
    model.load_state_dict(state)
    assert other.space == encoder.space
    assert Encoder(model, encoder.config, name="other").space != encoder.space


def test_the_digest_sees_every_bit_name_type_and_shape() -> None:
    base = {"a": torch.arange(6, dtype=torch.float32), "b": torch.tensor(2.0)}
    digest = weights_digest(base)
    assert len(digest) == 16
    assert weights_digest(dict(reversed(base.items()))) == digest
    assert weights_digest({k: v.clone() for k, v in base.items()}) == digest
    changed = base["a"].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    variants = [
        {**base, "a": changed},
        {**base, "a": base["a"].reshape(2, 3)},
        {**base, "a": base["a"].double()},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
        {**base, "b": torch.tensor([2.0])},
    ]
    assert len({digest, *map(weights_digest, variants)}) == 7
    assert weights_digest({"a": torch.arange(6).reshape(2, 3).T}) == weights_digest(
        {"a": torch.arange(6).reshape(2, 3).T.contiguous()}
    )
    assert weights_digest({"x": torch.zeros(3, dtype=torch.bfloat16)}) != weights_digest({"x": torch.zeros(3).half()})


def test_a_model_switched_to_training_is_switched_back(encoder: Encoder) -> None:
    encoder.model.train()
    encoder.encode("x")
    assert not encoder.model.training


def test_many_threads_get_what_one_gets(encoder: Encoder) -> None:
    items: list[Any] = [*TEXTS, picture(1), picture(2)]
    expected = encoder.encode(items)
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        results[i] = encoder.encode(items)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for got in results.values():
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_lower_precision_model_takes_float_pixels(encoder: Encoder) -> None:
    pixels = torch.stack([encoder.preprocess(picture(i)) for i in range(2)])
    exact = encoder.encode_image(pixels, normalize=True)
    encoder.model.double()
    assert encoder.encode_image(pixels).dtype == torch.float64
    torch.testing.assert_close(encoder.encode_image(pixels, normalize=True).float(), exact, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_does_not_fit_the_tower_is_refused(encoder: Encoder, make_config: Make) -> None:
    with pytest.raises(ConfigError, match="longer than the text tower's 16"):
        Encoder(encoder.model, encoder.config, name="x", tokenizer=ClipTokenizer.compact_from(TEXTS, 77))
    config = make_config()  # a hundred ids, but the full vocabulary of CLIP
    with pytest.raises(ConfigError, match="has 49408 ids, the text tower embeds 100"):
        _ = Encoder(build_encoder_model(config, seed=0), config, name="x").tokenizer
