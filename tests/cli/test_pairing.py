"""``chiasm pairing``: from a table and a corpus to pairs and a page; the same bytes whatever the labels; clear refusals."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.data.phantoms import make_chest_phantoms
from chiasm.errors import InputError
from chiasm.io.pairs import digest_ids, load_pairs, read_pair_header

Run = Callable[..., Any]
FILES = ("pairs.parquet", "texts.npy", "texts.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [s.text or "" for s in make_chest_phantoms(8, seed=9, size_px=32, first_patient=700).samples]
    path = tmp_path_factory.mktemp("corpus") / "reports.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "site", "words"])
        for i, text in enumerate(texts):
            writer.writerow([f"k{i}", "chest wall" if i % 4 else "knee", text])
        writer.writerow(["long", "chest", " ".join(texts)])
    return path


@pytest.fixture(scope="module")
def roles() -> list[str]:
    return ["--report-column", "text=words", "--report-column", "id=key", "--report-column", "tissue=site"]


def test_pairs_and_page(
    chiasm: Run, phantom_table: Path, corpus: Path, roles: list[str], model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    words = ("pairing", "--images", phantom_table, "--reports", corpus, *roles, "--tissue", "chest", "--encoder",
             model_dir, "--out", out, "--top-k", 2, "--audit-label", "effusion", "--text-filter", "re:.")  # fmt: skip
    found = chiasm(*words, "--json")
    assert found["paired"] == found["images"] > 8
    assert found["long_reports"] >= 1
    assert found["corpus"]["filters"][0]["dropped"] >= 2
    assert found["audit"]["column"] == "effusion"
    pairs = load_pairs(out, corpus_digest=found["corpus"]["digest"])
    assert "k0" not in {report for report, _ in pairs.text_keys}
    assert pairs.header.image_digest == digest_ids(pairs.image_ids)
    assert pairs.targets(pairs.image_ids, top_k=2).mask.all()
    page = (out / "index.html").read_text()
    assert page.count("<mark>") == 6
    assert json.loads((out / "pairing.json").read_text())["images"] == found["images"]
    first = [(out / name).read_bytes() for name in FILES]
    said = chiasm(*words, "--examples", 0, "--batch-size", 5)
    assert "images have a report" in said
    assert "audit" in said
    assert "<mark>" not in (out / "index.html").read_text()
    assert [(out / name).read_bytes() for name in FILES] == first, "all vectors came from the cache"
    again = chiasm(*words, "--json", "--correction", "csls", "--aggregate", "mean")
    assert again["found_in_cache"]["image"] == found["images"]
    assert read_pair_header(out).correction == "csls"


def test_labels_do_not_change_a_byte(
    chiasm: Run, phantom_table: Path, corpus: Path, roles: list[str], model_dir: Path, tmp_path: Path
) -> None:
    with phantom_table.open(newline="") as file:
        rows = list(csv.reader(file))
    keep = [rows[0].index(c) for c in ("filepath", "id")]
    head, body = rows[0], rows[1:]
    order = np.random.default_rng(0).permutation(len(body))
    mixed = [
        [cell if i in keep else body[order[r]][i] for i, cell in enumerate(row)] for r, row in enumerate(body)
    ]  # labels, patients, texts and splits of another image
    table = phantom_table.with_name("mixed.csv")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([head, *mixed])
    results = []
    for name, source in (("a", phantom_table), ("b", table)):
        chiasm(
            "pairing", "--images", source, "--reports", corpus, *roles, "--encoder", model_dir, "--out", tmp_path / name,
            "--correction", "inverted_softmax", "--examples", 0,
        )  # fmt: skip
        results.append([(tmp_path / name / f).read_bytes() for f in FILES])
    assert results[0] == results[1]


def test_mistakes_are_named(
    chiasm: Run, phantom_table: Path, corpus: Path, roles: list[str], model_dir: Path, tmp_path: Path
) -> None:
    def said(*more: object) -> str:
        return chiasm(
            "pairing", "--images", phantom_table, "--reports", corpus, "--encoder", model_dir, "--out", tmp_path / "o",
            *more, code=1,
        )  # fmt: skip

    assert "must be a cosine or `auto`" in said("--min-similarity", "high")
    assert "between -1 and 1" in said(*roles, "--min-similarity", "7")
    assert "too few" in said(*roles, "--min-similarity", "auto")
    assert "--correction must be one of" in said("--correction", "CSLS")
    assert "--aggregate must be one of" in said("--aggregate", "median")
    assert "no label column `grade`" in said("--audit-label", "grade")
    assert "ROLE=NAME" in said("--report-column", "words")
    assert "named twice" in said(*roles, "--report-column", "id=words")
    assert "no row has split `holdout`" in said("--split", "holdout")
    answer = said(*roles, "--tissue", "brain")
    assert "tissue" in answer
    assert "site" in said(*roles, "--where", "site==hip")
    assert "leaves none of" in said(*roles, "--text-drop", "re:.")
    assert not (tmp_path / "o" / "pairs.parquet").exists()


def test_no_ids_and_no_texts_in_what_is_said(
    chiasm: Run, phantom_table: Path, corpus: Path, roles: list[str], model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(phantom_table.parent, tmp_path / "data")  # other tests take images of the shared folder
    table = tmp_path / "data" / "one_bad.csv"
    with phantom_table.open(newline="") as file:
        rows = list(csv.reader(file))
    bad = table.parent / "images" / "canary-patient.png"
    bad.write_bytes(b"no image")
    rows[1][rows[0].index("filepath")] = "images/canary-patient.png"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    words = ("pairing", "--images", table, "--reports", corpus, *roles, "--encoder", model_dir, "--out",
             tmp_path / "pairs")  # fmt: skip
    for answer in (chiasm(*words), json.dumps(chiasm(*words, "--json"))):
        assert "rejected" in answer
        for secret in ("canary", rows[2][rows[0].index("id")], "k1"):
            assert secret not in answer
    assert "canary" not in (tmp_path / "pairs" / "pairing.json").read_text()
    listed = (tmp_path / "pairs" / "rejected.jsonl").read_text().splitlines()
    assert len(listed) == 1


def test_reports_that_cannot_be_used_are_said(
    chiasm: Run, phantom_table: Path, model_dir: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "reports.jsonl"
    corpus.write_text('{"id": "canary", "text": "No effusion."}\n{"id": "canary-2", "text": " "}\n{broken canary\n')
    words = ("pairing", "--images", phantom_table, "--reports", corpus, "--encoder", model_dir, "--out", tmp_path / "o")
    said = chiasm(*words, "--examples", 0)
    assert "reports: 2 rows rejected" in said
    assert "nan" not in said
    assert "canary" not in said
    assert "not usable: text is empty" in (tmp_path / "o" / "index.html").read_text()
    assert len((tmp_path / "o" / "rejected_reports.jsonl").read_text().splitlines()) == 2
    corpus.write_text('{"id": "a", "text": "No effusion."}\n')
    assert "rejected" not in chiasm(*words, "--examples", 0)
    assert not (tmp_path / "o" / "rejected_reports.jsonl").read_text()
    assert "is a file" in chiasm(*words[:-1], corpus, code=1)


def test_pairs_of_another_corpus_are_refused(
    chiasm: Run, phantom_table: Path, corpus: Path, roles: list[str], model_dir: Path, tmp_path: Path
) -> None:
    chiasm("pairing", "--images", phantom_table, "--reports", corpus, *roles, "--encoder", model_dir, "--out", tmp_path)
    with pytest.raises(InputError, match="another corpus than `reports"):
        load_pairs(tmp_path, corpus_digest="0" * 16)


class Interrupts:
    """Progress that presses Ctrl-C at the third batch."""

    def __init__(self) -> None:
        self.left = 3

    def start(self, total: int | None, description: str) -> None: ...

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.left -= n > 0
        if self.left == 0:
            raise KeyboardInterrupt

    def finish(self) -> None: ...


def test_ctrl_c_says_how_to_go_on(
    chiasm: Run, phantom_table: Path, corpus: Path, roles: list[str], model_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ("pairing", "--images", phantom_table, "--reports", corpus, *roles, "--encoder", model_dir, "--out",
             tmp_path / "pairs", "--batch-size", 2)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("chiasm.cli.pairing.make_progress", lambda *a, **k: Interrupts())
        said = chiasm(*words, code=130)
    assert "interrupted; the same command goes on from the vectors that are kept" in said
    assert chiasm(*words, "--json")["paired"] > 8
