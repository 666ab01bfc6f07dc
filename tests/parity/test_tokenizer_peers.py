"""Our CLIP tokenizer against open_clip's and OpenAI's own, on thousands of strings. Runs in .venv-peers only."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.data.byte_pairs import BytePairs
from chiasm.data.tokenizers import ClipTokenizer

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("default"),  # the peers warn about their own dependencies
]
open_clip = pytest.importorskip("open_clip", reason="needs the environment made by `make peers`")

peer = open_clip.get_tokenizer("ViT-B-32")
varied_texts = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_tokens.py"))["varied_texts"]
tokenizers = {"accelerated": ClipTokenizer(), "plain": ClipTokenizer(accelerate=False)}


def differing(ours: torch.Tensor, theirs: torch.Tensor, texts: list[str]) -> list[str]:
    return [ascii(texts[int(i)])[:200] for i in (ours != theirs).any(1).nonzero()]


@pytest.mark.parametrize("way", tokenizers)
@pytest.mark.parametrize("seed", range(4))
def test_ids_equal_open_clip_on_5000_strings(way: str, seed: int) -> None:
    texts = varied_texts(5000, seed)
    assert differing(tokenizers[way].encode(texts).ids, peer(texts), texts) == []


@given(st.text(max_size=200) | st.text(alphabet=st.characters(max_codepoint=127)), st.integers(3, 80))
@settings(max_examples=1000, deadline=None)
def test_ids_equal_open_clip_on_any_text(text: str, context: int) -> None:
    theirs = peer(text, context_length=context)
    assert torch.equal(tokenizers["plain"].encode(text, context).ids, theirs)


def test_ids_equal_openai_on_5000_strings() -> None:
    clip = pytest.importorskip("clip")
    texts = [t for t in varied_texts(5000, 11) if "_of_text>" not in t.lower() and "<|" not in t and "ſ" not in t]
    ours = tokenizers["plain"].encode(texts).ids
    assert differing(ours, clip.tokenize(texts, truncate=True).to(torch.int64), texts) == []


def test_the_cleaning_is_needed() -> None:
    """Leaving it out must show: 26 % of such strings hold something that it changes."""
    texts = varied_texts(1000, 5)
    pairs = BytePairs()
    uncleaned = ["".join(t.lower()) for t in texts]
    encodable = [(t, u) for t, u in zip(texts, uncleaned, strict=True) if u.isascii() or u.isprintable()]
    wrong = sum(pairs.encode_cleaned(u) != peer.encode(t) for t, u in encodable)
    assert wrong > 50


def test_decoding_agrees_with_open_clip() -> None:
    for text in varied_texts(500, 8):
        ids = peer.encode(text)
        if all(i < 49406 for i in ids):
            assert tokenizers["plain"].decode(ids) == peer.decode(ids).strip()
