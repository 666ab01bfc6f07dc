"""What all commands share: options of the same meaning, JSON or tables on standard output, errors on standard error."""

from __future__ import annotations

import errno
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from chiasm.errors import ChiasmError
from chiasm.progress import Progress, RichProgress, SilentProgress

P = ParamSpec("P")

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A name from `chiasm models`, a model file or folder, 'FILES*' for an ensemble."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
PrecisionOption = Annotated[
    str,
    typer.Option("--precision", help="auto (what is fast here), fp32, bf16 (mixed) or int8 (checked on your images)."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything drawn at random.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images or texts per forward pass.")]
FamilyOption = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="Whose weights a file holds, which its keys cannot tell: a name from `chiasm models`, openai or open_clip.",
    ),
]
CodeOption = Annotated[
    bool, typer.Option("--allow-code", help="Run a Python module that the model folder names as its tower.")
]


def guard(function: Callable[P, None]) -> Callable[P, None]:
    """Return ``function`` with chiasm's errors printed as ``error:``/``hint:`` and turned into exit code 1."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _print_warning
                function(*args, **kwargs)
        except ChiasmError as error:
            if os.environ.get("CHIASM_DEBUG"):
                raise
            report_error(error.message, error.hint)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            note = str(stop) or "interrupted"
            report_error(note, None)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader (`head`, say) went away: nothing is wrong, and Python must not complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            if os.environ.get("CHIASM_DEBUG"):
                raise
            report_error(*_file_problem(error))
            raise typer.Exit(1) from None

    return run


def _file_problem(error: OSError) -> tuple[str, str]:
    """Return message and hint for what the system refuses; of a path only its last part, as in all messages."""
    file = f"`{Path(os.fsdecode(error.filename)).name}`" if isinstance(error.filename, str | bytes) else "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full: {file} could not be written", "free some space and run the same command again"
    reason = (error.strerror or type(error).__name__).lower()
    return f"{file} cannot be read or written: {reason}", "check that its folder exists and that you may write there"


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print what the library warns of as one line, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr)


def report_error(message: str, hint: str | None) -> None:
    """Print ``error:`` and ``hint:`` on standard error."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def check_output(path: Path | None) -> Path | None:
    """Miss a file that cannot be written before the work, not after it; the callback of options that name one."""
    if path is None:
        return None
    folder = path.parent
    problem = (
        (f"`{path.name}` is a folder", "name a file in it") if path.is_dir()
        else (f"there is no folder `{folder.name}` to write `{path.name}` to", "make it first: `mkdir -p FOLDER`")
        if not folder.is_dir()
        else (f"you may not write `{path.name}` there", "name another file or folder")
        if not os.access(path if path.exists() else folder, os.W_OK)
        else None
    )  # fmt: skip
    if problem:
        report_error(*problem)
        raise typer.Exit(1)
    return path


def print_json(value: Any) -> None:
    """Print one strict JSON document; a number that is not finite becomes null."""
    from chiasm.io.manifest import to_json

    print(to_json(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """Print a plain table; columns whose cells are all numbers or intervals are right-aligned."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max([len(h), *(len(r[i]) for r in cells)]) for i, h in enumerate(columns)]
    right = [bool(cells) and all(r[i][:1].isdigit() or r[i] in ("", "-") for r in cells) for i in range(len(columns))]
    if title:
        print(title)

    def line(values: Sequence[str]) -> str:
        parts = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)]
        return "  " + "  ".join(parts).rstrip()

    print(line(list(columns)))
    print("  " + "  ".join("─" * w for w in widths))
    for row in cells:
        print(line(row))


def make_progress(as_json: bool, *, unit: str = "it") -> Progress:
    """Return the bar for people, silence for machines."""
    return SilentProgress() if as_json else RichProgress(unit=unit)
