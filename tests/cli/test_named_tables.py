"""``NAME:ROOT`` of a public data set where commands take a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiasm.cli.inputs import open_table, read_images
from chiasm.datasets.miniature import make_miniature

Run = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("default::chiasm.evaluate.scores.InvertedScoreWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_miniature("pcam", tmp_path_factory.mktemp("pcam"), per_class=5, size_px=8)


def test_embed_and_zero_shot_read_a_data_set_by_name(chiasm: Run, model_dir: Path, root: Path, tmp_path: Path) -> None:
    done = chiasm(
        "embed", f"pcam:{root}", "--out", tmp_path / "s", "--modality", "image", "--model", model_dir, "--json"
    )
    assert done["added"] == {"image": 30}
    scores = chiasm(
        "zero-shot", "--table", f"pcam:{root}", "--split", "test", "--truth", "label", "--labels", "normal, tumor",
        "--model", model_dir, "--json",
    )  # fmt: skip
    assert scores["data"] == "pcam"
    assert [i["id"] for i in scores["images"]] == [f"test/{row}" for row in range(10)]


def test_cautions_are_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_images(None, Path(f"pcam:{root}"), split="val")
    assert [s.split for s in rows.samples] == ["val"] * 10
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("note: ") == 2
    assert "reports that CLIP-IT pairs them with are of the breast" in said.err
    open_table(root / "pcam" / "camelyonpatch_level_2_split_test_meta.csv", require=())
    assert "note" not in capsys.readouterr().err


def test_what_is_missing_is_told_without_the_path(chiasm: Run, model_dir: Path, tmp_path: Path) -> None:
    said = chiasm(
        "embed", f"bach:{tmp_path}", "--out", tmp_path / "s", "--model", model_dir, "--modality", "image", code=1
    )
    assert "error: BACH: folder `ICIAR2018_BACH_Challenge/Photos` is missing; expected ROOT/" in said
    assert "hint: get the data set from https://zenodo.org/records/3632035" in said
    assert str(tmp_path) not in said
    said = chiasm("embed", f"bahc:{tmp_path}", "--out", tmp_path / "s", "--model", model_dir, code=1)
    assert "did you mean `bach`?" in said


def test_pairing_reads_a_data_set_by_name_and_tcga_as_downloaded(
    chiasm: Run, model_dir: Path, root: Path, tmp_path: Path
) -> None:
    tcga = tmp_path / "tcga"
    tcga.mkdir()
    reports = [f"TCGA-AA-000{i}.X,tumor {i} of the breast" for i in range(6)]
    (tcga / "TCGA_Reports.csv").write_text("\n".join(["patient_filename,text", *reports]))
    types = [f"TCGA-AA-000{i},{'BRCA' if i % 2 else 'COAD'}" for i in range(6)]
    (tcga / "tcga_patient_to_cancer_type.csv").write_text("\n".join(["patient_id,cancer_type", *types]))
    done = chiasm(
        "pairing", "--images", f"pcam:{root}", "--split", "train", "--reports", f"tcga:{tcga}", "--tissue", "breast",
        "--encoder", model_dir, "--out", tmp_path / "pairs", "--json",
    )  # fmt: skip
    assert (done["images"], done["paired"]) == (10, 10)
    assert done["corpus"]["reports"] == 3
