"""The program ``chiasm``: a table of commands, one file each, and the one place that turns errors into exit codes.

Exit codes: 0 done, 1 an ``error:`` with its ``hint:`` on standard error, 2 wrong usage, 3 a suite in
which some cell has no result, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

import typer

from chiasm import __version__
from chiasm.cli.output import guard

#: Command files in the order of ``chiasm --help``.
COMMANDS = (
    "demo",
    "train",
    "embed",
    "inspect",
    "zero_shot",
    "prompts",
    "few_shot",
    "weak_labels",
    "retrieval",
    "calibrate",
    "moderate",
    "fuse",
    "survival",
    "explain",
    "explore",
    "guide",
    "pairing",
    "distill",
    "export",
    "classify",
    "evaluate",
    "models",
    "doctor",
    "bundle",
)

app = typer.Typer(
    name="chiasm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="CLIP for medical images: pretrain, classify, search and explain. Research use only.",
)


def _version(value: bool) -> None:
    if value:
        print(f"chiasm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    if debug:
        os.environ["CHIASM_DEBUG"] = "1"


for _name in COMMANDS:
    _module = import_module(f"chiasm.cli.{_name}")
    _settings = getattr(_module, "CONTEXT", None)
    app.command(_name.replace("_", "-"), help=_module.__doc__, context_settings=_settings)(guard(_module.run))


def main() -> None:
    """Run the program; ``--debug`` may stand anywhere."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:]
    if "--debug" in arguments[1:]:
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    app(args=arguments)


if __name__ == "__main__":
    main()
