"""``tcga:FOLDER`` beside files and folders of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.datasets.report_sources import open_reports
from chiasm.datasets.reports import read_reports
from chiasm.errors import InputError


def test_a_name_and_a_file_reach_their_readers(tmp_path: Path) -> None:
    (tmp_path / "TCGA_Reports.csv").write_text(
        "patient_filename,text\nTCGA-AA-0001.ONE,Ductal carcinoma of the breast\nTCGA-AA-0002.TWO,Colon resection\n"
    )
    (tmp_path / "tcga_patient_to_cancer_type.csv").write_text(
        "patient_id,cancer_type\nTCGA-AA-0001,BRCA\nTCGA-AA-0002,COAD\n"
    )
    breast = open_reports(f"tcga:{tmp_path}", tissue="breast")
    assert [r.patient for r in breast.reports] == ["TCGA-AA-0001"]
    plain = tmp_path / "reports.txt"
    plain.write_text("a report of one\na report of two\n")
    assert open_reports(plain, keep=("two",)) == read_reports(plain, keep=("two",))
    with pytest.raises(InputError, match="`where` has no meaning for TCGA"):
        open_reports(f"TCGA:{tmp_path}", where=("a=b",))
    with pytest.raises(InputError, match="does not exist"):
        open_reports("tcga:nowhere")
