from __future__ import annotations

import pytest

from chiasm.data.report_text import report_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. No focal consolidation.\n2. Heart size is normal.", "no focal consolidation heart size is normal"),
        ("Stable. Mild, patchy EDEMA!", "mild patchy edema"),  # one-word sentences are dropped
        ("Edema.", "edema"),  # where nothing else is left, they are kept
        ("  severe acute  edema ", "severe acute edema"),
        ("Größe 3.5 cm ist unverändert", "5 cm ist unverndert"),
        ("left-sided\npneumothorax", "left sided pneumothorax"),
        ("", ""),
        ("...", ""),
    ],
)
def test_a_report_becomes_plain_words(text: str, expected: str) -> None:
    assert report_words(text) == expected
