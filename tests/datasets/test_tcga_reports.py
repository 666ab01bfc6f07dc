"""TCGA's reports in the two layouts in which users obtain them, on tiny trees with invented texts."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chiasm.datasets.reports import FilterCount, read_reports
from chiasm.datasets.tcga_reports import ORGANS, read_tcga_reports
from chiasm.errors import FileFormatError, InputError

REPORTS = [
    ("TCGA-AA-0001.1111AAAA-0000-0000-0000-000000000001", "Right hemicolectomy, adenocarcinoma, grade 1, pT1c N0."),
    ("TCGA-BB-0002.2222AAAA-0000-0000-0000-000000000002", "Breast, left: invasive ductal carcinoma."),
    ("TCGA-BB-0002.3333AAAA-0000-0000-0000-000000000003", ""),
    ("TCGA-CC-0003.4444AAAA-0000-0000-0000-000000000004", "Rectum: adenocarcinoma, breast metastasis excluded."),
]
CANCERS = [("TCGA-AA-0001", "COAD"), ("TCGA-BB-0002", "BRCA"), ("TCGA-CC-0003", "READ")]
CLINICAL = {
    "case_submitter_id": ["TCGA-AA-0001", "TCGA-AA-0001", "TCGA-BB-0002", "TCGA-DD-0004", "TCGA-EE-0005"],
    "tissue_or_organ_of_origin": ["Ascending colon", "Breast, NOS", "Breast, NOS", "'--", None],
    "embedding": [b"1", b"2", b"3", b"4", b"5"],
}
PAGES = {
    "PatientID": ["TCGA-AA-0001", "TCGA-BB-0002", "TCGA-BB-0002", "TCGA-DD-0004"],
    "report_text": [
        ["Page one:\ncolon.", "Page two: adenocarcinoma."],
        ["Ductal carcinoma ______ of the breast."],
        ["Second report."],
        [],
    ],
    "embedding": [b"1", b"2", b"3", b"4"],
}


def write_csv(path: Path, header: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([header, *rows])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_csv(tmp_path / "TCGA_Reports.csv", ("patient_filename", "text"), REPORTS)
    return tmp_path


@pytest.fixture
def metadata(table: Path) -> Path:
    path = table / "data" / "tcga_metadata" / "tcga_patient_to_cancer_type.csv"
    write_csv(path, ("patient_id", "cancer_type"), CANCERS)
    return table


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Two encoders' splits of each configuration; that of reports in two parts."""
    for split in ("bert", "gatortron"):
        marked = {**PAGES, "report_text": [[f"{split} text"]] * 4} if split == "bert" else PAGES
        for i in (0, 1):
            part = {k: v[2 * i : 2 * i + 2] for k, v in marked.items()}
            path = tmp_path / "pathology_report" / f"{split}-0000{i}-of-00002.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table(part), path)
        (tmp_path / "clinical").mkdir(exist_ok=True)
        pq.write_table(pa.table(CLINICAL), tmp_path / "clinical" / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_the_table_of_tcga_reports(table: Path) -> None:
    for source in (table, table / "TCGA_Reports.csv"):
        corpus = read_tcga_reports(source)
        assert corpus.ids == tuple(REPORTS[i][0] for i in (0, 1, 3))
        assert [r.patient for r in corpus] == ["TCGA-AA-0001", "TCGA-BB-0002", "TCGA-CC-0003"]
        assert [r.tissue for r in corpus] == [None] * 3
        assert corpus[0].text == REPORTS[0][1]
        assert [(r.row, r.reason) for r in corpus.rejected] == [(3, "text is empty")]
    assert read_reports(table / "TCGA_Reports.csv").digest == corpus.digest


def test_cancer_types_say_the_tissue(metadata: Path) -> None:
    corpus = read_tcga_reports(metadata, tissue="breast")
    assert [r.tissue for r in corpus] == ["breast (BRCA)"]
    assert corpus.filters == (FilterCount("tissue contains `breast` (column `cancer_type`)", 1, 2),)
    assert len(read_tcga_reports(metadata, tissue="re:colon|rectum")) == 2
    assert len(read_tcga_reports(metadata, tissue="coad", keep=["grade 1"])) == 1


def test_every_code_of_tcga_has_an_organ() -> None:
    assert len(ORGANS) == 33


def test_the_hub_layout_joins_patients_and_keeps_all_pages(hub: Path) -> None:
    corpus = read_tcga_reports(hub)
    assert corpus.ids == ("TCGA-AA-0001", "TCGA-BB-0002", "TCGA-BB-0002#2")
    assert corpus.texts == (
        "Page one: colon. Page two: adenocarcinoma.",
        "Ductal carcinoma of the breast.",
        "Second report.",
    )
    assert [r.tissue for r in corpus] == ["Ascending colon; Breast, NOS", "Breast, NOS", "Breast, NOS"]
    assert [(r.row, r.id, r.reason) for r in corpus.rejected] == [(4, "TCGA-DD-0004", "text is empty")]


def test_the_tissue_is_as_loose_as_in_the_reference(hub: Path) -> None:
    """``colo`` finds every patient with one such row; ``breast`` finds the same patient again."""
    assert read_tcga_reports(hub, tissue="COLO").ids == ("TCGA-AA-0001",)
    breast = read_tcga_reports(hub, tissue="breast")
    assert breast.ids == ("TCGA-AA-0001", "TCGA-BB-0002", "TCGA-BB-0002#2")
    assert breast.filters[0].what == "tissue contains `breast` (column `tissue_or_organ_of_origin`)"


def test_the_reference_would_lose_pages_and_shift_rows(hub: Path) -> None:
    """It writes the first item of each list, with the line ends inside it, one report a line."""
    first = [pages[0] for pages in PAGES["report_text"] if pages]
    written = hub / "text_colo.txt"
    written.write_text("\n".join(first))
    shifted = read_reports(written)
    assert len(shifted) == 4
    assert not any("Page two" in t for t in shifted.texts)
    written.unlink()
    assert len(read_tcga_reports(hub)) == 3


def test_a_clinical_table_of_gdc_serves_both(table: Path) -> None:
    rows = list(zip(CLINICAL["case_submitter_id"], map(str, CLINICAL["tissue_or_organ_of_origin"]), strict=True))
    write_csv(table / "clinical.tsv", ("case_submitter_id", "tissue_or_organ_of_origin"), rows)  # type: ignore[arg-type]
    assert [r.patient for r in read_tcga_reports(table, tissue="breast")] == ["TCGA-AA-0001", "TCGA-BB-0002"]


def test_what_is_missing_is_named_with_its_source(tmp_path: Path, table: Path) -> None:
    with pytest.raises(InputError, match="no table that says the tissue") as caught:
        read_tcga_reports(table, tissue="breast")
    assert "tcga_patient_to_cancer_type.csv" in str(caught.value)
    with pytest.raises(InputError, match="does not exist") as caught:
        read_tcga_reports(tmp_path / "absent")
    assert "github.com/tatonetti-lab/tcga-path-reports" in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no table of reports") as caught:
        read_tcga_reports(empty)
    assert "CC-BY-NC-ND-4.0" in str(caught.value)
    (empty / "TCGA_Reports.csv.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="is packed"):
        read_tcga_reports(empty)
    with pytest.raises(InputError, match="is no table"):
        read_tcga_reports(empty / "TCGA_Reports.csv.zip")


def test_a_missing_clinical_configuration_is_named(hub: Path) -> None:
    for path in (hub / "clinical").iterdir():
        path.unlink()
    assert len(read_tcga_reports(hub)) == 3
    with pytest.raises(InputError, match="no table that says the tissue") as caught:
        read_tcga_reports(hub, tissue="breast")
    assert "add `clinical` of https://huggingface.co/datasets/Lab-Rasool/TCGA" in str(caught.value)


def test_two_kinds_and_damaged_files_are_errors(hub: Path) -> None:
    (hub / "clinical" / "broken.parquet").write_bytes(b"PAR1 SECRET")
    with pytest.raises(FileFormatError, match=r"`broken\.parquet` is not a readable Parquet file") as caught:
        read_tcga_reports(hub)
    assert "SECRET" not in str(caught.value)
    (hub / "clinical" / "broken.parquet").unlink()
    write_csv(hub / "TCGA_Reports.csv", ("patient_filename", "text"), REPORTS)
    with pytest.raises(InputError, match="of TCGA-Reports and of Lab-Rasool"):
        read_tcga_reports(hub)
    (hub / "TCGA_Reports.csv").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"`TCGA_Reports\.csv` is empty"):
        read_tcga_reports(hub)


def test_an_empty_tissue_names_the_filter(metadata: Path) -> None:
    with pytest.raises(InputError, match=r"tissue contains `tonsil` \(column `cancer_type`\) leaves none of 3"):
        read_tcga_reports(metadata, tissue="tonsil")
