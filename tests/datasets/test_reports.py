"""Corpora of reports: every layout, filters that count, rows that are named and texts that are not."""

from __future__ import annotations

import csv
import json
import os
import re
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.datasets.reports import FilterCount, Report, ReportCorpus, read_reports
from chiasm.errors import FileFormatError, InputError, UnknownName

DATA = os.environ.get("CHIASM_DATA")
ROWS = [
    {"id": "a", "report": "Colon: adenocarcinoma, grade 1, pT1c N0.", "tissue": "Colon, NOS", "patient": "p1"},
    {"id": "b", "report": "Stomach: papillary adenocarcinoma.", "tissue": "Stomach", "patient": "p1"},
    {"id": "c", "report": "Stomach: papillary  adenocarcinoma.\n", "tissue": "Stomach", "patient": "p2"},
    {"id": "d", "report": "Near the colon, a lymph node.", "tissue": "", "patient": "p3"},
]


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_csv(path, rows, "\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reports.csv", ROWS)


def test_every_kind_of_table_gives_the_same_corpus(tmp_path: Path) -> None:
    corpora = [write_table(tmp_path / f"r.{e}", ROWS) for e in ("csv", "tsv", "jsonl", "json", "parquet")]
    read = [read_reports(p) for p in corpora]
    assert len({c.digest for c in read}) == 1
    for corpus in read:
        assert corpus[0] == Report("a", "Colon: adenocarcinoma, grade 1, pT1c N0.", "Colon, NOS", "p1")
        assert corpus.ids == ("a", "b", "c", "d")
        assert corpus[3].tissue is None
        assert corpus.filters == ()
        assert corpus.columns is not None
        assert (corpus.columns.text, corpus.columns.labels) == ("report", ("tissue",))


def test_equal_texts_stay_and_are_counted(table: Path) -> None:
    corpus = read_reports(table)
    assert len(corpus) == 4
    assert corpus[1].text == corpus[2].text
    assert corpus.duplicates == 1
    assert corpus.first_rows == (0, 1, 1, 3)
    assert "4 reports of `reports.csv` (1 repeat" in corpus.summary()


def test_a_text_file_has_one_report_a_line(tmp_path: Path) -> None:
    path = tmp_path / "text_colo.txt"
    path.write_bytes("\ufeffone report\x0cwith a page\u2028and a line\r\n\r\n  third \x00report ".encode())
    corpus = read_reports(path)
    assert corpus.ids == ("line-1", "line-3")
    assert corpus.texts == ("one report with a page and a line", "third report")
    assert [(r.row, r.id, r.reason) for r in corpus.rejected] == [(2, "line-2", "text is empty")]
    path.write_bytes(b"old\rmac\r")
    assert read_reports(path).texts == ("old", "mac")


def test_a_folder_of_texts_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in {"b.txt": "second\nline", "a/z.txt": "first", "c.TXT": "third", ".hidden.txt": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "d.txt").write_bytes(b"bin\0ary")
    (tmp_path / "e.txt").write_text(" \n")
    corpus = read_reports(tmp_path)
    assert [(r.id, r.text) for r in corpus] == [("a/z.txt", "first"), ("b.txt", "second line"), ("c.TXT", "third")]
    assert [(r.id, r.reason) for r in corpus.rejected] == [
        ("d.txt", "file is not text, or in another encoding"),
        ("e.txt", "text is empty"),
    ]
    write_csv(tmp_path / "clinical.csv", ROWS)
    with pytest.raises(InputError, match=r"holds the table `clinical.csv` and 5 text files"):
        read_reports(tmp_path)


def test_a_folder_with_a_table_is_that_table(tmp_path: Path, table: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("terms")
    assert read_reports(tmp_path).digest == read_reports(table).digest


def test_tissue_filters_its_column_and_says_so(table: Path) -> None:
    corpus = read_reports(table, tissue="COLO")
    assert corpus.ids == ("a",)
    assert corpus.filters == (FilterCount("tissue contains `COLO` (column `tissue`)", 1, 3),)
    assert read_reports(table, tissue="=stomach").ids == ("b", "c")
    assert read_reports(table, tissue="re:^(colon|stom)").ids == ("a", "b", "c")


def test_tissue_filters_the_text_where_there_is_no_column(table: Path) -> None:
    corpus = read_reports(table, tissue="colon", tissue_column="")
    assert corpus.ids == ("a", "d")
    assert corpus.filters[0].what == "tissue contains `colon` (in the text: there is no tissue column)"
    assert corpus[0].tissue is None


def test_filters_follow_each_other_with_counts(table: Path) -> None:
    corpus = read_reports(
        table, tissue="o", where=["patient==p1"], keep=["adeno", "re:\\bgrade [0-9]"], drop=["papillary"], min_words=5
    )
    assert [(f.kept, f.dropped) for f in corpus.filters] == [(3, 1), (2, 1), (2, 0), (1, 1), (1, 0), (1, 0)]
    assert corpus.ids == ("a",)
    assert "not: text contains `papillary`: 1 kept, 0 dropped" in corpus.summary()
    assert corpus.to_dict()["filters"][1] == {"what": "column `patient` is `p1`", "kept": 2, "dropped": 1}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tissue": "brain"}, "tissue contains `brain`"),
        ({"where": ["patient=p9"]}, "column `patient` contains `p9`"),
        ({"keep": ["adeno", "glioma"]}, "text contains `glioma` leaves none of 3"),
        ({"drop": ["e"]}, "not: text contains `e`"),
        ({"min_words": 99}, "at least 99 words"),
    ],
)
def test_an_empty_result_names_the_filter(table: Path, options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        read_reports(table, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": "txt"}, UnknownName, "unknown column `txt`"),
        ({"where": ["stage=I"]}, UnknownName, "unknown column `stage`"),
        ({"where": ["stage"]}, InputError, "no condition"),
        ({"tissue": ""}, InputError, "pattern is empty"),
        ({"keep": ["re:("]}, InputError, "no regular expression"),
        ({"keep": "colon"}, InputError, "list of patterns"),
        ({"id": "patient"}, InputError, "not unique: 0 blank, 1 repeated"),
        ({"text": "id", "tissue_column": "organ"}, UnknownName, "unknown column `organ`"),
        ({"encoding": "utf-99"}, InputError, "unknown encoding"),
    ],
)
def test_wrong_options_are_named(table: Path, options: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        read_reports(table, **options)  # type: ignore[arg-type]


def test_ids_are_found_or_made(tmp_path: Path) -> None:
    rows = [{k: v for k, v in r.items() if k != "id"} for r in ROWS]
    assert read_reports(write_csv(tmp_path / "a.csv", rows)).ids == ("row-1", "row-2", "row-3", "row-4")
    own = [r | {"Patient_Filename": f"f{i}"} for i, r in enumerate(rows)]
    assert read_reports(write_csv(tmp_path / "b.csv", own)).ids == ("f0", "f1", "f2", "f3")
    unique = [r | {"patient": f"p{i}"} for i, r in enumerate(rows)]
    assert read_reports(write_csv(tmp_path / "c.csv", unique)).ids == ("p0", "p1", "p2", "p3")
    assert read_reports(tmp_path / "c.csv", id="").ids == ("row-1", "row-2", "row-3", "row-4")


def test_sections_are_joined_and_lists_too(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(
        '{"findings": "No edema.", "impression": "Normal."}\n{"findings": "", "impression": ["Mass.", "Effusion."]}\n'
    )
    assert read_reports(path).texts == ("No edema. Normal.", "Mass. Effusion.")
    assert read_reports(path, text=["impression"]).texts == ("Normal.", "Mass. Effusion.")


def test_bad_rows_are_listed_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(
        '{"id": 1, "text": "fine"}\n["text"]\n{"id": 2, "text": null}\nnot json\n{"id": "\\ud800", "text": "x"}\n'
        '{"id": 5, "text": "______"}\n' + json.dumps({"id": 6, "text": "y" * 1_000_001}) + "\n"
    )
    corpus = read_reports(path)
    assert corpus.ids == ("1",)
    assert [(r.row, r.reason) for r in corpus.rejected] == [
        (2, "row is not a JSON object"),
        (3, "text is empty"),
        (4, "row is not a JSON object"),
        (5, "id holds a character that no file can hold"),
        (6, "text is empty"),
        (7, "text is longer than 1,000,000 characters"),
    ]
    assert corpus.to_dict()["rejected"]["text is empty"] == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings_are_detected(tmp_path: Path, encoding: str) -> None:
    line = "Lésion naïve, 5 µm"
    (tmp_path / "r.txt").write_bytes(f"{line}\r\n{line}\r\n".encode(encoding))
    assert read_reports(tmp_path / "r.txt").texts == (line, line)
    (tmp_path / "r.csv").write_bytes(f'id,text\r\n1,"{line}"\r\n'.encode(encoding))
    assert read_reports(tmp_path / "r.csv").texts == (line,)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("r.txt", b"", InputError, "empty"),
        ("r.csv", b"", InputError, "empty"),
        ("r.txt", b"\n\n", InputError, "no usable report: 2 rows rejected: 2 text is empty"),
        ("r.csv", b"id,text\n1,\n", InputError, "no usable report: 1 row rejected: 1 text is empty"),
        ("r.csv", b"id,text\n", InputError, "no usable report"),
        ("r.csv", b"id,age\n1,SECRET\n", InputError, "no column of reports"),
        ("r.csv", b"S-1,SECRET with a carcinoma of the breast of grade 2\nS-2,none\n", InputError, "lack a header"),
        ("r.csv", b"SECRET,1953-02-03,female\nother,1960-01-01,male\n", InputError, "lack a header"),
        ("r.txt", "SECRET".encode("utf-16-le"), FileFormatError, "binary file"),
        ("r.csv", b"id,text\n1," + b"S" * 200_000, FileFormatError, "not a table near line 2"),
        ("r.jsonl", b'{"text": \xff"SECRET"}\n', InputError, "no usable report"),
        ("r.json", b'{"text": "SECRET"}', FileFormatError, "must hold a list"),
        ("r.parquet", b"PAR1 SECRET", FileFormatError, "Parquet"),
        ("r.csv.zip", b"PK", InputError, "packed"),
    ],
)
def test_hostile_files_end_in_named_errors(
    tmp_path: Path, name: str, content: bytes, error: type, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        read_reports(path)
    assert "SECRET" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_first_row_that_may_be_a_patient_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("SECRET,1953-02-03,a long report of no particular interest to anybody at all\nx,y,z\n")
    with pytest.raises(UnknownName, match="lack a header") as caught:
        read_reports(path, text="SECRE")
    assert "SECRET" not in str(caught.value)
    path.write_text("key,stain_2,words\nx,y,z\n")
    with pytest.raises(
        UnknownName, match=r"did you mean `words`\?\nhint: `r.csv` has the columns `key`, `stain_2`, `words`"
    ):
        read_reports(path, text="word")
    with pytest.raises(InputError, match=r"--report-column text=NAME.*pairing\.columns\.text"):
        read_reports(path)


def test_absent_empty_and_wrong_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`none\.txt` do not exist"):
        read_reports(tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"neither a table nor"):
        read_reports(tmp_path)
    (tmp_path / "r.txt").write_text("one\n")
    with pytest.raises(InputError, match="has no columns; `where` is not for it"):
        read_reports(tmp_path / "r.txt", where=["a=b"])
    pq.write_table(pa.table({"text": [b"bytes"]}), tmp_path / "r.parquet")
    with pytest.raises(InputError, match="holds bytes"):
        read_reports(tmp_path / "r.parquet")


def test_the_digest_knows_ids_texts_and_order_and_not_the_file(tmp_path: Path) -> None:
    one = ReportCorpus.from_texts(["a b", "c"])
    assert one.digest == ReportCorpus.from_texts([" a  b\n", "c"], name="other", tissues=["x", None]).digest
    others = (["c", "a b"], ["a b"], ["a b", "C"], ["a", "b c"])
    digests = [one.digest, *(ReportCorpus.from_texts(t).digest for t in others)]
    digests.append(ReportCorpus.from_texts(["a b", "c"], ids=["x", "y"]).digest)
    assert len(set(digests)) == len(digests)
    (tmp_path / "r.txt").write_text("a b\nc\n")
    ids = ["line-1", "line-2"]
    assert read_reports(tmp_path / "r.txt").digest == ReportCorpus.from_texts(["a b", "c"], ids=ids).digest


def test_texts_from_memory_are_checked() -> None:
    corpus = ReportCorpus.from_texts(["x ______ y"], ids=["7"], patients=["p"])
    assert corpus.reports == (Report("7", "x y", None, "p"),)
    for texts, options, message in (
        ([], {}, "no report"),
        (["a", " "], {}, "1 of 2 texts are empty"),
        (["a", "b"], {"ids": ["x"]}, "ids has 1 entries for 2"),
        (["a", "b"], {"ids": ["x", "x"]}, "not unique"),
    ):
        with pytest.raises(InputError, match=message):
            ReportCorpus.from_texts(texts, **options)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["colon", "lung", "colon and lung"])), min_size=1))
def test_filters_keep_what_fits_in_order(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("corpus") / "r.csv"
    write_csv(path, [{"id": str(i), "source": s, "text": t} for i, (s, t) in enumerate(rows)])
    expected = [str(i) for i, (s, t) in enumerate(rows) if s == "a" and "colon" in t]
    if not expected:
        with pytest.raises(InputError, match="the filter"):
            read_reports(path, where=["source==a"], keep=["Colon"])
        return
    corpus = read_reports(path, where=["source==a"], keep=["Colon"])
    assert list(corpus.ids) == expected
    assert corpus.filters[0].kept + corpus.filters[0].dropped == len(rows)
    assert corpus.filters[1].kept + corpus.filters[1].dropped == corpus.filters[0].kept
    assert corpus.filters[1].kept == len(corpus)


def test_the_page_on_corpora_keeps_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "report-corpora.md").read_text(encoding="utf-8")
    block = page.split("leaves nothing is an error that names it.")[1].split("## Cleaning")[0]
    write_csv(tmp_path / "reports.csv", ROWS)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(block), {})
    assert capsys.readouterr().out.startswith("1 reports of `reports.csv`")


def real(name: str) -> Path:
    if not DATA or not (Path(DATA) / name / "metadata.jsonl").is_file():
        pytest.skip("CHIASM_DATA does not name the folder of the real data")
    return Path(DATA) / name / "metadata.jsonl"


def test_real_pathology_reports() -> None:
    corpus = read_reports(real("pathology_text"), where=["source==tcga_colorectal"])
    assert (len(corpus), corpus.duplicates, corpus.filters[0].dropped) == (376, 1, 991)
    raw = [json.loads(line) for line in real("pathology_text").read_text().splitlines()]
    for row, report in zip(raw, corpus, strict=False):
        kept = re.sub(r"[I1|]{5,}", "", row["text"])
        rest = iter(report.text)
        assert all(c in rest for c in kept if c.isascii() and c.isalnum())
        assert re.search(r"(?<![\d.,])[I1|]{5,}(?![\d.,])|[-_=]{5,}", report.text) is None


def test_real_chest_reports() -> None:
    corpus = read_reports(real("openi_reports"))
    assert corpus.columns is not None
    assert (corpus.columns.text, corpus.columns.id) == (("findings", "impression"), "uid")
    assert len(corpus) + len(corpus.rejected) == 3955
    assert corpus.duplicates > 500
