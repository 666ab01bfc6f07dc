"""The README's command of CLIP-IT, on miniatures with a tiny backbone and a tiny retriever."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from chiasm.datasets.miniature import make_miniature
from chiasm.load import save_encoder
from chiasm.testing import TinyEncoder

SCRIPT = Path(__file__).parents[2] / "examples" / "train_fuser_.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuser")
    make_miniature("pcam", folder / "pcam", per_class=12, size_px=16)
    save_encoder(TinyEncoder(0), folder / "tiny")
    lines = [
        f"breast {kind} with {finding}" for kind in ("tissue", "tumor") for finding in ("cells", "fat", "necrosis")
    ]
    (folder / "reports.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def main(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    spec = importlib.util.spec_from_file_location("train_fuser_", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(place)

    def run(words: str) -> int:
        code: int = module.main(words.split())
        return code

    return run


def test_the_command_of_the_readme_runs(
    main: Callable[[str], int], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = "--ds pcam --model tiny --lora_r 2 --lora_alpha 4"
    assert main(f"{readme} --root pcam --reports reports.txt --encoder tiny --worker 1") == 0
    said = capsys.readouterr().out
    assert "Test accuracy (mean over classes): " in said
    assert "note: the patches are lymph nodes" in said
    with (place / "output" / "train_with_text" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["class_0", "class_1", "target"]
    assert [int(r["target"]) for r in rows] == [0, 1] * 12
    assert all(abs(float(r["class_0"]) + float(r["class_1"]) - 1) < 1e-5 for r in rows)


def test_what_is_wrong_is_one_line(main: Callable[[str], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--ds pcam --model RESNET") == 1
    said = capsys.readouterr().err
    assert "error: unknown backbone `RESNET`" in said
    assert "UNI, DINOL14, VITS_8" in said
    assert main("--early --lora-rank 3") == 1
    assert main("--help") == 0
    assert "--lora-dropout" in capsys.readouterr().out
