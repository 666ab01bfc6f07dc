from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.datasets import Columns, Dataset, load_table
from chiasm.datasets.columns import MISSING, label_column
from chiasm.datasets.parsing import parse_table
from chiasm.errors import FileFormatError, InputError, UnknownName

DATA = os.environ.get("CHIASM_DATA")


def picture(path: Path, level: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 5), level).save(path)
    return path


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        picture(tmp_path / "images" / f"{i}.png", 40 * i)
    return tmp_path


def test_open_clip_columns_and_tab(folder: Path) -> None:
    table = write(folder / "t.csv", "filepath\ttitle\nimages/0.png\ta, b\nimages/1.png\tc, d\n")
    data = load_table(table)
    assert [s.text for s in data] == ["a, b", "c, d"]
    assert [s.image for s in data] == [folder / "images" / "0.png", folder / "images" / "1.png"]
    assert [s.id for s in data] == ["images/0.png", "images/1.png"]
    assert data.columns is not None
    assert (data.columns.separator, data.columns.image, data.columns.text) == ("\t", "filepath", "title")


@pytest.mark.parametrize(
    ("header", "patient", "study", "slide"),
    [
        ("image,text,patientid", "p", None, None),
        ("image,text,Patient ID", "p", None, None),
        ("image,text,subject_id,study_id", "p", "p2", None),
        ("image,text,case_id,slide_id", "p", None, "p2"),
        ("image,text,source_tile_group", "p", None, None),
        ("image,text,PATIENT", "p", None, None),
    ],
)
def test_group_columns_are_recognised(
    folder: Path, header: str, patient: str, study: str | None, slide: str | None
) -> None:
    extra = ",p2" if header.count(",") == 3 else ""
    (sample,) = load_table(write(folder / "t.csv", f"{header}\nimages/0.png,words,p{extra}\n"))
    assert (sample.patient, sample.study, sample.slide) == (patient, study, slide)
    assert sample.labels == {}


def test_labels_keep_blank_as_not_labelled_and_codes_as_text(folder: Path) -> None:
    table = write(
        folder / "t.csv",
        "image,edema,age,sex,code,finding,score\n"
        "images/0.png,1.0,57,M,007,none,\n"
        "images/1.png,,58,nan,012,Effusion|Mass,2e-1\n"
        "images/2.png,-1.0,,F,100,N/A,.5\n",
    )
    data = load_table(table)
    assert data.labels("edema") == (1.0, None, -1.0)
    assert data.labels("age") == (57, 58, None)
    assert data.labels("sex") == ("M", None, "F")
    assert data.labels("code") == ("007", "012", "100")
    assert data.labels("finding") == ("none", "Effusion|Mass", None)
    assert data.labels("score") == (None, 0.2, 0.5)
    with pytest.raises(UnknownName, match="did you mean `edema`"):
        data.labels("oedema")


def test_explicit_columns_win_and_absent_ones_are_absent(folder: Path) -> None:
    text = "image,other,caption,alt,patient,who\nimages/0.png,images/1.png,one,two,p,q\n"
    columns = Columns(image="other", text="alt", patient="WHO", labels=("caption",))
    (sample,) = load_table(write(folder / "t.csv", text), columns=columns)
    assert (sample.image, sample.text, sample.patient) == (folder / "images" / "1.png", "two", "q")
    assert sample.labels == {"caption": "one"}
    (sample,) = load_table(folder / "t.csv", columns=Columns(image="", text="", patient=""))
    assert (sample.image, sample.text, sample.patient) == (None, None, None)
    with pytest.raises(UnknownName, match="unknown column `captoin`; did you mean `caption`") as caught:
        load_table(folder / "t.csv", columns=Columns(text="captoin"))
    assert "`alt`" in str(caught.value.hint)


def test_several_text_columns_are_joined(folder: Path) -> None:
    table = write(folder / "t.csv", "uid,findings,impression\na,Clear lungs.,Normal.\nb,,Normal.\nc,,\n")
    data = load_table(table)
    assert [(s.id, s.text) for s in data] == [("a", "Clear lungs. Normal."), ("b", "Normal.")]
    assert [(r.row, r.id, r.reason) for r in data.rejected] == [(3, "c", "text is empty")]


def test_a_word_column_called_image_is_not_a_path(folder: Path) -> None:
    data = load_table(write(folder / "t.csv", "uid,image,findings\n1,Chest PA,Clear\n2,Chest lateral,Clear\n"))
    assert data[0].image is None
    assert data.labels("image") == ("Chest PA", "Chest lateral")


def test_template_makes_captions_from_labels(folder: Path) -> None:
    table = write(folder / "t.csv", "image,label_name\nimages/0.png,no tumor\nimages/1.png,\nimages/2.png,tumor\n")
    data = load_table(table, columns=Columns(template="a histology patch of {label_name}"))
    assert [s.text for s in data] == ["a histology patch of no tumor", "a histology patch of tumor"]
    assert [r.reason for r in data.rejected] == ["a hole of the text template is blank"]
    same = load_table(table).with_text("a histology patch of {label_name}")
    assert [s.text for s in same] == [s.text for s in data]
    with pytest.raises(UnknownName, match="did you mean `label_name`"):
        load_table(table, columns=Columns(template="a {labelname}"))


@pytest.mark.parametrize("template", ["{", "plain", "{a.__class__}", "{label_name!r}", "{label_name:>9}", "{0}", "}"])
def test_templates_cannot_reach_into_objects(folder: Path, template: str) -> None:
    data = load_table(write(folder / "t.csv", "image,label_name\nimages/0.png,tumor\n"))
    with pytest.raises((InputError, UnknownName)):
        data.with_text(template)


def bad_table(folder: Path) -> Path:
    write(folder / "images" / "broken.png", "not an image")
    (folder / "images" / "empty.png").write_bytes(b"")
    return write(
        folder / "t.csv",
        "image,text\nimages/0.png,fine\nimages/none.png,lost\nimages/1.png,  \n,no path\nimages/2.png\n"
        "images/broken.png,broken\nimages/empty.png,empty\nhttps://x.org/1.png,web\nimages/3.png,fine\n",
    )


def test_bad_rows_are_listed(folder: Path) -> None:
    data = load_table(bad_table(folder))
    assert [s.text for s in data] == ["fine", "broken", "empty", "fine"]
    assert [(r.row, r.reason) for r in data.rejected] == [
        (2, "image file is missing"),
        (3, "text is empty"),
        (4, "image path is blank"),
        (5, "row does not have the 2 fields of the header"),
        (8, "image is a web address; download it first"),
    ]
    checked = load_table(folder / "t.csv", check_images=True)
    assert [s.id for s in checked] == ["images/0.png", "images/3.png"]
    assert [r.row for r in checked.rejected] == [2, 3, 4, 5, 6, 7, 8]
    assert "broken.png" not in " ".join(r.reason for r in checked.rejected)


def test_bad_rows_may_be_fatal_and_the_message_names_the_row_only(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"row 2 of `t.csv` cannot be used: image file is missing \(5 bad in all\)"
    ) as e:
        load_table(bad_table(folder), on_bad_row="fail")
    assert "none.png" not in str(e.value)
    with pytest.raises(InputError, match="skip"):
        load_table(folder / "t.csv", on_bad_row="ignore")  # type: ignore[arg-type]


def test_label_tables_load_without_their_images(tmp_path: Path) -> None:
    table = write(
        tmp_path / "t.csv", "Path,Edema\nx/patient00001/study1/view1.jpg,1\nx/patient00002/study1/view1.jpg,\n"
    )
    with pytest.raises(InputError, match="no usable row: 2 rows rejected: 2 image file is missing") as caught:
        load_table(table)
    assert "root" in str(caught.value.hint)
    data = load_table(table, require=())
    assert [s.patient for s in data] == ["patient00001", "patient00002"]
    assert [s.study for s in data] == ["patient00001/study1", "patient00002/study1"]
    assert data.labels("Edema") == (1, None)
    with pytest.raises(InputError, match="has no text column"):
        load_table(table, require=("text",))


def test_root_and_absolute_and_windows_paths(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("tables")
    text = f"image\n0.png\n{folder / 'images' / '1.png'}\n"
    data = load_table(write(elsewhere / "t.csv", text), root=folder / "images")
    assert [s.id for s in data] == ["0.png", "1.png"]
    data = load_table(write(folder / "w.csv", "image,text\nimages\\2.png,x\n"))
    assert data[0].image == folder / "images" / "2.png"


def test_repeated_images_get_numbered_ids(folder: Path) -> None:
    rows = "images/0.png,a\nimages/0.png,b\nimages/0.png#2,c\n"
    (folder / "images" / "0.png#2").write_bytes((folder / "images" / "0.png").read_bytes())
    data = load_table(write(folder / "t.csv", "image,text\n" + rows))
    assert [s.id for s in data] == ["images/0.png", "images/0.png#3", "images/0.png#2"]


def test_id_column_is_used_when_unique(folder: Path) -> None:
    table = write(folder / "t.csv", "uid,filename\n1,images/0.png\n1,images/1.png\n")
    data = load_table(table)
    assert [s.id for s in data] == ["images/0.png", "images/1.png"]
    assert [s.study for s in data] == ["1", "1"]
    with pytest.raises(InputError, match="id column `uid` is not unique: 0 blank, 1 repeated"):
        load_table(table, columns=Columns(id="uid"))
    data = load_table(write(folder / "u.csv", "uid,filename\n1,images/0.png\n2,images/1.png\n"))
    assert [s.id for s in data] == ["1", "2"]
    data = load_table(write(folder / "v.csv", "case_id,slide_id,event\na,s1,0\na,s2,1\n"))
    assert [s.id for s in data] == ["s1", "s2"]
    assert [s.group for s in data] == ["a", "a"]
    data = load_table(write(folder / "w.csv", "caption\nx\ny\n"))
    assert [s.id for s in data] == ["row-1", "row-2"]


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=60)
@given(
    texts=st.lists(CELL, min_size=1, max_size=8),
    separator=st.sampled_from([",", "\t", ";", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    newline=st.sampled_from(["\n", "\r\n"]),
)
@example(texts=['a "quoted" word', "two\nlines", "a,b;c|d\te"], separator=";", encoding="utf-16", newline="\r\n")
def test_text_survives_every_dialect(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], separator: str, encoding: str, newline: str
) -> None:
    path = tmp_path_factory.mktemp("dialect") / "t.csv"
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([["id", "caption", "x"], *([f"r{i}", t, "1"] for i, t in enumerate(texts))])
    path.write_bytes(buffer.getvalue().encode(encoding))
    expected = [t.strip() for t in texts if t.strip().casefold() not in MISSING]
    if not expected:
        with pytest.raises(InputError, match="text is empty"):
            load_table(path)
        return
    data = load_table(path)
    assert [s.text for s in data] == expected
    assert len(data) + len(data.rejected) == len(texts)
    assert data.columns is not None
    assert data.columns.separator == separator


def test_latin_and_windows_encodings(folder: Path) -> None:
    text = "image,caption\nimages/0.png,Ödem – rechts\n"
    data = load_table(write(folder / "t.csv", text, "cp1252"))
    assert (data[0].text, data.columns and data.columns.encoding) == ("Ödem – rechts", "cp1252")
    table = write(folder / "u.csv", text.replace("–", "-").replace("Ödem", "Ödem\x81"), "latin-1")
    assert load_table(table).columns == replace(data.columns or Columns(), encoding="latin-1")
    assert load_table(folder / "t.csv", columns=Columns(encoding="cp1250"))[0].text == "Ödem – rechts"
    with pytest.raises(FileFormatError, match="not ascii text"):
        load_table(folder / "t.csv", columns=Columns(encoding="ascii"))
    with pytest.raises(InputError, match="unknown encoding"):
        load_table(folder / "t.csv", columns=Columns(encoding="klingon"))


def test_json_lines_json_and_parquet_agree(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [
        {"image": "images/0.png", "caption": "one", "age": 50, "tags": ["a", "b"], "ok": True, "patient_id": 7.0},
        {"image": "images/1.png", "caption": "two", "age": None, "tags": [], "ok": False, "patient_id": 8.0},
    ]
    write(folder / "t.jsonl", "\n".join(json.dumps(r) for r in records) + "\n")
    write(folder / "t.json", json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), folder / "t.parquet")
    read = [load_table(folder / f"t.{kind}") for kind in ("jsonl", "json", "parquet")]
    for data in read:
        assert data.samples == read[0].samples
        assert data.digest == read[0].digest
    assert read[0][0].patient == "7"
    assert read[0][0].labels == {"age": 50, "tags": "a|b", "ok": 1}
    assert read[0][1].labels == {"age": None, "tags": None, "ok": 0}


def test_bad_json_lines_are_rows(folder: Path) -> None:
    table = write(folder / "t.jsonl", '{"caption": "one", "id": "a"}\nnonsense\n\n[1]\n{"caption": "two", "id": "b"}\n')
    data = load_table(table)
    assert [s.text for s in data] == ["one", "two"]
    assert [(r.row, r.reason) for r in data.rejected] == [
        (2, "row is not a JSON object"),
        (3, "row is not a JSON object"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("t.csv", b"", InputError, "is empty"),
        ("t.csv", b"image,caption\n", InputError, "no usable row"),
        ("t.csv", b",,,\n1,2,3,4\n", InputError, "no header"),
        ("t.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", FileFormatError, "is an image"),
        ("t.csv", b"\x7fELF\x02\x01\x01\0\0\0\0\0", FileFormatError, "binary"),
        ("t.csv", b'caption\n"never closed' + b"x" * 200_000, FileFormatError, "quote that is not closed"),
        ("t.json", b"{", FileFormatError, "is not JSON"),
        ("t.json", b"{}", FileFormatError, "list of objects"),
        ("t.parquet", b"PAR1 nonsense", FileFormatError, "Parquet"),
        ("t.jsonl", b"\n\n", InputError, "no usable row"),
    ],
)
def test_hostile_files_get_a_clear_error(
    tmp_path: Path, name: str, content: bytes, kind: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        load_table(tmp_path / name)


def test_missing_table_and_bad_separator(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`none\.csv` does not exist"):
        load_table(tmp_path / "deep" / "none.csv")
    with pytest.raises(InputError, match="one character"):
        load_table(write(tmp_path / "t.csv", "a::b\n1::2\n"), columns=Columns(separator="::"))


def test_empty_columns_at_the_end_of_the_header_are_no_columns(tmp_path: Path) -> None:
    data = load_table(write(tmp_path / "t.csv", "id,caption,a [x,y],,,\n1,one,2,3\n2,two,4,5,,\n3,three,6,7,,,\n"))
    assert len(data) == 3
    assert data.labels("a [x") == (2, 4, 6)
    data = load_table(write(tmp_path / "u.csv", "id,caption,a,a\n1,one,2,3\n2,two,2,3,surplus\n"))
    assert data.label_names == ("a", "a.1")
    assert [r.row for r in data.rejected] == [2]


@given(st.lists(st.one_of(st.none(), st.integers(-(10**6), 10**6)), max_size=9))
def test_columns_of_integers_come_back(values: list[int | None]) -> None:
    assert label_column(["" if v is None else str(v) for v in values]) == values


@given(st.lists(st.text(max_size=6), max_size=6))
def test_a_label_column_has_one_type(values: list[str]) -> None:
    kinds = {type(v) for v in label_column(values) if v is not None}
    assert len(kinds) <= 1


def test_filters_leave_a_trace(folder: Path) -> None:
    table = write(
        folder / "t.csv",
        "id,caption\n1,Replace this with your words\n2,Right pleural effusion\n3,CT\n4,[ insert caption here ]\n5,TBD\n"
        "6,Replacement of the hip\n7,No caption\n8,Test of the swallow shows delay\n",
    )
    data = load_table(table)
    kept = data.filter_texts(min_words=3)
    assert [s.id for s in kept] == ["2", "6", "8"]
    assert [(r.id, r.reason) for r in kept.rejected] == [
        ("1", "text is a placeholder"),
        ("4", "text is a placeholder"),
        ("5", "text is a placeholder"),
        ("7", "text is a placeholder"),
        ("3", "text has fewer than 3 words"),
    ]
    assert data.filter_texts(placeholders=()).samples == data.samples
    with pytest.raises(InputError, match=r"no sample of `t\.csv` is left"):
        data.filter_texts(min_words=100)


def test_subset_select_and_digest(folder: Path) -> None:
    text = "image,caption,split\nimages/0.png,a,train\nimages/1.png,b,dev\nimages/2.png,c,train\n"
    data = load_table(write(folder / "t.csv", text))
    assert data.splits == ("dev", "train")
    assert [s.text for s in data.subset("train")] == ["a", "c"]
    assert [s.text for s in data.select([2, 0])] == ["c", "a"]
    assert (len(data), data[1].text, data.groups) == (3, "b", ("images/0.png", "images/1.png", "images/2.png"))
    with pytest.raises(UnknownName, match="did you mean `train`"):
        data.subset("tran")
    assert data.digest == load_table(folder / "t.csv").digest
    assert data.digest != data.select([2, 0, 1]).digest
    with pytest.raises(InputError, match="not unique"):
        Dataset((data[0], data[0]), name="t")


def real(name: str) -> Path:
    if not DATA:
        pytest.skip("CHIASM_DATA does not name the folder of the real data")
    path = Path(DATA) / name
    if not path.is_file():
        pytest.skip(f"`{name}` is not in CHIASM_DATA")
    return path


@pytest.mark.parametrize(
    ("name", "rows", "groups", "rejected"),
    [
        ("medpix2/metadata.csv", 1850, 602, 0),
        ("covid_chestxray/metadata.csv", 378, 197, 0),
        ("pcam_subset/metadata.csv", 4760, 4760, 0),
        ("lc25000_lung/metadata.csv", 1548, 516, 0),
        ("pneumonia_cxr/metadata.csv", 1800, 1362, 0),
        ("nih_cxr14_sample/metadata.csv", 1000, 264, 0),
        ("openi_reports/metadata.jsonl", 3927, 3927, 28),
        ("pathology_text/metadata.jsonl", 1367, 1367, 0),
        ("pathology_text/tcga_patient_to_cancer_type.csv", 11160, 11160, 0),
        ("tcga_survival/metadata.csv", 1492, 1306, 0),
        ("wsi_dicom/metadata.csv", 48, 48, 0),
    ],
)
def test_real_tables_load_as_they_are(name: str, rows: int, groups: int, rejected: int) -> None:
    data = load_table(real(name))
    assert (len(data), len(set(data.groups)), len(data.rejected)) == (rows, groups, rejected)


@pytest.mark.parametrize(
    ("name", "rows", "patients"),
    [
        ("nih_Data_Entry_2017_v2020_head1000.csv", 1000, 246),
        ("nih_sample_labels_head1000.csv", 1000, 753),
        ("nih_BBox_List_2017.csv", 984, 984),
        ("google2019_nih-chest-xray-labels_head500.csv", 500, 211),
        ("nlmcxr_dicom_metadata_head500.csv", 500, None),
        ("indiana_projections_head400.csv", 400, None),
    ],
)
def test_real_label_tables_load_without_images(name: str, rows: int, patients: int | None) -> None:
    data = load_table(real(f"cxr_label_layouts/{name}"), require=())
    assert len(data) == rows
    assert data[0].image is not None
    assert patients is None or len(set(data.groups)) == patients


def test_real_captions_are_filtered_as_their_source_says() -> None:
    data = load_table(real("medpix2/metadata.csv"))
    assert data.splits == ("dev", "train")
    assert len(data.subset("dev")) == 197
    assert len(data) - len(data.filter_texts()) == 21
    assert len(data) - len(data.filter_texts(placeholders=(), min_words=4)) == 109


def test_a_json_table_in_another_encoding_than_was_named_is_an_error(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes('{"text": "naïve"}\n'.encode("cp1252"))
    assert parse_table(path).rows == [(1, ["naïve"])]
    with pytest.raises(FileFormatError, match="not utf-8 text"):
        parse_table(path, encoding="utf-8")
    with pytest.raises(InputError, match="unknown encoding"):
        parse_table(path, encoding="utf-9")


def test_lists_are_joined_as_asked_and_columns_left_unread(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"pages": [["one", None, "two"], []], "bytes": [b"1", b"2"]}), path)
    table = parse_table(path, list_separator=" / ", only=("pages", "absent"))
    assert table.header == ("pages",)
    assert [cells for _, cells in table.rows] == [["one / two"], [""]]
