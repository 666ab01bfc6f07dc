"""Nothing of a report is lost between chunks, and nothing of a chunk is lost in the tokenizer."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import models, normalizers, pre_tokenizers, processors

from chiasm.data.chunks import Chunk, chunk_reports, describe_chunking, resolve_overlap
from chiasm.data.tokenizers import ClipTokenizer, HuggingFaceTokenizer, Tokenizer
from chiasm.datasets.corpus import ReportCorpus
from chiasm.datasets.reports import read_reports
from chiasm.errors import ConfigError, InputError

DATA = os.environ.get("CHIASM_DATA")
WORDS = (
    "colon", "adenocarcinoma,", "Invasive", "pT1c", "N0.", "grade", "1.", "Dr.", "A.", "(benign)", "-", "margins;",
    "free.", "No", "evidence!", "5", "mm", "naïve", "µm", "&amp;", "hemicolectomy", "<end_of_text>", "漢字",
    "x" * 45, "word-" * 12, "é" * 30,
)  # fmt: skip
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=60).map(" ".join) | st.text(min_size=1, max_size=80)


def word_piece(context: int, **options: Any) -> HuggingFaceTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?-()&<>_"
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *("##" + c for c in letters),
        "colon",
        "grade",
        "##carcinoma",
    ]
    engine = Engine(models.WordPiece({w: i for i, w in enumerate(pieces)}, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer()
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return HuggingFaceTokenizer(engine, context, **options)


def byte_level(context: int) -> HuggingFaceTokenizer:
    """Pieces of GPT's kind: a word costs another number of tokens at the start of a text than after a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("Ġc", "o"), ("Ġ", "g"), ("r", "a"), ("d", "e")]
    pieces = ["<pad>", "</s>", *alphabet, *(a + b for a, b in merges)]
    engine = Engine(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return HuggingFaceTokenizer(engine, context)


def unigram(context: int) -> HuggingFaceTokenizer:
    """Pieces of T5's kind, which may reach across words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0), ("▁colon▁gra", -1.0), ("de", -2.0)]
    pieces += [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyzNIT0123456789.,-"]
    engine = Engine(models.Unigram(pieces, unk_id=2))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    engine.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return HuggingFaceTokenizer(engine, context)


TOKENIZERS: dict[str, Callable[[int], Tokenizer]] = {
    "clip": ClipTokenizer,
    "compact": lambda n: ClipTokenizer.compact_from(["colon adenocarcinoma grade"], n),
    "word pieces": word_piece,
    "byte level": byte_level,
    "unigram": unigram,
    "canonicalize": lambda n: word_piece(n, clean="canonicalize"),
    "gloria": lambda n: word_piece(n, clean="report"),
    "refusing": lambda n: word_piece(n, too_long="refuse"),
}


def check_laws(corpus: ReportCorpus, tokenizer: Tokenizer, chunks: Sequence[Chunk]) -> None:
    counts = [len(ids) for ids in tokenizer.encode_ids([c.text for c in chunks])]
    assert max(counts) <= tokenizer.context_length
    assert tokenizer.encode([c.text for c in chunks]).truncated == ()
    assert [c.report for c in chunks] == sorted(c.report for c in chunks)
    whole = [len(ids) <= tokenizer.context_length for ids in tokenizer.encode_ids(list(corpus.texts))]
    for row, report in enumerate(corpus):
        own = [c for c in chunks if c.report == row]
        covered = [False] * len(report.text)
        for chunk in own:
            assert report.text[chunk.start : chunk.end] == chunk.text == chunk.text.strip()
            covered[chunk.start : chunk.end] = [True] * (chunk.end - chunk.start)
        assert all(seen or char.isspace() for seen, char in zip(covered, report.text, strict=True))
        assert [c.start for c in own] == sorted({c.start for c in own})
        assert [c.end for c in own] == sorted({c.end for c in own})
        if whole[row]:
            assert own == [Chunk(row, 0, len(report.text), report.text)]
        else:
            assert len(own) > 1


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.lists(texts, min_size=1, max_size=4), st.integers(12, 40), st.sampled_from([None, 0, 3]))
@settings(max_examples=25, deadline=None)
def test_laws_hold_for_every_tokenizer(kind: str, texts: list[str], context: int, overlap: int | None) -> None:
    texts = [t for t in texts if ReportCorpus.from_texts([f"a {t}"]).texts != ("a",)]
    corpus = ReportCorpus.from_texts([f"a {t}" for t in texts] or ["a"])
    tokenizer = TOKENIZERS[kind](context)
    chunks = chunk_reports(corpus, tokenizer, overlap_tokens=overlap)
    check_laws(corpus, tokenizer, chunks)
    assert chunk_reports(corpus, tokenizer, overlap_tokens=overlap) == chunks


def test_a_report_is_cut_at_the_ends_of_sentences() -> None:
    text = "Colon, sigmoid: adenocarcinoma. Margins are free. Dr. Smith saw 1. One node. No vascular invasion is seen."
    chunks = chunk_reports(ReportCorpus.from_texts([text]), ClipTokenizer(16), overlap_tokens=0)
    assert chunks[0].text == "Colon, sigmoid: adenocarcinoma. Margins are free."
    assert chunks[1].text == "Dr. Smith saw 1. One node."
    assert not any(c.text.endswith(("Dr.", "1.")) for c in chunks)
    assert chunks[-1].text.endswith("No vascular invasion is seen.")


def test_neighbours_share_whole_words_and_the_last_chunk_is_no_scrap() -> None:
    text = " ".join(f"w{i}" for i in range(100)) + " end"
    tokenizer = ClipTokenizer(32)
    chunks = chunk_reports(ReportCorpus.from_texts([text]), tokenizer, overlap_tokens=6)
    for one, next_one in itertools.pairwise(chunks):
        shared = text[next_one.start : one.end]
        assert shared
        assert set(shared.split()) <= set(text.split())
    for one, next_one in itertools.pairwise(chunks[:-1]):
        assert len(tokenizer.encode_ids(text[next_one.start : one.end])[0]) - 2 <= 6
    assert len(tokenizer.encode_ids(chunks[-1].text)[0]) >= 15


def test_a_word_longer_than_the_context_is_cut_inside_and_kept() -> None:
    text = "start " + "q1" * 4000 + " end"
    corpus = ReportCorpus.from_texts([text])
    chunks = chunk_reports(corpus, ClipTokenizer())
    check_laws(corpus, ClipTokenizer(), chunks)
    assert len(chunks) > 50
    with pytest.raises(InputError, match="cannot hold one character"):
        chunk_reports(ReportCorpus.from_texts(["漢字漢字"]), ClipTokenizer(3))


def test_words_that_cost_more_together_than_alone_still_fit() -> None:
    """The trap of adding up words: after a space, this tokenizer needs one token more for each."""
    tokenizer, corpus = byte_level(12), ReportCorpus.from_texts(["xy " * 50])
    alone = len(tokenizer.encode_ids("xy")[0]) - 1
    guessed = " ".join(["xy"] * (11 // alone))
    assert len(tokenizer.encode_ids(guessed)[0]) > 12
    check_laws(corpus, tokenizer, chunk_reports(corpus, tokenizer))


def test_equal_texts_are_cut_alike_and_rows_stay_apart() -> None:
    long = "adenocarcinoma of the colon. " * 20
    chunks = chunk_reports(ReportCorpus.from_texts([long, "short", long]), ClipTokenizer(20))
    first = [(c.start, c.end, c.text) for c in chunks if c.report == 0]
    assert first == [(c.start, c.end, c.text) for c in chunks if c.report == 2]
    assert [c for c in chunks if c.report == 1] == [Chunk(1, 0, 5, "short")]


def test_the_reference_would_lose_the_end() -> None:
    """ModalityPairing embeds what fits and drops the rest; here the diagnosis at the end is in a chunk."""
    text = "Macroscopic description of the specimen. " * 30 + "Diagnosis: adenocarcinoma"
    tokenizer = ClipTokenizer()
    kept = tokenizer.decode(tokenizer.encode_ids(text)[0][:77])
    assert "adenocarcinoma" not in kept
    assert any("adenocarcinoma" in c.text for c in chunk_reports(ReportCorpus.from_texts([text]), tokenizer))


def test_a_wrong_overlap_is_named() -> None:
    tokenizer = ClipTokenizer(20)
    assert resolve_overlap(tokenizer, None) == 2
    assert describe_chunking(tokenizer) == {"rule": "sentences-1", "context_length": 20, "overlap_tokens": 2}
    for overlap in (-1, 10):
        with pytest.raises(ConfigError, match="between 0 and 9"):
            chunk_reports(ReportCorpus.from_texts(["a"]), tokenizer, overlap_tokens=overlap)


def test_chunks_need_no_torch() -> None:
    code = (
        "import sys; from chiasm.data.chunks import chunk_reports; from chiasm.data.tokenizers import ClipTokenizer;"
        "from chiasm.datasets.corpus import ReportCorpus;"
        "chunk_reports(ReportCorpus.from_texts(['no node. ' * 99]), ClipTokenizer()); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(("name", "too_long"), [("pathology_text", 369), ("openi_reports", 977)])
def test_real_reports_are_covered(name: str, too_long: int) -> None:
    path = Path(DATA or "") / name / "metadata.jsonl"
    if not DATA or not path.is_file():
        pytest.skip("CHIASM_DATA does not name the folder of the real data")
    corpus = read_reports(path)
    tokenizer = ClipTokenizer()
    assert sum(len(ids) > 77 for ids in tokenizer.encode_ids(list(corpus.texts))) == too_long
    check_laws(corpus, tokenizer, chunk_reports(corpus, tokenizer))
