from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.data.tokenizers import ClipTokenizer
from chiasm.errors import ConfigError
from chiasm.train.recipe import DataConfig
from chiasm.train.texts import MAX_VARIANTS, TokenTable, render_texts, sentence_views
from chiasm.types import Sample


def sample(i, text=None, **labels):
    return Sample(str(i), text=text, labels=labels)


def config(**kw):
    return DataConfig(source="x.csv", **kw)


def test_own_texts_share_a_key_when_their_words_are_the_same():
    a, b, c, d = render_texts(
        [sample(0, "A  left effusion"), sample(1, "a Left\neffusion "), sample(2, "x"), sample(3)], config()
    )
    assert a.variants == ("A  left effusion",)
    assert a.key == b.key != c.key
    assert d is None


def test_templates_are_filled_in_every_way():
    data = config(
        texts=("a {stain} patch of {tissue}", "{tissue}, {stain}"),
        words={"tissue": {"1": ("tumour", "carcinoma"), "0": ("stroma",)}},
    )
    rows = [
        sample(0, tissue=1, stain="H&E"),
        sample(1, tissue=1.0, stain="H&E"),
        sample(2, tissue=0, stain="H&E"),
        sample(3, tissue=None, stain="H&E"),
    ]
    one, same, other, blank = render_texts(rows, data)
    assert one.variants == (
        "a H&E patch of tumour", "a H&E patch of carcinoma", "tumour, H&E", "carcinoma, H&E",
    )  # fmt: skip
    assert one == same
    assert one.key != other.key
    assert blank is None


def test_a_template_with_a_blank_gives_way_to_the_others():
    data = config(texts=("{text}", "{plane}: {text}"))
    with_plane, without = render_texts([sample(0, "a mass", plane="axial"), sample(1, "a mass", plane=None)], data)
    assert with_plane.variants == ("a mass", "axial: a mass")
    assert without.variants == ("a mass",)
    assert with_plane.key != without.key


def test_too_many_ways_are_thinned_evenly():
    words = {"a": {"1": tuple(f"x{i}" for i in range(30))}, "b": {"1": tuple(f"y{i}" for i in range(30))}}
    (row,) = render_texts([sample(0, a=1, b=1)], config(texts=("{a} {b}",), words=words))
    assert len(row.variants) == len(set(row.variants)) == MAX_VARIANTS
    assert row.variants[0] == "x0 y0"
    assert row.variants[-1] == "x29 y29"


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"texts": ("a {tisue}",)}, r"`data.texts\[0\]`: unknown hole .*did you mean `tissue`"),
        ({"texts": ("{tissue",)}, r"`data.texts\[0\]`: text template is malformed"),
        ({"texts": ("{tissue.__class__}",)}, "unknown hole"),
        ({"texts": ("{tissue!r}",)}, "no plain hole"),
        ({"texts": ("{tissue}",), "words": {"stain": {"1": ("x",)}}}, "`data.words.stain` is used by no template"),
    ],
)
def test_broken_templates_name_the_field(kw, message):
    with pytest.raises(ConfigError, match=message):
        render_texts([sample(0, tissue=1)], config(**kw))


def test_token_table_draws_variants_and_is_steady_without_a_generator():
    table = TokenTable([["a lung", "lungs"], ["a heart"], ["a lung", "lungs"]], ClipTokenizer(8))
    assert (len(table), len(table.texts), table.truncated) == (3, 3, 0)
    rows = np.array([0, 1, 2])
    assert table.choose(rows, None).tolist() == [0, 2, 0]
    drawn = np.stack([table.choose(rows, np.random.default_rng(s)) for s in range(40)])
    assert set(drawn[:, 0]) == {0, 1}
    assert set(drawn[:, 1]) == {2}
    again = np.stack([table.choose(rows, np.random.default_rng(s)) for s in range(40)])
    assert np.array_equal(drawn, again)
    tokens = table.tokens(np.array([2, 0]))
    expected = ClipTokenizer(8).encode(["a heart", "a lung"])
    assert tokens.ids.tolist() == expected.ids.tolist()
    assert tokens.lengths.tolist() == expected.lengths.tolist()


def test_cut_texts_are_counted():
    assert TokenTable([["word " * 50], ["short"]], ClipTokenizer(8)).truncated == 1


REPORT = "The heart is large. No effusion!  Is there a mass? Lungs are clear."


@settings(deadline=None)
@given(count=st.integers(0, 12), seed=st.integers(0, 50))
def test_parts_of_reports_hold_whole_sentences_once(count, seed):
    sentences = {"The heart is large.", "No effusion!", "Is there a mass?", "Lungs are clear."}
    views = sentence_views(REPORT, count, seed=seed)
    assert len(views) == len(set(views)) <= count
    assert views == sentence_views(REPORT, count, seed=seed)
    for view in views:
        parts = re.split(r"(?<=[.!?])\s+", view)
        assert len(set(parts)) == len(parts) >= 1
        assert set(parts) <= sentences


def test_one_sentence_has_no_parts():
    assert sentence_views("A single sentence without end", 5, seed=0) == ()
    assert sentence_views("", 5, seed=0) == ()
    assert len({v for s in range(30) for v in sentence_views(REPORT, 3, seed=s)}) > 20
