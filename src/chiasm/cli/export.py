"""Write a model as a folder of open_clip or transformers, with the same weights bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from chiasm.cli.output import CodeOption, FamilyOption, JsonOption, print_json


def run(
    model: Annotated[str, typer.Argument(help="A name from `chiasm models`, a model folder or a weight file.")],
    to: Annotated[str, typer.Option("--to", help="open_clip, huggingface or chiasm.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.")],
    family: FamilyOption = None,
    activation: Annotated[
        str | None, typer.Option("--activation", help="What it was trained with, where its file is wrong.")
    ] = None,
    accept_differences: Annotated[
        bool, typer.Option("--accept-differences", help="Write although the other library prepares images otherwise.")
    ] = False,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Load, write, say what differs."""
    from chiasm.fetch import prepare

    prepare(model)  # what is absent is missed before torch is imported
    from chiasm.export import Target, export_encoder
    from chiasm.load import load

    encoder = load(model, family=family, activation=activation, allow_code=allow_code)
    told = export_encoder(encoder, out, to=cast(Target, to), accept_differences=accept_differences)
    if as_json:
        print_json({"model": encoder.name, "to": to, "folder": out.name, "differences": list(told)})
        return
    print(f"{encoder.name} is in {out} ({to})")
    for sentence in told:
        print(f"  there {sentence}")
