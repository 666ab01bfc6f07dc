"""``chiasm retrieval``: directions, labels, probes and the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.mark.filterwarnings("ignore::chiasm.data.tokens.TruncationWarning")
def test_directions_probes_and_the_page(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    page = tmp_path / "search.html"
    words = ("retrieval", "--table", phantom_table, "--model", model_dir)
    record = chiasm(
        *words, "--relevant-by", "effusion", "--direction", "image-image", "--probes", "--out", page, "--json"
    )
    assert set(record) >= {"image_to_image", "keys", "probes", "run_card", "rejected"}
    assert record["image_to_image"]["exclude"] == "patient"
    assert record["keys"] == ["effusion"]
    assert 0 <= record["probes"]["negation"]["wins"]["value"] <= 1
    html = page.read_text()
    assert "Does it read" in html
    assert "<image " not in html
    text = chiasm(*words, "--direction", "text-image", "--direction", "image_to_text", "--out", page, "--examples", 1)
    assert "text → image mAP@R" in text
    assert "patient data" in page.read_text()


def test_a_store_is_measured_without_its_model(
    chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    chiasm("embed", phantom_table, "--out", store, "--model", model_dir, "--modality", "image", "--json")
    record = chiasm("retrieval", "--store", store, "--relevant-by", "effusion,oedema", "--json")
    assert record["graded"]
    assert "text_to_image" not in record, "the store has no texts"
    assert "no texts" in chiasm("retrieval", "--store", store, code=1)
    assert "unknown direction `up_to_down`" in chiasm("retrieval", "--store", store, "--direction", "up-down", code=1)
    assert "unknown label column" in chiasm("retrieval", "--store", store, "--relevant-by", "efusion", code=1)
