"""The walls of the house: imports point backwards, files and functions stay small, names stay honest."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "chiasm"
FILES = sorted(SOURCE.rglob("*.py"))

LEVELS = {
    "errors": 0, "types": 0, "registry": 0, "config": 0, "progress": 0,
    "io": 1,
    "datasets": 2, "data": 2, "checkpoints": 2, "losses": 2, "metrics": 2,
    "encoders": 3,
    "fetch": 4, "load": 4, "embed": 4, "embed_streams": 4, "export": 4, "classifier": 4,
    "tasks": 5, "explain": 5, "train": 5, "deploy": 5,
    "evaluate": 6, "bundle": 6, "pairing": 6, "distill": 6, "export_vision": 6,
    "web": 7,
    "cli": 8,
}  # fmt: skip
#: Neighbours on one level that may know each other, in this direction only.
SIDEWAYS = {
    ("embed", "load"),
    ("embed", "embed_streams"),
    ("load", "fetch"),
    ("export", "load"),
    ("data", "datasets"),
    ("classifier", "load"),
    ("distill", "pairing"),
    ("evaluate", "pairing"),
}
TORCH_FREE = {"errors", "types", "registry", "config", "progress", "io", "datasets", "metrics", "tasks"}
NEVER_TORCH = {"metrics"}
BANNED = ("utils", "helpers", "common", "misc", "core", "legacy")


def place(path: Path) -> str:
    """The folder or top-level module a file belongs to."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """Every imported module and whether it is imported when the file is."""
    found = []

    def walk(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = at_import and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for name, _ in imports(ast.Module(body=child.body, type_ignores=[])):
                    found.append((name, False))
                continue
            if isinstance(child, ast.Import):
                found.extend((a.name, inside) for a in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, inside))
                if child.module == "chiasm":
                    found.extend((f"chiasm.{a.name}", inside) for a in child.names)
            walk(child, inside)

    walk(tree, True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_backwards(path: Path) -> None:
    here = place(path)
    if here in ("__init__", "testing"):
        return
    for name, _ in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "chiasm" or len(parts) < 2 or parts[1] in (here, "__version__"):
            continue
        there = parts[1]
        assert there != "testing", f"{path}: product code imports chiasm.testing"
        allowed = LEVELS[there] < LEVELS[here] or LEVELS[here] == LEVELS[there] == 0 or (here, there) in SIDEWAYS
        assert allowed, f"{path.relative_to(SOURCE)} (level {LEVELS[here]}) imports {name} (level {LEVELS[there]})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_torch_stays_where_it_belongs(path: Path) -> None:
    for name, at_import in imports(ast.parse(path.read_text())):
        top = name.split(".")[0]
        assert top not in ("torchvision", "timm", "open_clip"), f"{path}: imports {top}"
        if top == "torch":
            assert place(path) not in NEVER_TORCH, f"{path}: imports torch"
            assert not (at_import and place(path) in TORCH_FREE), f"{path}: imports torch when imported"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500, f"{path} has {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        documented = ast.get_docstring(node, clean=False)
        length -= len(documented.splitlines()) if documented else 0
        assert length <= 80, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_names_say_what_they_hold() -> None:
    for path in FILES:
        for part in path.relative_to(SOURCE).with_suffix("").parts:
            assert part not in BANNED, path
            assert not part.startswith("new_"), path
            assert not re.fullmatch(r".*[a-z]2", part), path


def test_modules_and_public_names_are_documented() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no module docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"


def test_no_code_is_run_from_weight_files() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.jit.load", "pickle.load", "pickle.loads", "eval", "exec"), (
                    f"{path}: {called}"
                )
                if called == "torch.load":
                    assert any(k.arg == "weights_only" for k in node.keywords), path


def test_library_never_prints() -> None:
    for path in FILES:
        if place(path) != "cli":
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"), f"{path}:{node.lineno}"


def code_lines(path: Path) -> int:
    """Lines that hold code: without docstrings, comments and blank lines, which weigh nothing."""
    text = path.read_text()
    lines = {
        number
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        for number in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_every_module_has_its_test() -> None:
    """Test code weighs at least 0.8 × the code, and every folder of the source has a folder of tests."""
    for folder in (p for p in SOURCE.iterdir() if p.is_dir() and p.name not in ("__pycache__",)):
        assert list((ROOT / "tests" / folder.name).glob("test_*.py")), f"tests/{folder.name} is empty"

    def weight(folder: Path) -> int:
        return sum(code_lines(p) for p in folder.rglob("*.py"))

    assert weight(ROOT / "tests") >= 0.8 * weight(SOURCE)
