"""The README and the other pages keep their word: Python blocks run, every command line is one that exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from chiasm.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
UsageError = typer.BadParameter.__mro__[1]  # of click, which typer may carry inside
README = (ROOT / "README.md").read_text()


def commands_of(path: Path) -> list[str]:
    """Command lines in back-ticks, in indented blocks, and in the comments of recipes; continued lines are joined."""
    text = path.read_text().replace("\\\n#", " ").replace("\\\n", " ")
    found = [m.replace("\n", " ") for m in re.findall(r"`(chiasm [a-z-]+ [^`]+)`", text)]
    found += re.findall(r"^(?:#|    )\s*(chiasm [a-z-]+ .*)$", text, flags=re.MULTILINE)
    return [c for c in found if "..." not in c]


def check_parses(line: str) -> None:
    """Assert that the program takes these words, without running the command."""
    words = shlex.split(line, comments=True)[1:]
    command = COMMANDS.get(words[0])
    assert command is not None, f"no command `{words[0]}`: {line}"
    try:
        command.make_context(words[0], words[1:])
    except UsageError as error:
        pytest.fail(f"{line}\n{error.format_message()}")


def test_command_lines_of_the_readme_parse() -> None:
    lines = commands_of(ROOT / "README.md")
    named = {line.split()[1] for line in lines} | set(re.findall(r"`chiasm ([a-z-]+)`", README))
    assert named == set(COMMANDS), "the README names every command"
    for line in lines:
        check_parses(line)


@pytest.mark.parametrize("path", [*PAGES[1:], *RECIPES], ids=lambda p: p.name)
def test_command_lines_of_other_pages_parse(path: Path) -> None:
    for line in commands_of(path):
        check_parses(line)


def test_the_parser_would_notice() -> None:
    with pytest.raises(pytest.fail.Exception, match="No such option"):
        check_parses("chiasm zero-shot a.png --lables 'a, b'")
    with pytest.raises(AssertionError, match="no command"):
        check_parses("chiasm zeroshot a.png")


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name}: make {target}"


def test_links_and_folders_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    listing = README.split("## Where everything lives")[1].split("\n## ")[0]
    for indent, name in re.findall(r"^( {4,6})([a-z]+)/ ", listing, flags=re.MULTILINE):
        folder = ROOT / "src" / "chiasm" / name if len(indent) == 6 else ROOT / name
        assert folder.is_dir(), folder


def test_python_of_the_readme_runs(
    demo_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(demo_dir.parent)
    for block in blocks:
        code = [line for line in block.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(code) <= 22, "an example of twenty lines"
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert printed.count("pleural effusion") == 2
