"""Chest films with several findings, read from miniatures in the layout of the downloads and from real tables."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from chiasm.datasets import open_dataset as open_source
from chiasm.datasets import open_sample_image
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.layout import age_in_years, finding_value, sex_of
from chiasm.datasets.miniature import make_miniature
from chiasm.datasets.named import NAMED, dataset_facts, dataset_names, open_dataset
from chiasm.datasets.sections import join_sections, split_sections
from chiasm.errors import FileFormatError, InputError, UnknownName

DATA = os.environ.get("CHIASM_DATA")
NAMES = [name for name in dataset_names() if dataset_facts(name).kind == "findings"]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One miniature of each family, read by many tests and changed by none."""
    root = tmp_path_factory.mktemp("chest")
    for name in NAMES:
        make_miniature(name, root / name, size_px=8, per_class=5)
    return root


def copy(trees: Path, name: str, tmp_path: Path) -> Path:
    shutil.copytree(trees / name, tmp_path / name)
    return tmp_path / name


def real(name: str) -> Path:
    if not DATA:
        pytest.skip("CHIASM_DATA does not name the folder of the real data")
    path = Path(DATA) / name
    if not path.exists():
        pytest.skip(f"`{name}` is not in CHIASM_DATA")
    return path


def patients_are_on_one_side(data: Dataset) -> bool:
    sides: dict[str, set[str | None]] = {}
    for sample in data:
        sides.setdefault(sample.group, set()).add(sample.split)
    return all(len(side) == 1 for side in sides.values())


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_whole_and_hold_for_what_is_read(name: str, trees: Path) -> None:
    facts = dataset_facts(name)
    for words in (facts.title, facts.split_rule, facts.licence, facts.page, facts.citation, facts.layout):
        assert words
        assert "[?]" not in words
        assert "\n" not in words
    assert facts.page.startswith("https://")
    assert set(facts.words) == set(facts.classes)
    assert facts.cautions
    data = open_dataset(name, trees / name)
    assert not data.rejected
    assert data.label_names == (*facts.classes, *facts.columns)
    for finding in facts.classes:
        assert set(data.labels(finding)) <= {1, 0, -1, None}
        assert 1 in data.labels(finding)
    assert set(data.splits) == {"train", "val", "test"} & set(facts.sizes)
    assert patients_are_on_one_side(data)
    assert open_source(f"{name}:{trees / name}") == data
    if data[0].image is not None and data[0].image.suffix in (".png", ".jpg"):
        assert open_sample_image(data[0]).size == (8, 8)


@pytest.mark.parametrize("name", [name for name in NAMES if NAMED[name].takes_require])
def test_labels_are_read_without_images_on_request(name: str, trees: Path, tmp_path: Path) -> None:
    root = copy(trees, name, tmp_path)
    for path in root.rglob("*"):
        if path.suffix in (".png", ".jpg", ".dcm", ".dicom"):
            path.unlink()
    with pytest.raises(InputError, match=r"none of the .* images of the table was found") as caught:
        open_dataset(name, root)
    assert "require=()" in (caught.value.hint or "")
    bare = open_dataset(name, root, require=())
    whole = open_dataset(name, trees / name)
    assert [(s.id, s.labels, s.split, s.boxes) for s in bare] == [(s.id, s.labels, s.split, s.boxes) for s in whole]
    assert all(s.image is None for s in bare)


def test_chexpert_keeps_blank_and_uncertain_apart(trees: Path) -> None:
    root = trees / "chexpert"
    data = open_dataset("chexpert", root)
    assert (data[1].id, data[1].patient, data[1].study) == (
        "train/patient00001/study1/view2_lateral.jpg", "patient00001", "patient00001/study1",
    )  # fmt: skip
    assert [data[1].labels[o] for o in ("No Finding", "Support Devices", "Fracture", "Edema")] == [1, 0, -1, None]
    assert [data[0].labels[c] for c in ("sex", "age_years", "view", "projection")] == ["F", 21, "Frontal", "PA"]
    assert (data[1].labels["projection"], data[8].labels["sex"]) == (None, "M")
    for rule, value in (("ones", 1), ("zeros", 0), ("ignore", None)):
        assert open_dataset("chexpert", root, uncertain=rule)[1].labels["Fracture"] == value
    with pytest.raises(InputError, match="uncertain of chexpert must be"):
        open_dataset("chexpert", root, uncertain="maybe")
    with pytest.raises(InputError, match="split of chexpert must be"):
        open_dataset("chexpert", root, splits=["test"])


def test_chexpert_takes_the_inner_folder_the_full_size_and_one_table(trees: Path, tmp_path: Path) -> None:
    whole = open_dataset("chexpert", trees / "chexpert")
    assert open_dataset("chexpert", trees / "chexpert" / "CheXpert-v1.0-small").digest == whole.digest
    root = copy(trees, "chexpert", tmp_path)
    folder = root / "CheXpert-v1.0-small"
    for split in ("train", "valid"):
        table = folder / f"{split}.csv"
        table.write_text(table.read_text().replace("CheXpert-v1.0-small", "CheXpert-v1.0"))
    folder = folder.rename(root / "CheXpert-v1.0")
    assert open_dataset("chexpert", root).digest == whole.digest
    table = folder / "train.csv"
    text = table.read_text()
    table.write_text(text.replace("/train/patient00001/", "/train/../patient00001/"))
    reasons = Counter(r.reason for r in open_dataset("chexpert", root).rejected)
    assert reasons == {"path does not name patient and study of this split": 4}
    table.write_text(text.replace("-1.0", "-2.0"))
    with pytest.raises(FileFormatError, match=r"row 2 of `train.csv`: a label is none of"):
        open_dataset("chexpert", root)
    table.unlink()
    assert open_dataset("chexpert", root, splits=["val"]).splits == ("val",)
    with pytest.raises(InputError, match=r"CheXpert: file `train.csv` is missing"):
        open_dataset("chexpert", root)


def test_chexpert_takes_the_real_header() -> None:
    lines = (real("cxr_label_layouts") / "chexpert_columns.txt").read_text().splitlines()
    assert set(dataset_facts("chexpert").classes) <= set(lines)


def test_mimic_cxr_joins_films_studies_reports_and_labels(trees: Path, tmp_path: Path) -> None:
    root = trees / "mimic-cxr"
    data = open_dataset("mimic-cxr", root)
    assert (data[0].patient, data[0].study, data[0].labels["view"]) == ("p10000001", "p10000001/s50000001", "PA")
    assert data[0].text == "There is no finding, as before: unchanged. No finding."
    assert (data[0].text, data[0].labels["Fracture"]) == (data[1].text, -1)
    assert open_dataset("mimic-cxr", root, uncertain="ignore")[0].labels["Fracture"] is None
    assert open_dataset("mimic-cxr", root, sections=("impression",))[0].text == "No finding."
    assert str(open_dataset("mimic-cxr", root, sections=())[0].text).startswith("FINAL REPORT")
    studies = open_dataset("mimic-cxr", root, require=("text",))
    assert (len(data), len(studies), studies[0].id, studies[0].image) == (70, 35, "s50000001", None)
    assert open_dataset("mimic-cxr", root, labeller="negbio").digest == data.digest
    with pytest.raises(InputError, match="has no image"):
        open_dataset("mimic-cxr", root, per="study")
    for option, value in (("labeller", "me"), ("uncertain", "x"), ("per", "x"), ("reports", tmp_path / "none")):
        with pytest.raises(InputError, match=r"must be|does not exist"):
            open_dataset("mimic-cxr", root, **{option: value})


def test_mimic_cxr_does_with_less_and_says_what_is_wrong(trees: Path, tmp_path: Path) -> None:
    root = copy(trees, "mimic-cxr", tmp_path)
    for report in sorted(root.rglob("*.txt")):
        place = tmp_path / "apart" / report.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        report.rename(place)
    assert all(s.text is None for s in open_dataset("mimic-cxr", root))
    apart = open_dataset("mimic-cxr", root, reports=tmp_path / "apart", require=("image", "text"))
    assert apart.digest == open_dataset("mimic-cxr", trees / "mimic-cxr").digest
    labels = root / "mimic-cxr-2.0.0-chexpert.csv.gz"
    whole = labels.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "not a whole gzip file"),
        (b"no gzip", "not a whole gzip file"),
    ):
        labels.write_bytes(content)
        with pytest.raises(FileFormatError, match=message):
            open_dataset("mimic-cxr", root)
    text = gzip.decompress(whole).decode()
    labels.unlink()
    labels.with_suffix("").write_text(text.replace("1.0", "7.0", 1))
    with pytest.raises(FileFormatError, match=r"row 1 of `mimic-cxr-2.0.0-chexpert.csv`"):
        open_dataset("mimic-cxr", root)
    labels.with_suffix("").unlink()
    splits = root / "mimic-cxr-2.0.0-split.csv.gz"
    splits.write_bytes(gzip.compress(gzip.decompress(splits.read_bytes()).replace(b"validate", b"dev")))
    with pytest.raises(FileFormatError, match="names no split"):
        open_dataset("mimic-cxr", root)
    splits.unlink()
    (root / "mimic-cxr-2.0.0-metadata.csv.gz").rename(root / "cxr-record-list.csv.gz")
    bare = open_dataset("mimic-cxr", root)
    assert all(s.split is None and s.labels["Edema"] is None for s in bare)


def test_openi_reads_sections_and_terms(trees: Path, tmp_path: Path) -> None:
    root = trees / "openi"
    data = open_dataset("openi", root)
    assert (len(data), data[0].id, data[1].study) == (30, "CXR1_IM-0001-1001", "CXR1")
    assert data[2].text == "The heart is large & round. Cardiomegaly."
    assert (data[2].labels["mesh"], data[2].labels["mesh_automatic"]) == ("Cardiomegaly/mild", "heart")
    assert [data[i].labels["normal"] for i in (0, 2, 4)] == [1, 0, None]
    reports = open_dataset("openi", root, require=("text",))
    assert ([s.id for s in reports][8:11], reports[0].image) == (["CXR9", "CXR10", "CXR11"], None)
    findings = open_dataset("openi", root, require=("text",), sections=("findings",))
    assert (len(findings), Counter(r.reason for r in findings.rejected)) == (10, {"text is empty": 5})
    with pytest.raises(InputError, match="has no image"):
        open_dataset("openi", root, per="report")
    with pytest.raises(InputError, match="per of openi must be"):
        open_dataset("openi", root, per="study")


def test_openi_refuses_what_is_no_plain_report(trees: Path, tmp_path: Path) -> None:
    root = copy(trees, "openi", tmp_path)
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]><eCitation><uId id="CXR1"/>&a;</eCitation>'
    (root / "ecgen-radiology" / "1.xml").write_text(bomb)
    (root / "ecgen-radiology" / "2.xml").write_text(bomb, encoding="utf-16")
    (root / "ecgen-radiology" / "3.xml").write_text("<eCitation>")
    data = open_dataset("openi", root)
    assert [(r.row, r.reason) for r in data.rejected] == [(n, "report is no plain XML") for n in (1, 2, 3)]
    assert len(data) == 24
    shutil.rmtree(root / "ecgen-radiology")
    with pytest.raises(InputError, match="holds no report"):
        open_dataset("openi", root)


def test_openi_reads_the_two_tables(tmp_path: Path) -> None:
    folder = real("cxr_label_layouts")
    shutil.copy(folder / "indiana_reports_head200.csv", tmp_path / "indiana_reports.csv")
    with pytest.raises(InputError, match=r"file `indiana_projections.csv` is missing"):
        open_dataset("openi", tmp_path)
    shutil.copy(folder / "indiana_projections_head400.csv", tmp_path / "indiana_projections.csv")
    reports = open_dataset("openi", tmp_path, per="report", require=())
    assert (len(reports), reports[0].text) == (200, (
        "The cardiac silhouette and mediastinum size are within normal limits. There is no pulmonary edema. There is no "
        "focal consolidation. There are no XXXX of a pleural effusion. There is no evidence of pneumothorax. Normal "
        "chest x-XXXX."
    ))  # fmt: skip
    assert (reports[1].labels["mesh"], reports[1].labels["normal"]) == (
        "Cardiomegaly/borderline|Pulmonary Artery/enlarged", 0,
    )  # fmt: skip
    films = open_dataset("openi", tmp_path, require=())
    assert {s.labels["projection"] for s in films} == {"Frontal", "Lateral"}
    assert (films[0].id, films[0].study) == ("1_IM-0001-4001", "CXR1")


def test_openi_reads_the_real_reports_written_as_xml(tmp_path: Path) -> None:
    source = real("openi_reports") / "metadata.jsonl"
    folder = tmp_path / "ecgen-radiology"
    folder.mkdir()
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 800)]
    for row in rows:
        texts = "".join(
            f'<AbstractText Label="{name.upper()}">{escape(row[name])}</AbstractText>'
            for name in ("comparison", "indication", "findings", "impression")
        )
        mesh = "".join(f"<major>{escape(term)}</major>" for term in row["mesh_major"])
        images = "".join(f'<parentImage id="{image["id"]}"/>' for image in row["images"])
        (folder / f"{row['uid'].removeprefix('CXR')}.xml").write_text(
            f'<eCitation><uId id="{row["uid"]}"/>{texts}<MeSH>{mesh}</MeSH>{images}</eCitation>', encoding="utf-8"
        )
    films = open_dataset("openi", tmp_path, require=())
    assert [s.id for s in films] == [image["id"] for row in rows for image in row["images"]]
    reports = open_dataset("openi", tmp_path, require=("text",), sections=("impression",))
    expected = {row["uid"]: " ".join(row["impression"].split()) for row in rows if row["impression"].split()}
    assert {s.id: s.text for s in reports} == expected
    normal = [row["uid"] for row in rows if row["mesh_major"] == ["normal"]]
    assert [s.id for s in open_dataset("openi", tmp_path, per="report", require=()) if s.labels["normal"]] == normal


def test_tuberculosis_reads_class_age_and_sex(tmp_path: Path) -> None:
    for name, base in (("tb-shenzhen", "ChinaSet_AllFiles"), ("tb-montgomery", "MontgomerySet")):
        root = make_miniature(name, tmp_path / name, size_px=8, per_class=5)
        data = open_dataset(name, root)
        assert open_dataset(name, root / base).samples == data.samples
        assert [(s.labels["label"], s.labels["sex"], s.labels["age_years"]) for s in data][::9] == [
            ("normal", "M", 20), ("tuberculosis", "F", 29),
        ]  # fmt: skip
        assert [s.labels["reading"] for s in data][::9] == ["normal", "secondary PTB in the left upper field"]
        readings = root / base / "ClinicalReadings"
        first = readings / f"{data[0].id}.txt"
        first.write_text("Female, 8 months\n\nTB?\nSTB\n")
        assert [open_dataset(name, root)[0].labels[c] for c in ("sex", "age_years", "reading")] == [
            "F",
            0.667,
            "TB? STB",
        ]
        first.unlink()
        assert [open_dataset(name, root)[0].labels[c] for c in ("sex", "age_years", "reading")] == [None] * 3
        shutil.copy(root / base / "CXR_png" / f"{data[0].id}.png", root / base / "CXR_png" / "other.png")
        assert [r.reason for r in open_dataset(name, root).rejected] == ["name does not tell the class"]
        for path in (root / base / "CXR_png").glob("*_*_*.png"):
            path.unlink()
        with pytest.raises(InputError, match="holds no film of this set"):
            open_dataset(name, root)


def test_sections_of_a_report() -> None:
    text = "Before\n FINDINGS AND IMPRESSION:\n One: two\n  three.\n\nCOMPARISON:  \n IMPRESSION: a\nIMPRESSIONS: b\n"
    assert split_sections(text) == {"findings": "One: two three.", "impression": "a b"}
    assert split_sections("no heading at all") == {}
    assert join_sections(split_sections(text), ("impression", "history", "findings")) == "a b One: two three."
    assert join_sections({}, ("findings",)) is None


def test_cells_of_ages_sexes_and_findings() -> None:
    ages = {"57": 57, "057Y": 57, "45yrs": 45, "6months": 0.5, "000D": 0, "411": None, "": None, "old": None}
    assert {cell: age_in_years(cell) for cell in ages} == ages
    assert [sex_of(c) for c in ("Male", "F", "female", "Unknown", "mixed", None)] == ["M", "F", "F", None, None, None]
    assert [finding_value(c, "keep") for c in ("1.0", "0", "-1.0", None)] == [1, 0, -1, None]
    assert [finding_value("-1.0", rule) for rule in ("ones", "zeros", "ignore")] == [1, 0, None]
    for cell in ("2", "yes", "nan"):
        with pytest.raises(FileFormatError, match="none of 1, 0, -1"):
            finding_value(cell, "keep")


def test_nih14_has_findings_split_and_boxes(trees: Path) -> None:
    data = open_dataset("nih14", trees / "nih14")
    assert (len(data), data[1].id, data[1].patient) == (75, "00000001_001.png", "00000001")
    assert {k for k, v in data[1].labels.items() if v == 1 and k in dataset_facts("nih14").classes} == {
        "Atelectasis", "Cardiomegaly",
    }  # fmt: skip
    assert (data[1].labels["age_years"], data[1].labels["sex"], data[1].labels["view"]) == (21, "F", "AP")
    assert all(
        s.labels["No Finding"] == 1 - any(s.labels[f] for f in dataset_facts("nih14").classes[:-1]) for s in data
    )
    assert len([s for s in data if s.boxes]) == 14
    box = data[0].boxes[0]
    assert (box.x0_px, box.y0_px, box.x1_px, box.y1_px, box.label) == (225.5, 547.0, 312.0, 626.0, "Atelectasis")
    assert {b.label for s in data for b in s.boxes} == set(dataset_facts("nih14").classes[:-1])


def test_nih14_takes_both_tables_one_folder_and_no_lists(trees: Path, tmp_path: Path) -> None:
    root = copy(trees, "nih14", tmp_path)
    (root / "images").mkdir()
    for image in root.glob("images_*/images/*.png"):
        image.rename(root / "images" / image.name)
    (root / "Data_Entry_2017_v2020.csv").rename(root / "Data_Entry_2017.csv")
    whole = open_dataset("nih14", root)
    assert whole.digest == open_dataset("nih14", trees / "nih14").digest
    (root / "images" / "00000001_001.png").unlink()
    assert [r.reason for r in open_dataset("nih14", root).rejected] == ["image file is missing"]
    with pytest.raises(InputError, match="image file is missing"):
        open_dataset("nih14", root, on_bad_row="fail")
    (root / "BBox_List_2017.csv").unlink()
    (root / "test_list.txt").unlink()
    with pytest.raises(InputError, match=r"`test_list.txt` is missing, and the other list"):
        open_dataset("nih14", root)
    (root / "train_val_list.txt").unlink()
    assert all(s.split is None and not s.boxes for s in open_dataset("nih14", root))


def test_nih14_says_what_is_wrong_with_a_table(trees: Path, tmp_path: Path) -> None:
    root = copy(trees, "nih14", tmp_path)
    table = root / "Data_Entry_2017_v2020.csv"
    text = table.read_text()
    table.write_text(text.replace("Hernia", "Hiccup").replace(",1,2", ",one,2"))
    reasons = Counter(r.reason for r in open_dataset("nih14", root).rejected)
    assert "a finding is none of the fourteen" in reasons
    table.write_text(text.replace("Patient ID", "Person"))
    with pytest.raises(UnknownName, match="Patient ID"):
        open_dataset("nih14", root)
    table.write_text(text)
    (root / "test_list.txt").write_text("00000001_000.png\n")
    with pytest.raises(FileFormatError, match="both lists"):
        open_dataset("nih14", root)
    (root / "test_list.txt").unlink()
    (root / "train_val_list.txt").unlink()
    (root / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h]\na.png,Mass,1,2,3,wide\n")
    with pytest.raises(FileFormatError, match=r"row 1 of `BBox_List_2017.csv`"):
        open_dataset("nih14", root)


@pytest.mark.parametrize("table", ["nih_Data_Entry_2017_v2020_head1000.csv", "nih_sample_labels_head1000.csv"])
def test_nih14_reads_the_real_tables(table: str, tmp_path: Path) -> None:
    folder = real("cxr_label_layouts")
    shutil.copy(folder / table, tmp_path / "Data_Entry_2017.csv")
    shutil.copy(folder / "nih_BBox_List_2017.csv", tmp_path / "BBox_List_2017.csv")
    data = open_dataset("nih14", tmp_path, require=())
    assert (len(data), data.rejected) == (1000, ())
    assert all(s.patient == s.id[:8] for s in data)
    assert {s.labels["sex"] for s in data} == {"F", "M"}
    assert all(isinstance(s.labels["age_years"], int | float) for s in data)
    assert any(s.boxes for s in data)


def test_nih14_reads_real_images(tmp_path: Path) -> None:
    folder = real("nih_cxr14_sample")
    (tmp_path / "images").symlink_to(folder / "images")
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "Data_Entry_2017_v2020.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [c for c in rows[0] if c != "image"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    data = open_dataset("nih14", tmp_path)
    assert (len(data), len(set(data.groups)), data.rejected) == (1000, 264, ())
    assert Counter(data.labels("No Finding")) == {1: 499, 0: 501}
    assert sum(v == 1 for v in data.labels("Effusion")) == 170
    assert open_sample_image(data[0]).size == (64, 64)
