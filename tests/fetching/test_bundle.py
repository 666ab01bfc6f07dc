"""Bundles: a folder that loads elsewhere without a network as the same model, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from chiasm import bundle
from chiasm.bundle import check_bundle, is_bundle, write_bundle
from chiasm.cli.main import app
from chiasm.errors import CheckpointError, FileFormatError, InputError
from chiasm.io.manifest import to_json
from chiasm.load import load, save_encoder
from chiasm.testing import TinyEncoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_encoder(TinyEncoder(), folder)
    (folder / "LICENSE").write_text("free for research")
    (folder / "README.md").write_text("x" * (2**20 + 1))  # no paper is that long
    (folder / "code.py").write_text("import os")
    return folder


def test_a_bundle_is_the_same_model_elsewhere(model: Path, tmp_path: Path) -> None:
    done = write_bundle(model, tmp_path / "out")
    assert is_bundle(tmp_path / "out")
    assert set(done.files) == {"model.safetensors", "encoder.json", "NOTICE.txt", "source/LICENSE"}
    assert done.papers == ("LICENSE",)
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]
    assert "licence of these weights is not known" in (tmp_path / "out" / "NOTICE.txt").read_text()
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    original = load(model)
    texts = ["left pleural effusion", "no finding"]
    code = (
        "import socket, sys, json\n"
        "def refuse(*a, **k): raise OSError('no network here')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import chiasm\n"
        f"e = chiasm.load({str(tmp_path / 'elsewhere')!r})\n"
        f"print(json.dumps([str(e.space), e.encode({texts!r}).tolist()]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"CHIASM_HOME": str(tmp_path / "nothing"), "HF_HOME": str(tmp_path / "nothing")}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    space, vectors = json.loads(answer.stdout)
    assert space == str(original.space) == done.space
    assert np.array_equal(np.asarray(vectors, dtype=np.float32), np.asarray(original.encode(texts)))


def test_checksums_are_those_of_sha256sum(model: Path, tmp_path: Path) -> None:
    done = write_bundle(model, tmp_path / "out")
    assert check_bundle(tmp_path / "out") == dict(done.files)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=True)


def test_changed_bundles_are_noticed(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_bundle(model, folder)
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "more.txt").write_text("x")
    with pytest.raises(FileFormatError, match=r"holds `more\.txt`, which is not listed"):
        check_bundle(folder)
    (folder / "more.txt").unlink()
    (folder / "NOTICE.txt").write_text("x")
    with pytest.raises(FileFormatError, match=r"changed `NOTICE\.txt`"):
        check_bundle(folder)
    (folder / "NOTICE.txt").unlink()
    with pytest.raises(FileFormatError, match=r"lacks `NOTICE\.txt`"):
        check_bundle(folder)
    for wrong in ("x", sums.replace("NOTICE.txt", "../NOTICE.txt"), sums.replace("NOTICE.txt", "/etc/passwd")):
        (folder / "SHA256SUMS").write_text(wrong)
        with pytest.raises(FileFormatError, match="is damaged"):
            check_bundle(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(FileFormatError, match="is no bundle"):
        check_bundle(folder)


def test_nothing_is_overwritten_and_nothing_half_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for place in ("mine", "file"):
        with pytest.raises(InputError, match="not empty"):
            write_bundle(model, tmp_path / place)
    (tmp_path / "empty").mkdir()
    write_bundle(model, tmp_path / "empty")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "_write_protocols", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_bundle(model, tmp_path / "full")
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "file", "empty"}


def test_a_bundle_that_is_not_the_same_is_never_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "save_encoder", lambda _, folder: save_encoder(TinyEncoder(seed=1), folder))
    with pytest.raises(CheckpointError, match="has the space"):
        write_bundle(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_of_the_catalog_takes_its_protocols_and_its_licence_along(model: Path, tmp_path: Path) -> None:
    encoder = load(model)
    encoder.name = "chexzero"
    save_encoder(encoder, tmp_path / "model")
    done = write_bundle(tmp_path / "model", tmp_path / "out")
    assert any("chexzero" in name for name in done.protocols)
    values = json.loads((tmp_path / "out" / "protocols.json").read_text())
    assert {v["name"] for v in values} == set(done.protocols)


def test_an_ensemble_becomes_one_folder(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_encoder(TinyEncoder(seed), tmp_path / f"member{seed}")
    members = [str(tmp_path / f"member{seed}") for seed in (0, 1)]
    answer = CliRunner().invoke(app, ["bundle", *members, str(tmp_path / "out"), "--json"])
    assert answer.exit_code == 0, answer.output
    assert load(tmp_path / "out").space == load(members).space


def test_the_command(model: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    answer = runner.invoke(app, ["bundle", str(model), str(tmp_path / "out"), "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.output)["directory"] == "out"
    assert runner.invoke(app, ["bundle", "--check", str(tmp_path / "out")]).exit_code == 0
    (tmp_path / "out" / "encoder.json").write_text(to_json({}))
    answer = runner.invoke(app, ["bundle", "--check", str(tmp_path / "out")])
    assert answer.exit_code == 1
    assert "hint: copy it again" in answer.output
    answer = runner.invoke(app, ["bundle", str(model)])
    assert answer.exit_code == 1
