"""Parity tests against other packages run where those are installed: ``make test-peers``."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("open_clip") is not None:
        return
    absent = pytest.mark.skip(reason="open_clip is not in this environment; `make test-peers` runs it in .venv-peers")
    for item in items:
        if item.get_closest_marker("peer"):
            item.add_marker(absent)
