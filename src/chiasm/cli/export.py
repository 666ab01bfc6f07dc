"""Write a model as a folder of open_clip or transformers, or a distilled classifier without text (--vision-only)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from chiasm.cli.output import CodeOption, FamilyOption, JsonOption, print_json


def run(
    model: Annotated[
        str,
        typer.Argument(help="A name from `chiasm models`, a model folder, a weight file; a run of `chiasm distill`."),
    ],
    to: Annotated[str | None, typer.Option("--to", help="open_clip, huggingface or chiasm.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder.")] = None,
    vision_only: Annotated[
        Path | None,
        typer.Option("--vision-only", help="New folder for the classifier of a run: no text, folded heads, ONNX."),
    ] = None,
    no_onnx: Annotated[bool, typer.Option("--no-onnx", help="With --vision-only: torch's form alone.")] = False,
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
    if vision_only is not None:
        if to is not None or out is not None or family is not None or activation is not None:
            raise typer.BadParameter("--vision-only goes with --no-onnx, --allow-code and --json alone")
        _vision_only(model, vision_only, onnx=not no_onnx, allow_code=allow_code, as_json=as_json)
        return
    if to is None or out is None:
        raise typer.BadParameter("give --to and --out, or --vision-only FOLDER")
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


def _vision_only(run_folder: str, out: Path, *, onnx: bool, allow_code: bool, as_json: bool) -> None:
    from chiasm.export_vision import export_vision_only

    export = export_vision_only(run_folder, out, onnx=onnx, allow_code=allow_code)
    if as_json:
        print_json(export.to_dict())
        return
    print(f"{export.name} is in {out}: {', '.join(export.files)}")
    for sentence in export.sentences():
        print(f"  {sentence}")
    print(f"  {export.use(str(out))}")
