"""A large store is searched through mapped vectors; where they cannot be written, it is read as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chiasm.cli import vectors as cli_vectors
from chiasm.cli.vectors import open_vectors
from chiasm.errors import InputError
from chiasm.io import store as store_module
from chiasm.io.mapped_vectors import mapped_file
from chiasm.io.store import save_embeddings
from chiasm.types import Embeddings, Space


def test_large_stores_are_mapped_for_searching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space("tiny", "0", "1", 4)
    rows = Embeddings(np.eye(4), tuple("abcd"), space, "image", labels={"split": ("train", "test", "test", "test")})
    save_embeddings(tmp_path, rows)
    assert mapped_file(open_vectors(store=tmp_path, table=None, mapped=True).vectors) is None  # small
    monkeypatch.setattr(cli_vectors, "MAPPED_VALUES", 1)
    assert mapped_file(open_vectors(store=tmp_path, table=None).vectors) is None
    found = open_vectors(store=tmp_path, table=None, mapped=True)
    assert mapped_file(found.vectors) is not None
    np.testing.assert_array_equal(found.vectors, rows.vectors)
    assert open_vectors(store=tmp_path, table=None, mapped=True, split="test").ids == ("b", "c", "d")

    def refuse(*_: object, **__: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(store_module, "map_vectors", refuse)
    found = open_vectors(store=tmp_path, table=None, mapped=True)
    assert mapped_file(found.vectors) is None
    np.testing.assert_array_equal(found.vectors, rows.vectors)


def test_a_file_in_the_way_of_the_copy_stops_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_embeddings(tmp_path, Embeddings(np.eye(4), tuple("abcd"), Space("tiny", "0", "1", 4), "image"))
    (tmp_path / "search").write_text("")
    monkeypatch.setattr(cli_vectors, "MAPPED_VALUES", 1)
    found = open_vectors(store=tmp_path, table=None, mapped=True)
    assert found.ids == tuple("abcd")
    assert (tmp_path / "search").is_file()
