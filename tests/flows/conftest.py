"""A small whole demo, made once without network, for the tests of the demo, of its page and of the README."""

from __future__ import annotations

import json
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

#: The demo in a minute's hundredth: it learns nothing, but every part runs.
TINY = (
    "data.patients=40", "image.image_size=32", "image.width=8", "image.layers=[1, 1]", "image.heads=2",
    "preprocess.size=32", "text.width=32", "text.layers=1", "text.heads=2", "projection.dim=16", "optim.epochs=2",
    "optim.batch_size=16",
)  # fmt: skip


@contextmanager
def no_network() -> Iterator[None]:
    """Make every attempt to reach another machine, or to ask for its address, fail the test."""

    def refuse(*args: object, **_: object) -> None:
        raise AssertionError(f"the network was asked for: {args[-1]}")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        for name in ("getaddrinfo", "gethostbyname", "create_connection"):
            patch.setattr(socket, name, refuse)
        yield


def small_demo(folder: Path, *, test_patients: int) -> Path:
    """Run ``chiasm demo --out folder --json`` with a model that learns nothing; what it prints lies beside the folder."""
    from chiasm.cli.main import app
    from chiasm.evaluate import demo

    small = demo.DemoSettings(test_patients=test_patients, overrides=TINY, n_resamples=60)
    with pytest.MonkeyPatch.context() as patch, no_network(), warnings.catch_warnings():
        # A model that was hardly trained scores some labels below one half, which is told, not raised.
        warnings.simplefilter("default", UserWarning)
        patch.setattr(demo, "DemoSettings", lambda: small)
        result = CliRunner().invoke(app, ["demo", "--out", str(folder), "--seed", "3", "--json"])
    assert result.exit_code == 0, result.output
    (folder.parent / "printed.json").write_text(result.stdout)
    return folder


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny demo, as ``chiasm demo --out demo --json`` leaves it; its printed JSON is beside it."""
    return small_demo(tmp_path_factory.mktemp("flow") / "demo", test_patients=24)


@pytest.fixture(scope="session")
def demo_for_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo with enough patients for splits, shots and folds: what the how-to pages start from."""
    return small_demo(tmp_path_factory.mktemp("pages") / "demo", test_patients=160)


@pytest.fixture
def chiasm() -> Callable[..., Any]:
    """Run a command in this process and without network; return its output, or JSON when asked for."""
    from chiasm.cli.main import app

    def run(*words: object) -> Any:
        with no_network():
            result = CliRunner().invoke(app, [str(w) for w in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if "--json" in words else result.output

    return run
