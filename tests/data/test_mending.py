"""The cleaning of texts: everything as ftfy and html do it, without asking them where nothing can change."""

from __future__ import annotations

import html
import json
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import ftfy
import pytest
from ftfy import chardata, fixes
from ftfy.badness import is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chiasm.data import mending
from chiasm.data.mending import SIMPLE_BYTES, SIMPLE_TEXT, clean_text, mended, prepare_text, tidy_text

GOLDEN = [t for t, _ in json.loads((Path(__file__).parents[1] / "golden" / "clip_tokens.json").read_text())]
DAMAGED = (
    "\x1b[31mred\x1b[0m", "a\x1cb\x7f", "a&amp;lt;b", "caf&eacute; &NTILDE;", "&#10;x", "&#x1b;[3m", "x <b> &amp; y",
    "&lt;\n&amp;", "<\n&amp;", "AT&T & H&E", "&", "& b", "&1;", "&_x;", "cafÃ©", "â€œqâ€\x9d", "5\nÃ b", "Ã b", "5 Ã b", "œ\nabc",
    "œ", "œ a", "ﬁbrosis", "Ｗｉｄｅ", "‘s", "“q”", "e\u0301", "\ud83e\udec1", "\ud800", "\u2028", "\x85", "\ufeff", "\u206a", "a\r\nb",
    "\x1b\x01[31m", "&nbsp;", "&shy;", "&bogus;", "&ampamp;", "été &eacute", "ΑΒΓ", "漢字", "µm ≥ 3 × 4 ± 2 °C",
)  # fmt: skip
pieces = st.one_of(
    st.sampled_from(DAMAGED),
    st.text(max_size=6),
    st.text(st.characters(max_codepoint=0x24F), max_size=6),
    st.sampled_from([*"ÃÂâ€™œ×√Ð\x1b[]3m\n\r\t &;#<aA1", "&amp;", "&lt;", "&#233;", "\u0301"]),
)


@pytest.fixture
def fresh_tables() -> Iterator[None]:
    mending._known_tables.cache_clear()
    yield
    mending._known_tables.cache_clear()


def as_the_peer(text: str) -> str:
    """open_clip's cleaning up to the lower case: basic_clean and whitespace_clean of its tokenizer."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


@given(st.lists(pieces, max_size=7).map("".join))
@example("\r\n")
@settings(max_examples=500, deadline=None)
def test_tidy_text_is_ftfy_and_html(text: str) -> None:
    assert tidy_text(text) == as_the_peer(text)
    assert prepare_text(text).split() == clean_text(text).split() == as_the_peer(text).lower().split()


@pytest.mark.parametrize("text", DAMAGED, ids=ascii)
def test_every_kind_of_damage(text: str) -> None:
    for around in ("", "a", " ", "\n", "é"):
        for whole in (text + around + text, around + text, text + around, text.upper()):
            assert tidy_text(whole) == as_the_peer(whole), ascii(whole)


def test_damage_is_told_from_what_looks_like_it() -> None:
    """Each shortcut that is nearly right fails here: what it would leave alone is changed."""
    assert tidy_text("a\x1cb") == "ab"  # a control character that `split` takes for white space
    assert tidy_text("a\x7fb") == "ab"
    assert tidy_text("5\nÃ b") == "5 à b"  # bad at the start of a line only
    assert not is_bad("5\nÃ b")
    assert tidy_text("<b> &amp; c") == "<b> & c"  # not by ftfy, which takes it for HTML, but by html.unescape
    assert tidy_text("&amp;amp;amp;amp;lt;") == "<"
    assert tidy_text("e\u0301") == "\u00e9"


def test_no_character_that_a_step_changes_is_overlooked() -> None:
    known = mending._known_tables()
    assert known is not None
    untouched = "".join(c for c in map(chr, range(0x110000)) if known.touched.search(c) is None and c not in "\r")
    for step in (
        fixes.fix_latin_ligatures, fixes.fix_character_width, fixes.uncurl_quotes, fixes.fix_line_breaks,
        fixes.fix_surrogates, fixes.remove_terminal_escapes, fixes.remove_control_chars, fixes.fix_c1_controls,
    ):  # fmt: skip
        assert step(untouched) == untouched, step.__name__
    assert len(untouched) > 1_100_000


def test_simple_texts_are_those_that_nothing_changes() -> None:
    for code in range(128):
        character = chr(code)
        simple = SIMPLE_TEXT.fullmatch(f"a{character}a") is not None
        if simple:
            assert as_the_peer(f"a{character}a").split() == f"a{character}a".split()
        assert simple == (character.encode() in SIMPLE_BYTES), character
    assert SIMPLE_TEXT.fullmatch("H & E, &, &-&")
    assert not SIMPLE_TEXT.fullmatch("H&E")
    assert not SIMPLE_TEXT.fullmatch("&#1")


def test_ftfy_is_not_asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(mending, "_fix_text", lambda text: asked.append(text) or ftfy.fix_text(text))
    for text in (
        "plain", "H&E & co", "a\x00b", "\x1b[1mbold", "épanchement pleural", "5 µm", "Ελληνικά\nкириллица", "漢字", "🫁",
        "caf&eacute; &amp; &lt;", "<p>&amp;",
    ):  # fmt: skip
        assert tidy_text(text) == as_the_peer(text)
    assert asked == []
    for text in ("cafÃ©", "ﬁ", "e\u0301", "\ud800", "&lt;\n", "&#129;"):
        tidy_text(text)
    assert len(asked) == 6


def test_long_lines_go_to_ftfy_which_cuts_them() -> None:
    known = mending._known_tables()
    assert known is not None
    assert known.unharmed("é" * 10)
    assert not known.unharmed("é" * (known.longest + 1))
    assert known.without_entities("&lt;" + "a" * known.longest) is None


@pytest.mark.usefixtures("fresh_tables")
def test_another_ftfy_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = ftfy.TextFixerConfig._fields
    other = namedtuple("other", [*fields, "fix_something_new"], defaults=[*ftfy.TextFixerConfig(), True])
    with monkeypatch.context() as changed:
        changed.setattr(ftfy, "TextFixerConfig", other)
        assert mending._known_tables() is None
    mending._known_tables.cache_clear()
    with monkeypatch.context() as changed:
        changed.delattr(chardata, "LIGATURES")
        assert mending._known_tables() is None
    mending._known_tables.cache_clear()
    with monkeypatch.context() as changed:
        changed.setattr(chardata, "DOUBLE_QUOTE_RE", mending.re.compile(r"``|''"))
        assert mending._known_tables() is None
    mending._known_tables.cache_clear()
    asked: list[str] = []
    monkeypatch.setattr(mending, "_known_tables", lambda: None)
    monkeypatch.setattr(mending, "_fix_text", lambda text: asked.append(text) or ftfy.fix_text(text))
    for text in (*GOLDEN, *DAMAGED):
        assert tidy_text(text) == as_the_peer(text)
    assert set(asked) == {t for t in (*GOLDEN, *DAMAGED) if not SIMPLE_TEXT.fullmatch(t)}


def test_mended_leaves_line_breaks() -> None:
    assert mended("é\na") == "é\na"
    assert mended("a\x00\r\nb").split() == ["a", "b"]
