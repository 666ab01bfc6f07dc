"""Embed a table, a folder or shards into a store on disk; a killed run goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from chiasm.cli.inputs import ColumnOption, RootOption
from chiasm.cli.output import (
    BatchOption,
    CodeOption,
    DeviceOption,
    FamilyOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    make_progress,
    print_json,
)


def run(
    source: Annotated[str, typer.Argument(help="Table, folder of images, shards ({000..012}.tar), or pcam:FOLDER.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the store.")],
    model: ModelOption = "",
    modality: Annotated[str, typer.Option("--modality", help="image, text or both.")] = "both",
    layout: Annotated[
        str, typer.Option("--layout", help="lance (a store) or clip-retrieval (npy + parquet).")
    ] = "lance",
    column: ColumnOption = None,
    root: RootOption = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with a store that exists.")] = True,
    on_bad: Annotated[str, typer.Option("--on-bad", help="skip (listed in rejected.jsonl) or fail.")] = "skip",
    batch_size: BatchOption = 32,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Threads that decode images; default: one a CPU.")
    ] = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stream, show progress, report counts."""
    from chiasm.cli.inputs import load_encoder, open_table
    from chiasm.embed import embed_to_store
    from chiasm.errors import InputError
    from chiasm.io.clip_retrieval import write_clip_retrieval
    from chiasm.io.store import open_store, stored_precision
    from chiasm.types import Modality

    kinds: dict[str, tuple[Modality, ...]] = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}
    if modality not in kinds:
        raise InputError(f"--modality must be image, text or both, got `{modality}`")
    if layout not in ("lance", "clip-retrieval"):
        raise InputError(f"--layout must be lance or clip-retrieval, got `{layout}`")
    if on_bad not in ("skip", "fail"):
        raise InputError(f"--on-bad must be skip or fail, got `{on_bad}`")
    bad: Literal["skip", "fail"] = "fail" if on_bad == "fail" else "skip"
    # What is not embedded need not be there: images without captions have vectors, too.
    require = None if modality == "both" else kinds[modality]
    dataset = open_table(source, columns=column, root=root, require=require, on_bad_row=bad)
    if precision == "auto":  # a store goes on as it began
        precision = stored_precision(out) or precision
    encoder = load_encoder(model, device=device, precision=precision, family=family, allow_code=allow_code)
    report = embed_to_store(
        encoder,
        dataset,
        out,
        modalities=kinds[modality],
        resume=resume,
        on_bad=bad,
        batch_size=batch_size,
        workers=workers,
        progress=make_progress(as_json, unit=""),
    )
    if layout == "clip-retrieval":
        write_clip_retrieval(open_store(out), out / "clip-retrieval")
    if as_json:
        print_json(report.to_dict())
    else:
        print(report.sentence())
