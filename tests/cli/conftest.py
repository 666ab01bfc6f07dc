"""A small real model folder and a small real table for commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chiasm.cli.main import app


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_encoder(TinyEncoder(0), folder)
    return folder


@pytest.fixture(scope="session")
def phantom_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chiasm.data.phantoms import make_chest_phantoms

    return make_chest_phantoms(8, seed=3, size_px=48).save(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture
def chiasm() -> Callable[..., Any]:
    """Run a command in this process; return JSON when ``--json`` is among the words."""

    def run(*words: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(w) for w in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if "--json" in words and code == 0 else result.output

    return run
