"""Search images by text or image, or measure retrieval on a table of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.cli.inputs import DropTextOption, GroupOption, SplitOption, TableOption
from chiasm.cli.output import (
    BatchOption,
    CodeOption,
    DeviceOption,
    FamilyOption,
    JsonOption,
    ModelOption,
    SeedOption,
    make_progress,
    print_json,
    print_table,
)
from chiasm.errors import InputError

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder
    from chiasm.types import Embeddings


def run(
    query: Annotated[
        list[str] | None, typer.Argument(help="Texts or image files to search with; none: measure.")
    ] = None,
    model: ModelOption = "",
    table: TableOption = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Search what `chiasm embed` wrote instead of a table.")
    ] = None,
    split: SplitOption = None,
    group: GroupOption = None,
    drop_text: DropTextOption = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Answers per query.")] = 5,
    answers: Annotated[str, typer.Option("--answers", help="Search among: image, text.")] = "image",
    device: DeviceOption = "cpu",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search when there is a query; otherwise score both directions on the pairs."""
    from chiasm.cli.inputs import load_encoder, read_rows, without_texts
    from chiasm.embed import embed_images, embed_texts
    from chiasm.evaluate.search_scores import score_retrieval
    from chiasm.io.store import open_store
    from chiasm.tasks.retrieval import search

    if bool(table) == bool(store):
        raise InputError("give --table or --store, one of the two")
    if answers not in ("image", "text"):
        raise InputError(f"--answers must be image or text, got `{answers}`")
    encoder = load_encoder(model, device=device, family=family, allow_code=allow_code)
    progress = make_progress(as_json, unit="rows")

    def corpus(modality: str) -> Embeddings:
        if store is not None:
            return open_store(store).read("image" if modality == "image" else "text")
        rows = without_texts(read_rows(None, table, group=group, split=split).samples, drop_text)
        if modality == "image":
            return embed_images(encoder, rows, batch_size=batch_size, progress=progress)
        return embed_texts(encoder, rows, batch_size=batch_size, progress=progress)

    if query:
        found = search(_embed_queries(encoder, query), corpus(answers), k=top)
        if as_json:
            print_json(found.to_dict())
            return
        for i, text in enumerate(query):
            rows = [(r + 1, f"{s:.3f}", Path(n).name) for r, (n, s) in enumerate(found.answers(i))]
            print_table(("rank", "cosine", answers), rows, title=Path(text).name if Path(text).is_file() else text)
        return
    scores = score_retrieval(corpus("image"), corpus("text"), seed=seed)
    if as_json:
        print_json(scores.to_dict())
    else:
        print_table(("measure", "value [95 % interval]", "n", "chance"), scores.table())


def _embed_queries(encoder: Encoder, query: Sequence[str]) -> Embeddings:
    from chiasm.embed import embed_images, embed_texts
    from chiasm.types import Sample

    files = [Path(q).is_file() for q in query]
    if all(files):
        return embed_images(encoder, [Sample(id=q, image=Path(q)) for q in query], on_bad="fail")
    if any(files):
        raise InputError("queries must be all texts or all image files", hint="run the command once for each kind")
    return embed_texts(encoder, query)
