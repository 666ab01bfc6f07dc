"""What a newcomer gets wrong first is answered before the work, with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from chiasm.cli.main import app
from chiasm.datasets.parsing import detect_encoding
from chiasm.errors import FileFormatError, InputError, missing_column
from chiasm.evaluate.truth import truth_columns
from chiasm.tasks.k_shot import draw_episodes
from chiasm.types import Sample

PAGES = {
    "few-shot": ("--store", "s", "--label", "x", "--out"),
    "fuse": ("--store", "s", "--label", "x", "--out"),
    "retrieval": ("--store", "s", "--out"),
    "survival": ("--time", "t", "--unit", "days", "--store", "s", "--out"),
    "calibrate": ("--scores", "s.csv", "--save"),
    "moderate": ("i.png", "--policy", "p.toml", "--csv"),
    "zero-shot": ("i.png", "--labels", "a,b", "--out"),
    "explain": ("i.png", "a text", "--page"),
    "weak-labels": ("--table", "t.csv", "--labels-out"),
}


@pytest.mark.parametrize("command", PAGES)
@pytest.mark.parametrize(
    ("name", "said"), [("absent/page.html", "no folder `absent`"), (".", "is a folder")], ids=["absent", "folder"]
)
def test_an_output_that_cannot_be_written_is_missed_before_the_work(
    command: str, name: str, said: str, tmp_path: Path
) -> None:
    found = CliRunner().invoke(app, [command, *PAGES[command], str(tmp_path / name)])
    assert found.exit_code == 1
    assert said in found.output
    assert "hint: " in found.output


def test_a_column_that_does_not_exist_suggests_the_nearest_one() -> None:
    error = missing_column("Effusoin", ["visit", "effusion"])
    assert error.message == "the table has no label column `Effusoin`; did you mean `effusion`?"
    assert error.hint == "columns: effusion, visit"
    assert "`mesh_major`?" in missing_column("mesh", ["images", "mesh_major"]).message
    assert "did you mean" not in missing_column("kidney", ["visit", "effusion"]).message


@pytest.mark.parametrize("values", [(0, 1), (0.0, 1.0), ("0", "1"), (1, None)])
def test_a_column_of_flags_in_place_of_class_names_points_to_the_star(values: tuple[object, ...]) -> None:
    rows = [Sample(id=str(i), text="-", labels={"effusion": v}) for i, v in enumerate(values)]  # type: ignore[dict-item]
    with pytest.raises(InputError, match="does not occur") as caught:
        truth_columns(rows, "effusion", ["effusion"])
    assert '"*"' in (caught.value.hint or "")


@pytest.mark.parametrize("start", [b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xd8\xff\xe0\0", b"\0" * 128 + b"DICM"])
def test_an_image_in_place_of_a_table_is_called_so(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "film.csv"
    path.write_bytes(start)
    with pytest.raises(FileFormatError, match="is an image") as caught:
        detect_encoding(path)
    assert "a table is asked for" in (caught.value.hint or "")


def test_a_mistyped_image_is_not_searched_for_as_words() -> None:
    found = CliRunner().invoke(app, ["retrieval", "no such film.PNG", "--store", "s", "--model", "m"])
    assert found.exit_code == 1
    assert "image `no such film.PNG` does not exist" in found.output


def test_a_column_of_ids_as_classes_is_asked_about() -> None:
    names = [str(i) for i in range(60)]
    with pytest.raises(InputError, match="class 1 of 60") as caught:
        draw_episodes(names, names, [i < 20 for i in range(60)], shots=(1,), seeds=(0,))
    assert "60 different labels: is it the right column?" in (caught.value.hint or "")
