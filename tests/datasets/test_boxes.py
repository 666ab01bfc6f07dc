from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiasm.data.phantoms import make_chest_phantoms, make_tissue_phantoms
from chiasm.datasets import open_dataset
from chiasm.datasets.boxes import read_boxes
from chiasm.errors import FileFormatError


def test_saved_phantoms_come_back_with_boxes_labels_and_patients(tmp_path: Path) -> None:
    for name, make in (("chest", make_chest_phantoms), ("tissue", make_tissue_phantoms)):
        made = make(6, seed=3, size_px=48)
        made.save(tmp_path / name)
        read = open_dataset(tmp_path / name, check_images=True)
        assert len(read) == len(made.samples)
        assert not read.rejected
        for a, b in zip(read, made.samples, strict=True):
            assert (a.id, a.text, a.patient, a.boxes) == (b.id, b.text, b.patient, b.boxes)
            assert {k: v for k, v in a.labels.items() if v is not None} == {
                k: v for k, v in b.labels.items() if v is not None
            }


@pytest.mark.parametrize(
    "content",
    [
        "nonsense", "[]", "{}", '{"images": []}', '{"images": {"a": [{}]}}', '{"images": {"a": [{"box": [1, 2, 3]}]}}',
        '{"images": {"a": [{"box": [5, 5, 5, 9]}]}}', '{"images": {"a": [{"box": "1234"}]}}', '{"images": {"a": 3}}',
    ],
)  # fmt: skip
def test_damaged_boxes_are_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(FileFormatError, match="does not hold boxes"):
        read_boxes(tmp_path / "boxes.json")


def test_images_without_boxes_have_none(tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text(json.dumps({"images": {"b.png": [{"box": [0, 1, 2.5, 3], "label": "mass"}]}}))
    (tmp_path / "table.csv").write_text("filepath,title\na.png,one\nb.png,two\n")
    read = open_dataset(tmp_path / "table.csv", require=("text",))
    assert [[b.label for b in s.boxes] for s in read] == [[], ["mass"]]
