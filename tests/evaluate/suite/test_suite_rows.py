"""A data set of a suite, read from small tables: parts, truth, groups of patients, digests, and what is wrong with it."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chiasm.errors import ChiasmError, InputError
from chiasm.evaluate.suite.leakage import near_rows
from chiasm.evaluate.suite.rows import DataRows, _band, read_rows
from chiasm.evaluate.suite.settings import DataEntry, load_suite
from chiasm.evaluate.truth import truth_columns
from chiasm.types import Embeddings, Sample, Space

HEAD = ("id", "image", "patient_id", "split", "finding", "nodule", "sex", "age", "text")
#: Eight films of five patients.
TABLE = [
    ("r0", "a.png", "p1", "train", "normal", "0", "F", "17", "clear lungs"),
    ("r1", "b.png", "p1", "train", "tumour", "1", "F", "18", "a nodule"),
    ("r2", "a.png", "p2", "train", "normal", "0", "M", "39.5", "clear lungs"),
    ("r3", "b.png", "p3", "val", "tumour", "1", "M", "40", "TBD"),
    ("r4", "a.png", "p4", "test", "normal", "", "F", "75", ""),
    ("r5", "b.png", "p4", "test", "tumour", "1", "F", "76", "a nodule"),
    ("r6", "a.png", "p5", "test", "other", "0", "", "", "tbd again"),
    ("r7", "b.png", "p5", "", "", "0", "M", "60", "clear"),
]
Read = Callable[..., DataRows]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write a table (by default the one above) beside two images, and read it with these fields of an entry."""
    for k, name in enumerate("ab"):
        Image.new("L", (8, 8), 60 + 90 * k).save(tmp_path / f"{name}.png")

    def run(
        table: list[tuple[str, ...]] = TABLE, *, seed: int = 0, head: tuple[str, ...] = HEAD, **fields: Any
    ) -> DataRows:
        with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *table])
        fields.setdefault("labels", ("normal", "tumour"))
        fields.setdefault("truth", "finding")
        if fields["truth"] is None:
            fields["labels"] = ()
        return read_rows("films", DataEntry(source=str(tmp_path / "t.csv"), **fields), seed=seed)

    return run


def changed(row: int, column: str, value: str) -> list[tuple[str, ...]]:
    table = [list(r) for r in TABLE]
    table[row][HEAD.index(column)] = value
    return [tuple(r) for r in table]


def test_parts_truth_and_patients_by_hand(read: Read) -> None:
    rows = read()
    assert len(rows) == 8
    assert rows.parts == ("train", "train", "train", "val", "test", "test", "test", None)
    assert rows.groups == ("p1", "p1", "p2", "p3", "p4", "p4", "p5", "p5")
    nan = np.nan
    wanted = [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [nan, nan], [nan, nan]]
    np.testing.assert_array_equal(rows.truth, wanted)
    assert rows.mode == "single"
    assert rows.labels == ("normal", "tumour")
    assert rows.has_text
    assert [rows.rows_of(p).tolist() for p in ("train", "val", "test", "other")] == [[0, 1, 2], [3], [4, 5, 6], []]


def test_a_label_with_a_column_of_its_own(read: Read) -> None:
    rows = read(labels=("nodule",), truth="*")
    assert rows.mode == "multi"
    np.testing.assert_array_equal(rows.truth[:, 0], [0, 1, 0, 1, np.nan, 1, 0, 0])  # an empty cell is not "negative"


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"split": {"test": "val"}}, "...T...."),
        ({"split": {"train": "test", "test": "train"}}, "TTT.rrr."),
        ({"split": {"train": "train", "val": "val", "test": "test"}}, "rrrvTTT."),
        ({"split": {"test": "test"}}, "....TTT."),
        ({"fractions": {"test": 1.0}}, "TTTTTTTT"),
    ],
)
def test_parts_as_the_suite_names_them(read: Read, fields: dict[str, Any], parts: str) -> None:
    short = {"train": "r", "val": "v", "test": "T", None: "."}
    assert "".join(short[p] for p in read(**fields).parts) == parts


@pytest.mark.parametrize("name", ["val", "VALID", "dev", "Dev"])
def test_names_of_validation(read: Read, name: str) -> None:
    assert read(changed(3, "split", name)).parts[3] == "val"


def test_without_test_rows_everything_is_tested(read: Read) -> None:
    bare = [tuple("" if k == HEAD.index("split") else cell for k, cell in enumerate(row)) for row in TABLE]
    assert set(read(bare).parts) == {"test"}


@pytest.mark.parametrize("seed", range(6))
def test_drawn_parts_keep_patients_whole(read: Read, seed: int) -> None:
    table = [
        (f"i{k}", "ab"[k % 2] + ".png", f"q{k // 3}", "", ("normal", "tumour")[k % 2], *TABLE[0][5:]) for k in range(30)
    ]
    fractions = {"train": 0.5, "val": 0.2, "test": 0.3}
    rows = read(table, fractions=fractions, seed=seed)
    of_patient: dict[str, set[str | None]] = {}
    for group, part in zip(rows.groups, rows.parts, strict=True):
        of_patient.setdefault(group, set()).add(part)
    assert all(len(parts) == 1 for parts in of_patient.values())
    assert {p for (p,) in of_patient.values()} == {"train", "val", "test"}
    assert rows.parts == read(table, fractions=fractions, seed=seed).parts
    assert any(read(table, fractions=fractions, seed=seed + k).parts != rows.parts for k in (1, 2, 3))


@pytest.mark.parametrize(
    ("value", "cuts", "band"),
    [
        ("17.9", (18, 40), "under 18"),
        ("18", (18, 40), "18 to 40"),
        ("39.999", (18, 40), "18 to 40"),
        ("40", (18, 40), "40 and over"),
        ("058Y", (18, 40), "40 and over"),
        (" 20y ", (18, 40), "18 to 40"),
        (20, (18, 40), "18 to 40"),
        ("-3", (18,), "under 18"),
        ("0.25", (0.5,), "under 0.5"),
        ("006M", (18, 40), None),  # months are no years
        ("unknown", (18, 40), None),
        ("", (18, 40), None),
        (None, (18, 40), None),
        ("nan", (18, 40), None),
        ("inf", (18, 40), None),
    ],
)
def test_bands(value: Any, cuts: tuple[float, ...], band: str | None) -> None:
    assert _band(value, cuts) == band


def test_groups_of_people_by_hand(read: Read) -> None:
    rows = read()
    assert rows.subgroups == {
        "sex": ("F", "F", "M", "M", "F", "F", None, "M"),
        "age": ("under 18", "18 to 40", "18 to 40", "40 to 60", "75 and over", "75 and over", None, "60 to 75"),
    }
    assert read(subgroups=()).subgroups == {}
    assert list(read(subgroups=("nodule",), bands={"age": (50.0,)}).subgroups) == ["nodule", "age"]
    assert set(read(bands={"age": (50.0,)}).subgroups["age"]) == {"under 50", "50 and over", None}


def test_ages_that_are_bands_already_stay_what_they_are(read: Read) -> None:
    ages = ("0-17", "18-39", "18-39", "40-64", "65+", "65+", "", "40-64")
    table = [
        tuple(ages[k] if c == HEAD.index("age") else cell for c, cell in enumerate(row)) for k, row in enumerate(TABLE)
    ]
    assert read(table).subgroups["age"] == tuple(a or None for a in ages)
    with pytest.raises(InputError, match="column `age` of data set `films` holds no numbers"):
        read(table, bands={"age": (40.0,)})


def test_a_named_column_of_one_group_is_told(read: Read) -> None:
    one = [tuple("F" if c == HEAD.index("sex") else cell for c, cell in enumerate(row)) for row in TABLE]
    assert read(one).cautions == ()  # nobody asked for it
    rows = read(one, subgroups=("sex",))
    assert rows.subgroups == {}
    assert rows.cautions == ("Column `sex` has one group only: nothing is compared by it.",)


def test_texts_that_are_no_texts(read: Read) -> None:
    texts = [s.text for s in read(drop_texts=("^tbd",)).samples]
    assert texts == ["clear lungs", "a nodule", "clear lungs", None, None, "a nodule", None, "clear"]
    assert [s.text for s in read(drop_texts=("lungs$", "^TBD$")).samples] == [
        None, "a nodule", None, None, None, "a nodule", "tbd again", "clear"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"labels": ("normal", "tumor")}, "label `tumor` does not occur in column `finding`; did you mean `tumour`", "name the labels"),
        ({"labels": ("normal", "zebra")}, "`zebra` does not occur in column `finding`, which holds 3 different", "name the labels"),
        ({"truth": "findings"}, "no label column `findings`", "finding"),
        ({"truth": "*"}, "no label column `normal`", "nodule"),
        ({"subgroups": ("gender",)}, "no column `gender` to compare groups by", "sex"),
        ({"bands": {"weight": (1.0,)}}, "no column `weight` to compare groups by", "age"),
        ({"split": {"test": "holdout"}}, "no row of data set `films` has split `holdout`", "splits: test, train, val"),
        ({"drop_texts": ("(",)}, "`data.films.drop_texts` holds no regular expression", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(read: Read, fields: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(ChiasmError) as caught:
        read(**fields)
    assert message in caught.value.message
    assert hint is None or hint in str(caught.value.hint)
    for row in TABLE:  # no id, patient or text of a row
        assert row[0] not in str(caught.value)
        assert not row[8] or row[8] not in str(caught.value)


def test_classes_that_exclude_each_other(read: Read) -> None:
    both = changed(0, "finding", "normal|Tumour")
    with pytest.raises(InputError, match="1 rows of data set `films` have several of the labels") as caught:
        read(both)
    assert 'mode = "multi"' in str(caught.value.hint)
    np.testing.assert_array_equal(read(both, mode="multi").truth[0], [1, 1])
    np.testing.assert_array_equal(read(both, mode="multi").truth[6], [0, 0])  # labelled, and none of them


@pytest.mark.parametrize(
    ("row", "column", "value", "digests"),
    [
        (0, "id", "r00", {"images", "rows"}),
        (0, "image", "b.png", {"images"}),
        (0, "patient_id", "p9", {"rows"}),
        (0, "finding", "tumour", {"truth"}),
        (0, "split", "val", {"parts"}),
        (0, "text", "no lungs", {"texts"}),
        (0, "sex", "M", set()),
        (0, "nodule", "1", set()),
    ],
)
def test_a_digest_changes_with_what_it_is_of_and_nothing_else(
    read: Read, row: int, column: str, value: str, digests: set[str]
) -> None:
    before, after = read().digests, read(changed(row, column, value)).digests
    assert {name for name in before if before[name] != after[name]} == digests


def test_digests_know_mode_and_labels(read: Read) -> None:
    plain = read(labels=("nodule",), truth="*").digests
    assert read(labels=("nodule",), truth="*").digests == plain
    assert read().digests["truth"] != read(labels=("tumour", "normal")).digests["truth"]
    assert read().digests["truth"] != read(mode="multi").digests["truth"]
    twin = tuple("twin" if name == "sex" else name for name in HEAD)
    table = [
        tuple(row[HEAD.index("nodule")] if k == HEAD.index("sex") else cell for k, cell in enumerate(row))
        for row in TABLE
    ]
    named = [read(table, head=twin, labels=(name,), truth="*") for name in ("nodule", "twin")]
    np.testing.assert_array_equal(named[0].truth, named[1].truth)
    assert named[0].digests["truth"] != named[1].digests["truth"]  # equal numbers of another finding


def samples(*values: Any) -> list[Sample]:
    return [Sample(f"s{k}", labels={"finding": value, "a": value}) for k, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "labels", "truth"),
    [
        (("a", "b"), ("a", "b"), {"a": (1, 0), "b": (0, 1)}),
        (("A ", " b|a"), ("a", "b"), {"a": (1, 1), "b": (0, 1)}),
        (("a", None, "b"), ("a",), {"a": (1, None, 0)}),
        (("Überblähung", "ß"), ("überblähung",), {"überblähung": (1, 0)}),
        (("ab", "a"), ("a",), {"a": (0, 1)}),  # a part of a name is another name
        ((1, 0, None), ("1",), {"1": (1, 0, None)}),
    ],
)
def test_truth_of_a_column_of_names(values: Any, labels: Any, truth: Any) -> None:
    assert truth_columns(samples(*values), "finding", labels) == truth


def test_truth_of_own_columns_is_passed_on() -> None:
    assert truth_columns(samples(1, 0, None), "*", ("a",)) == {"a": (1, 0, None)}
    with pytest.raises(InputError, match="no label column `b`") as caught:
        truth_columns(samples(1), "*", ("a", "b"))
    assert caught.value.hint == "columns: a, finding"
    with pytest.raises(InputError) as caught:
        truth_columns([Sample("x")], "finding", ("a",))
    assert caught.value.hint == "columns: none"


def test_a_wrong_column_of_people_is_counted_not_shown() -> None:
    people = [Sample(str(k), labels={"name": f"Miller {k}"}) for k in range(5)]
    with pytest.raises(InputError) as caught:
        truth_columns(people, "name", ("effusion",))
    assert "5 different values" in str(caught.value)
    assert "iller" not in str(caught.value)


def test_near_rows_by_hand(read: Read) -> None:
    rows = read()
    # r4 is 1 degree from r0 (train), r5 0.9 from r3 (val), r6 half a degree from r2 (train); r7 is in no part
    angles = np.deg2rad([0, 90, 180, 270, 1, 270.9, 180.5, 0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    images = Embeddings(
        7 * vectors,
        tuple(s.id for s in rows.samples),
        Space("s", "w", "p", 2),
        "image",
        normalized=False,
        patients=rows.groups,
    )
    assert near_rows(rows, images, np.cos(np.deg2rad(1.2))) == 3
    assert near_rows(rows, images, np.cos(np.deg2rad(0.95))) == 2
    assert near_rows(rows, images, np.cos(np.deg2rad(0.7))) == 1
    assert near_rows(rows, images, 0.99999999) == 0
    own = dataclasses.replace(images, patients=("p4", *rows.groups[1:]))  # r0 and r4 are of one patient
    assert near_rows(rows, own, np.cos(np.deg2rad(1.2))) == 2
    only = dataclasses.replace(rows, parts=("test",) * 8)
    assert near_rows(only, images, 0.5) is None
    order = np.random.default_rng(0).permutation(8)
    assert near_rows(rows, images.select(order), np.cos(np.deg2rad(1.2))) == 3


def test_one_table_under_two_names_is_two_data_sets_in_the_report(read: Read, tmp_path: Path) -> None:
    from chiasm.evaluate.suite.run import run_suite

    read()
    entry = f'source = "{tmp_path}/t.csv"\nlabels = ["normal", "tumour"]\ntruth = "finding"\n'
    path = tmp_path / "s.toml"
    path.write_text(
        f'n_resamples = 5\nn_permutations = 5\n[models.c]\nfloor = "colours"\n[data.one]\n{entry}[data.two]\n{entry}[tasks.prototype]\n'
    )
    for _ in range(2):
        run = run_suite(load_suite(path), tmp_path / "out")
        assert [x.data for x in run.leakage] == ["one", "two"]
        assert [c.data for c in run.cells] == ["one", "two"]
