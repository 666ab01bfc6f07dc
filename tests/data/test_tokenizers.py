"""CLIP's tokenizer against recorded ids of open_clip, its compact vocabularies, and Hugging Face tokenizers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import types
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from chiasm.data.byte_pairs import BytePairs, close_over_parts, read_merges, split_words
from chiasm.data.mending import clean_text
from chiasm.data.tokenizers import (
    ClipTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    TruncationWarning,
    make_tokenizer,
)
from chiasm.errors import ConfigError, FileFormatError, InputError, UnknownName

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "clip_tokens.json").read_text())
REPORTS = (
    "Frontal chest radiograph: small left pleural effusion, no pneumothorax.",
    "Cardiomegaly. The lungs are clear; patient's heart isn't normal (CTR 0.61).",
    "H&amp;E: poorly differentiated adenocarcinoma – grade 3",
)

any_text = st.text(max_size=60) | st.text(alphabet=st.characters(max_codepoint=126), max_size=60)
clip = ClipTokenizer()
plain = ClipTokenizer(accelerate=False)
full = BytePairs()


# --- identical to open_clip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [clip, plain], ids=["accelerated", "plain"])
def test_ids_are_those_of_open_clip(tokenizer: ClipTokenizer) -> None:
    tokens = tokenizer.encode([text for text, _ in GOLDEN])
    for i, (text, ids) in enumerate(GOLDEN):
        assert tokens.ids[i, : len(ids)].tolist() == ids, ascii(text)
        assert not tokens.ids[i, len(ids) :].any()
        assert int(tokens.lengths[i]) == len(ids)
    assert tokens.truncated == tuple(i for i, (text, _) in enumerate(GOLDEN) if len(plain.encode_ids(text)[0]) > 77)
    assert len(tokens.truncated) >= 3


@pytest.mark.parametrize(("text", "ids"), GOLDEN[:40])
def test_one_text_alone_gives_the_same_ids_as_in_a_batch(text: str, ids: list[int]) -> None:
    assert clip.encode(text).ids[0, : len(ids)].tolist() == ids


def test_golden_strings_hold_the_hard_classes() -> None:
    texts = [t for t, _ in GOLDEN]
    assert "" in texts
    assert any(0xD800 <= ord(c) <= 0xDFFF for t in texts for c in t)
    assert any("<end_of_text>" in t for t in texts)
    assert any("&amp;" in t for t in texts)
    assert any("\x1b" in t for t in texts)


def test_vocabulary_is_the_published_file() -> None:
    path = files("chiasm.data") / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert digest in (Path(__file__).parents[2] / "NOTICE").read_text()
    assert (clip.vocab_size, clip.sot_id, clip.eot_id, clip.pad_id) == (49408, 49406, 49407, 0)
    # what makes the parts of every piece, and so the compact vocabularies, well defined
    assert len({a + b for a, b in read_merges()}) == 48_894


def test_module_is_light() -> None:
    code = (
        "import sys, chiasm.data.tokenizers as t; c = t.ClipTokenizer(); ids = c.encode_ids('a film')\n"
        "assert ids == [[49406, 320, 1860, 49407]], ids\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'ftfy', 'regex'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_accelerator_the_ids_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from chiasm.data import tokenizers

    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    tokenizers._accelerator.cache_clear()
    try:
        assert tokenizers._accelerator() is None
        texts = [t for t, _ in GOLDEN]
        assert torch.equal(ClipTokenizer().encode(texts).ids, plain.encode(texts).ids)
    finally:
        tokenizers._accelerator.cache_clear()


def test_an_accelerator_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from chiasm.data import tokenizers

    class Other:
        def encode(self, text: str) -> list[int]:
            return [] if text.strip() == "" else [320]

    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", types.SimpleNamespace(Tokenizer=Other))
    tokenizers._accelerator.cache_clear()
    try:
        assert tokenizers._accelerator() is None
        assert torch.equal(ClipTokenizer().encode("a film").ids, plain.encode("a film").ids)
    finally:
        tokenizers._accelerator.cache_clear()


def test_the_stored_self_check_holds_the_true_ids() -> None:
    stored = json.loads((files("chiasm.data") / "vocabulary" / "accelerator_check.json").read_text())
    assert len(stored) >= 50
    assert all(text.isascii() for text, _ in stored)
    assert dict(stored) == {text: plain.encode_ids(text)[0][1:-1] for text, _ in stored}


def test_one_text_needs_neither_the_merges_nor_ftfy() -> None:
    pytest.importorskip("instant_clip_tokenizer")
    code = (
        "import sys, chiasm.data.tokenizers as t, chiasm.data.byte_pairs as b\n"
        "tokens = t.ClipTokenizer().encode('a film')\n"
        "assert tokens.ids[0, :5].tolist() == [49406, 320, 1860, 49407, 0], tokens\n"
        "print(b.read_merges.cache_info().misses, *({'ftfy', 'regex', 'tokenizers', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


@pytest.mark.parametrize("context", [3, 4, 5, 77])
def test_simple_and_other_texts_of_one_batch(context: int) -> None:
    simple = ["a film", "", "A FILM", "a b c d e f", "\t\n", "<end_of_text> a", "! !", "!"]
    other = ["H&E", "é", "a & b", "caf&eacute;", "\x00", "漢"]
    for texts in (simple, other, [*simple, *other], [*other, *simple], *([t] for t in simple + other)):
        ours, expected = clip.encode(texts, context), plain.encode(texts, context)
        assert torch.equal(ours.ids, expected.ids)
        assert ours.ids.dtype == torch.int64
        assert torch.equal(ours.lengths, expected.lengths)
        assert ours.truncated == expected.truncated


def test_the_full_vocabulary_is_described_without_being_read() -> None:
    pairs = BytePairs()
    assert (clip.sot_id, clip.eot_id, clip.vocab_size, clip.keep) == (pairs.start_id, pairs.end_id, pairs.size, None)


# --- laws -----------------------------------------------------------------------------------------------------------


@given(st.lists(any_text, max_size=12), st.integers(3, 20))
@settings(max_examples=150, deadline=None)
def test_rows_are_well_formed_whatever_the_text(texts: list[str], context: int) -> None:
    tokens = clip.encode(texts, context)
    assert tokens.ids.shape == (len(texts), context)
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    for i, row in enumerate(tokens.ids):
        length = int(tokens.lengths[i])
        assert 2 <= length <= context
        assert row[0] == clip.sot_id
        assert row[length - 1] == clip.eot_id
        assert not row[length:].any()
    assert tokens.mask.sum(1).tolist() == tokens.lengths.tolist()
    uncut = plain.encode_ids(texts)
    assert tokens.truncated == tuple(i for i, ids in enumerate(uncut) if len(ids) > context)
    assert torch.equal(tokens.ids, plain.encode(texts, context).ids)


@given(any_text.filter(lambda t: "_of_text>" not in clean_text(t)))
@settings(max_examples=150, deadline=None)
def test_decoding_gives_the_words_back(text: str) -> None:
    (ids,) = clip.encode_ids(text)
    assert clip.decode(ids) == " ".join(split_words(clean_text(text)))
    assert clip.decode([*ids, 0, 0, 0]) == clip.decode(ids)


@given(any_text)
@settings(max_examples=150, deadline=None)
def test_words_cover_the_row_once_and_in_order(text: str) -> None:
    tokenizer = ClipTokenizer(12)
    length = int(tokenizer.encode(text).lengths[0])
    spans = tokenizer.words(text)
    assert [s.word for s in spans] == split_words(clean_text(text))[: len(spans)]
    assert [p for s in spans for p in range(s.start, s.stop)] == list(range(1, length - 1))
    assert len(tokenizer.pieces(text)) == length


def test_pieces_and_words_of_a_report() -> None:
    text = "Bronchiectasis in the 2nd lobe's"
    pieces = clip.pieces(text)
    assert pieces == ["<start_of_text>", "bron", "chi", "ec", "tas", "is", "in", "the", "2", "nd", "lobe", "'s",
                      "<end_of_text>"]  # fmt: skip
    for span in clip.words(text):
        assert "".join(pieces[span.start : span.stop]) == span.word


# --- truncation and bad input ---------------------------------------------------------------------------------------


def test_a_cut_text_is_reported_and_keeps_its_end_token() -> None:
    texts = ["short", "pleural effusion " * 50, "also short", "x y " * 40]
    tokens = clip.encode(texts)
    assert tokens.truncated == (1, 3)
    assert tokens.lengths.tolist() == [3, 77, 4, 77]
    assert tokens.ids[[1, 3], -1].tolist() == [clip.eot_id] * 2
    with pytest.warns(TruncationWarning, match="2 of 4 texts are longer than the context of 77 tokens") as caught:
        ids = clip(texts)
    assert caught[0].filename == __file__
    assert torch.equal(ids, tokens.ids)
    assert "pleural" not in str(caught[0].message)


def test_a_text_that_just_fits_is_not_cut() -> None:
    assert clip.encode(["a " * 75] * 9).truncated == ()
    assert clip.encode(["a " * 76] * 9).truncated == tuple(range(9))
    assert clip.encode("a " * 75).truncated == ()
    assert clip.encode("a " * 76).truncated == (0,)


def test_no_texts_and_one_text() -> None:
    assert clip([]).shape == (0, 77)
    assert clip("a film").shape == (1, 77)
    assert clip("a film", context_length=8).shape == (1, 8)
    assert clip.encode([]).mask.shape == (0, 77)


def test_long_words_do_not_take_for_ever() -> None:
    assert clip.encode("a" * 200_000).truncated == (0,)


@pytest.mark.parametrize("bad", [[None], ["a", 3.5], ["a", float("nan")], [b"a"], [["a"]]])
def test_what_is_not_text_is_refused_without_its_content(bad: list[object]) -> None:
    with pytest.raises(InputError, match=rf"text {len(bad) - 1} is of type \w+, expected str"):
        clip.encode(bad)  # type: ignore[arg-type]


def test_decode_refuses_foreign_ids() -> None:
    with pytest.raises(InputError, match="outside the vocabulary"):
        ClipTokenizer(keep=[]).decode([2000])


@pytest.mark.parametrize("context", [0, 2, -5])
def test_a_context_without_room_is_refused(context: int) -> None:
    with pytest.raises(ConfigError, match="context length"):
        ClipTokenizer(context)
    with pytest.raises(ConfigError, match="context length"):
        clip.encode("a", context)


# --- compact vocabulary ---------------------------------------------------------------------------------------------


def test_compact_vocabulary_cuts_its_texts_as_the_full_one_does() -> None:
    compact = ClipTokenizer.compact_from(REPORTS, 40)
    assert compact.vocab_size < 800
    assert compact.eot_id == compact.vocab_size - 1 == compact.sot_id + 1
    assert compact.context_length == 40
    for report in REPORTS:
        assert compact.pieces(report) == ClipTokenizer(40).pieces(report)
        assert compact.words(report) == ClipTokenizer(40).words(report)


@given(st.lists(any_text, max_size=5), any_text, st.lists(st.integers(512, 49405), max_size=5))
@settings(max_examples=80, deadline=None)
def test_compact_vocabulary_is_exact_on_its_texts_and_total_on_others(
    texts: list[str], other: str, more: list[int]
) -> None:
    compact = BytePairs([*(i for t in texts for i in full.encode(t) if 512 <= i < full.start_id), *more])
    for text in texts:
        assert [compact.piece(i) for i in compact.encode(text)] == [full.piece(i) for i in full.encode(text)]
    assert compact.decode(compact.encode(other)) == full.decode(full.encode(other))
    assert all(0 <= i < compact.size for i in compact.encode(other))
    assert compact.size == 514 + len(compact.keep or ())
    assert BytePairs(compact.keep).pieces == compact.pieces


def test_kept_pieces_bring_their_parts() -> None:
    merges = read_merges()
    assert close_over_parts([]) == ()
    assert close_over_parts([3, 511]) == ()  # bytes belong to every vocabulary
    last = 512 + 48_893
    closed = close_over_parts([last])
    produced = {"".join(merges[i - 512]) for i in closed}
    for i in closed:
        assert all(len(part.removesuffix("</w>")) == 1 or part in produced for part in merges[i - 512])


@pytest.mark.parametrize("bad", [49406, 10**9])
def test_ids_beyond_the_merges_are_refused(bad: int) -> None:
    with pytest.raises(ConfigError, match=f"token id {bad}"):
        ClipTokenizer(keep=[bad])


# --- from and to mappings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [clip, ClipTokenizer(16), ClipTokenizer.compact_from(REPORTS, 32)], ids=repr)
def test_mapping_round_trip(tokenizer: ClipTokenizer) -> None:
    spec = json.loads(json.dumps(tokenizer.to_dict()))
    again = make_tokenizer(spec)
    assert again.to_dict() == spec
    assert isinstance(again, Tokenizer)
    assert torch.equal(again.encode(REPORTS).ids, tokenizer.encode(REPORTS).ids)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"kind": "clap"}, UnknownName, "did you mean `clip`"),
        ({}, UnknownName, "unknown tokenizer kind"),
        ({"kind": "clip", "contxt": 3}, ConfigError, "unknown field `tokenizer.contxt`"),
        ({"kind": "clip", "context_length": "77"}, ConfigError, "must be an integer"),
        ({"kind": "huggingface"}, ConfigError, "tokenizer.source"),
        ({"kind": "huggingface", "source": "a", "tokenizer": {}}, ConfigError, "tokenizer.source"),
        ({"kind": "huggingface", "tokenizer": {"model": {}}, "context_length": 9}, FileFormatError, "not usable"),
    ],
)
def test_bad_mappings_are_named(spec: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_tokenizer(spec)


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def word_pieces(pad: str = "[PAD]") -> Engine:
    words = [pad, "[UNK]", "[CLS]", "[SEP]", "pleural", "eff", "##usion", "no", ".", "chest", "##s"]
    engine = Engine(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer()
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    engine.add_special_tokens([pad, "[UNK]", "[CLS]", "[SEP]"])
    return engine


def test_hugging_face_rows() -> None:
    bert = HuggingFaceTokenizer(word_pieces(), 8)
    tokens = bert.encode(["No pleural effusion.", "", "chests " * 20])
    assert tokens.ids.tolist() == [[2, 7, 4, 5, 6, 8, 3, 0], [2, 3, 0, 0, 0, 0, 0, 0], [2, 9, 10, 9, 10, 9, 10, 3]]
    assert tokens.lengths.tolist() == [7, 2, 8]
    assert tokens.truncated == (2,)
    assert tokens.mask.sum(1).tolist() == [7, 2, 8]
    assert (bert.pad_id, bert.eot_id, bert.vocab_size) == (0, 3, 11)
    assert bert.decode(tokens.ids[0]) == "no pleural effusion."
    assert bert.encode_ids("chests " * 20)[0] == [2, *[9, 10] * 20, 3]
    assert bert.pieces("Effusion") == ["[CLS]", "eff", "##usion", "[SEP]"]
    assert [tuple(s) for s in bert.words("No Effusion.")] == [("No", 1, 2), ("Effusion", 2, 4), (".", 4, 5)]
    with pytest.warns(TruncationWarning, match="1 of 1"):
        bert("chest " * 20)
    assert bert.encode("chest " * 20, 4).ids.shape == (1, 4)
    assert isinstance(bert, Tokenizer)


@given(st.lists(any_text, min_size=1, max_size=6), st.integers(3, 12))
@settings(max_examples=60, deadline=None)
def test_hugging_face_rows_are_well_formed_whatever_the_text(texts: list[str], context: int) -> None:
    bert = HuggingFaceTokenizer(word_pieces(), context)
    tokens = bert.encode(texts)
    assert tokens.ids.shape == (len(texts), context)
    for i, row in enumerate(tokens.ids):
        assert row[int(tokens.lengths[i]) - 1] == 3
        for span in bert.words(texts[i]):
            assert 1 <= span.start < span.stop <= int(tokens.lengths[i]) - 1
    assert tokens.truncated == tuple(i for i, ids in enumerate(bert.encode_ids(texts)) if len(ids) > context)


def test_a_stored_tokenizer_needs_its_source_no_more(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    engine = word_pieces("<pad>")
    engine.enable_truncation(6)
    engine.save(str(source / "tokenizer.json"))
    bert = make_tokenizer({"kind": "huggingface", "source": str(source)})
    assert bert.context_length == 6
    model = tmp_path / "model"
    model.mkdir()
    assert isinstance(bert, HuggingFaceTokenizer)
    short = json.loads(json.dumps(bert.save(model)))
    inline = json.loads(json.dumps(bert.to_dict()))
    (source / "tokenizer.json").unlink()
    texts = ["no pleural effusion", "chests . . . . . ."]
    for again in (make_tokenizer(short, directory=model), make_tokenizer(inline)):
        assert torch.equal(again.encode(texts).ids, bert.encode(texts).ids)
        assert again.encode(texts).truncated == (1,)
        assert again.to_dict() == inline


def test_folders_and_objects_of_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=word_pieces(), pad_token="[PAD]", model_max_length=9)
    assert HuggingFaceTokenizer(wrapped).encode("no chest").ids.tolist() == [[2, 7, 9, 3, 0, 0, 0, 0, 0]]
    wrapped.save_pretrained(tmp_path / "saved")
    assert HuggingFaceTokenizer(tmp_path / "saved").context_length == 9
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nno\nchest\n")
    (tmp_path / "old" / "config.json").write_text('{"model_type": "bert"}')
    old = HuggingFaceTokenizer(tmp_path / "old", 6)
    assert old.encode("No chest").ids.tolist() == [[2, 5, 6, 3, 0, 0]]


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="states no context length"):
        HuggingFaceTokenizer(word_pieces())
    with pytest.raises(InputError, match="states no padding token"):
        HuggingFaceTokenizer(word_pieces("[FILL]"), 8)
    assert HuggingFaceTokenizer(word_pieces("[FILL]"), 8, pad_token="[FILL]").pad_id == 0
    with pytest.raises(InputError, match=r"has no token `\[NIL\]`"):
        HuggingFaceTokenizer(word_pieces(), 8, pad_token="[NIL]")
    with pytest.raises(InputError, match="no tokenizer at `absent`"):
        HuggingFaceTokenizer(tmp_path / "absent", 8)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(FileFormatError, match="not readable JSON"):
        HuggingFaceTokenizer(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(FileFormatError, match="expected a JSON object"):
        HuggingFaceTokenizer(tmp_path, 8)
    with pytest.raises(InputError, match="cannot make a tokenizer from int"):
        HuggingFaceTokenizer(3, 8)
    with pytest.raises(InputError, match="text 1 is of type NoneType"):
        HuggingFaceTokenizer(word_pieces(), 8).encode(["a", None])  # type: ignore[list-item]
