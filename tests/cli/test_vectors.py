"""Rows of a store or of a table: the same vectors, labels and patients, and clear refusals."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chiasm.cli.vectors import label_column, labelled_rows, open_vectors
from chiasm.data.phantoms import make_chest_phantoms
from chiasm.data.tokens import TruncationWarning
from chiasm.errors import InputError


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_chest_phantoms(6, seed=4, size_px=32).save(tmp_path_factory.mktemp("vectors"))
    import pandas as pd

    frame = pd.read_csv(path)
    frame["split"] = ["train" if i % 3 else "test" for i in range(len(frame))]
    frame["ward"] = [f"w{i % 4}" for i in range(len(frame))]
    frame.loc[0, "effusion"] = None
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def store(table: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from chiasm.cli.main import app

    out = tmp_path_factory.mktemp("vectors-store") / "s"
    result = CliRunner().invoke(app, ["embed", str(table), "--out", str(out), "--model", str(model_dir), "--json"])
    assert result.exit_code == 0, result.output
    return out


def test_a_store_and_its_table_give_the_same_rows(table: Path, store: Path, model_dir: Path) -> None:
    for side in ("image", "text"):
        stored = open_vectors(store=store, table=None, side=side)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # the context of the tiny model is short
            fresh = open_vectors(store=None, table=table, model=str(model_dir), side=side, as_json=True)  # type: ignore[arg-type]
        assert stored.space == fresh.space
        assert stored.modality == fresh.modality == side
        order = [stored.ids.index(i) for i in fresh.ids]
        stored = stored.select(order)
        np.testing.assert_allclose(stored.normalize().vectors, fresh.normalize().vectors, atol=2e-3)
        assert stored.patients == fresh.patients
        for name in ("effusion", "split", "ward"):
            known = [None if v is None else str(v) for v in stored.labels[name]]
            assert known == [None if v is None else str(v) for v in fresh.labels[name]]


def test_an_encoder_that_is_loaded_already_is_used(table: Path, model_dir: Path) -> None:
    from chiasm.load import load

    encoder = load(model_dir)
    found = open_vectors(store=None, table=table, model="no-such-model", encoder=encoder, as_json=True)
    assert found.space == encoder.space


def test_split_and_group(store: Path, table: Path, model_dir: Path) -> None:
    held = open_vectors(store=store, table=None, split="test", group="ward")
    assert set(held.labels["split"]) == {"test"}
    assert held.patients == tuple(str(w) for w in held.labels["ward"])
    fresh = open_vectors(store=None, table=table, model=str(model_dir), split="test", group="ward", as_json=True)
    assert sorted(fresh.ids) == sorted(held.ids)
    assert set(fresh.groups) <= {"w0", "w1", "w2", "w3"}
    with pytest.raises(InputError, match="no row has split `val`") as error:
        open_vectors(store=store, table=None, split="val")
    assert "test, train" in str(error.value)
    with pytest.raises(InputError, match="no label column `nowhere`"):
        open_vectors(store=store, table=None, group="nowhere")


def test_labels(store: Path) -> None:
    rows = open_vectors(store=store, table=None)
    assert len(labelled_rows(rows, "effusion")) == len(rows) - 1
    assert labelled_rows(rows, "ward") is rows
    with pytest.raises(InputError, match="no label column `effusions`") as error:
        label_column(rows, "effusions")
    assert "effusion" in (error.value.hint or "")
    empty = dataclasses.replace(rows, labels={"x": (None,) * len(rows)})
    with pytest.raises(InputError, match="no row has a label in column `x`"):
        labelled_rows(empty, "x")


def test_one_source_only(store: Path, table: Path, tmp_path: Path, model_dir: Path) -> None:
    for both in ({"store": None, "table": None}, {"store": store, "table": table}):
        with pytest.raises(InputError, match="give --table or --store"):
            open_vectors(**both)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="are for tables"):
        open_vectors(store=store, table=None, column=["image=path"])
    with pytest.raises(InputError, match="no model was named"):
        open_vectors(store=None, table=table, model="")


def test_a_store_of_one_side_misses_the_other(table: Path, model_dir: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from chiasm.cli.main import app

    out = tmp_path / "s"
    words = ["embed", str(table), "--out", str(out), "--model", str(model_dir), "--modality", "image", "--json"]
    assert CliRunner().invoke(app, words).exit_code == 0
    with pytest.raises(InputError, match="holds no texts") as error:
        open_vectors(store=out, table=None, side="text")
    assert "--modality text" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: open_vectors(store=None, table=None), "give --table or --store, one of the two"),
        (lambda s: open_vectors(store=s, table=s), "give --table or --store, one of the two"),
        (lambda s: open_vectors(store=s, table=None, column=["id=x"]), "are for tables, not for a store"),
        (lambda s: open_vectors(store=s, table=None, root=s), "are for tables, not for a store"),
        (lambda s: open_vectors(store=s, table=None, group="wing"), "there is no label column `wing`"),
        (lambda s: open_vectors(store=s, table=None, split="winter"), "no row has split `winter`"),
        (lambda s: label_column(open_vectors(store=s, table=None), "grade"), "there is no label column `grade`"),
    ],
)
def test_every_refusal_has_a_hint_and_no_path(store: Path, call: Callable[[Path], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(store)
    assert caught.value.hint
    assert str(store.parent) not in str(caught.value)


def test_a_column_of_blanks_has_no_labelled_row(store: Path) -> None:
    found = open_vectors(store=store, table=None)
    blank = dataclasses.replace(found, labels={"grade": (None,) * len(found)})
    with pytest.raises(InputError, match="no row has a label in column `grade`") as caught:
        labelled_rows(blank, "grade")
    assert caught.value.hint
    half = dataclasses.replace(found, labels={"grade": tuple(k if k % 2 else None for k in range(len(found)))})
    kept = labelled_rows(half, "grade")
    assert kept.ids == found.ids[1::2]
    full = dataclasses.replace(found, labels={"grade": (0,) * len(found)})
    assert labelled_rows(full, "grade") is full, "0 is a label"
