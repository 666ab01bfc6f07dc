"""Search images by text or image, or measure retrieval on a table of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from chiasm.cli.inputs import ColumnOption, DropTextOption, GroupOption, RootOption, SplitOption, TableOption
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
from chiasm.types import Sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.encoders.base import Encoder
    from chiasm.io.manifest import RejectLog
    from chiasm.types import Embeddings

    Corpus = Callable[[Literal["image", "text"]], Embeddings]

#: Letters of a text that the table of answers shows.
SHOWN_LETTERS = 70


def run(
    query: Annotated[
        list[str] | None, typer.Argument(help="Texts or image files to search with; none: measure.")
    ] = None,
    model: ModelOption = "",
    table: TableOption = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Search what `chiasm embed` or clip-retrieval wrote.")
    ] = None,
    split: SplitOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
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
    from chiasm.cli.inputs import load_encoder, open_table, say_rejected, select_rows, without_texts
    from chiasm.evaluate.search_scores import score_retrieval
    from chiasm.io.manifest import RejectLog
    from chiasm.tasks.retrieval import search

    if bool(table) == bool(store):
        raise InputError("give --table or --store, one of the two", hint="`chiasm embed` makes a store of a table")
    if store is not None and (split or group or column or root or drop_text):
        raise InputError("--split, --group, --column, --root and --drop-text are for tables, not for a store")
    if answers not in ("image", "text"):
        raise InputError(f"--answers must be image or text, got `{answers}`")
    side: Literal["image", "text"] = "image" if answers == "image" else "text"
    if not all(q.strip() for q in query or ()):
        raise InputError("a query is empty", hint="write what to look for, or leave it out to measure")
    rejects = RejectLog()
    encoder = None
    if query or store is None:  # a store can be measured without its model
        encoder = load_encoder(model, device=device, family=family, allow_code=allow_code)
    corpus: Corpus
    if store is not None:
        corpus = _stored(store, encoder)
    else:
        assert table is not None
        assert encoder is not None
        dataset = open_table(table, group=group, columns=column, root=root, require=(side,) if query else None)
        rejects = RejectLog(dataset.rejected)
        samples = without_texts(select_rows(dataset.samples, split), drop_text)
        corpus = _embedded(encoder, samples, batch_size, as_json=as_json, rejects=rejects)
    if query:
        assert encoder is not None
        found = search(_embed_queries(encoder, query), corpus(side), k=top)
        if as_json:
            print_json({**found.to_dict(), "rejected": len(rejects), "reasons": rejects.counts()})
            return
        for i, words in enumerate(query):
            rows = [(k + 1, f"{score:.3f}", _shown(found.texts, i, k, name, side)) for k, (name, score) in
                    enumerate(found.answers(i))]  # fmt: skip
            print_table(("rank", "cosine", side), rows, title=words)
        say_rejected(rejects)
        return
    scores = score_retrieval(corpus("image"), corpus("text"), seed=seed)
    if as_json:
        print_json({**scores.to_dict(), "rejected": len(rejects), "reasons": rejects.counts()})
    else:
        print_table(("measure", "value [95 % interval]", "n", "chance", "majority"), scores.table())
        say_rejected(rejects)


def _shown(texts: Sequence[Sequence[str | None]] | None, query: int, rank: int, name: str, side: str) -> str:
    """Return what a person sees of an answer: an image's file name, the beginning of a text."""
    text = texts[query][rank] if texts is not None and side == "text" else None
    if text is None:
        return Path(name).name
    plain = " ".join(text.split())
    return plain if len(plain) <= SHOWN_LETTERS else plain[: SHOWN_LETTERS - 1] + "…"


def _stored(store: Path, encoder: Encoder | None) -> Corpus:
    from chiasm.io.clip_retrieval import is_clip_retrieval, read_clip_retrieval
    from chiasm.io.store import open_store

    def corpus(side: Literal["image", "text"]) -> Embeddings:
        found: Embeddings | None
        if is_clip_retrieval(store):
            # Such a folder may not say who made it: then it is taken as the model's.
            folder = read_clip_retrieval(store, space=None if encoder is None else encoder.space)
            found = folder.images if side == "image" else folder.texts
        else:
            found = open_store(store).read(side)
        if found is None or not len(found):
            raise InputError(
                f"store `{store.name}` holds no {side}s", hint=f"add them: `chiasm embed --modality {side}`"
            )
        return found

    return corpus


def _embedded(
    encoder: Encoder, samples: Sequence[Sample], batch_size: int, *, as_json: bool, rejects: RejectLog
) -> Corpus:
    from chiasm.embed import embed_images, embed_texts

    def corpus(side: Literal["image", "text"]) -> Embeddings:
        progress = make_progress(as_json, unit="rows")
        if side == "image":
            return embed_images(encoder, samples, batch_size=batch_size, rejects=rejects, progress=progress)
        return embed_texts(encoder, samples, batch_size=batch_size, rejects=rejects, progress=progress)

    return corpus


def _embed_queries(encoder: Encoder, query: Sequence[str]) -> Embeddings:
    from chiasm.cli.inputs import is_file
    from chiasm.embed import embed_images, embed_texts

    files = [is_file(q) for q in query]
    if all(files):
        return embed_images(encoder, [Sample(id=q, image=Path(q)) for q in query], on_bad="fail")
    if any(files):
        raise InputError("queries must be all texts or all image files", hint="run the command once for each kind")
    return embed_texts(encoder, query)
