"""Search images by text or image, or measure retrieval on a table of pairs."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from chiasm.cli.inputs import (
    ColumnOption,
    DropTextOption,
    GroupOption,
    RootOption,
    SplitOption,
    TableOption,
    open_table,
    select_rows,
    without_texts,
)
from chiasm.cli.output import (
    BatchOption,
    CodeOption,
    DeviceOption,
    FamilyOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    SeedOption,
    make_progress,
    print_json,
    print_table,
)
from chiasm.cli.vectors import PageOption, StoreOption, open_vectors
from chiasm.errors import InputError
from chiasm.types import Sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.encoders.base import Encoder
    from chiasm.evaluate.probe_scores import ProbeScores
    from chiasm.io.manifest import RejectLog
    from chiasm.types import Embeddings


class Corpus(Protocol):
    """Rows of one side, ``image`` or ``text``."""

    def __call__(self, *, side: Any) -> Embeddings:
        """Return them."""
        ...


#: Letters of a text that the table of answers shows.
SHOWN_LETTERS = 70


def run(
    query: Annotated[
        list[str] | None, typer.Argument(help="Texts or image files to search with; none: measure.")
    ] = None,
    model: ModelOption = "",
    table: TableOption = None,
    store: StoreOption = None,
    split: SplitOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    drop_text: DropTextOption = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Answers per query.")] = 5,
    answers: Annotated[str, typer.Option("--answers", help="Search among: image, text.")] = "image",
    direction: Annotated[
        list[str] | None,
        typer.Option("--direction", help="What to measure: text-image, image-text, image-image, text-text, or all."),
    ] = None,
    same: Annotated[
        str, typer.Option("--same", help="What makes an answer right: pair, text, case; several with commas.")
    ] = "pair,text",
    relevant_by: Annotated[
        str | None,
        typer.Option(
            "--relevant-by", help="Label column that makes an answer right instead; several 0/1 columns with commas."
        ),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option("--exclude", help="What a query may not find: none, self, patient.")
    ] = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="Also: does the true sentence win over one with “no”, or a side, turned?")
    ] = False,
    probe_rules: Annotated[
        Path | None, typer.Option("--probe-rules", help="TOML file that says how sentences are turned.")
    ] = None,
    out: PageOption = None,
    examples: Annotated[int, typer.Option("--examples", min=0, help="Queries that the page shows with answers.")] = 0,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search when there is a query; otherwise score the directions of search."""
    from chiasm.cli.inputs import load_encoder
    from chiasm.io.manifest import RejectLog

    _check_search(table, store, answers, query or ())
    encoder = None
    if query or store is None or probes:  # a store can be measured without its model
        encoder = load_encoder(model, device=device, precision=precision, family=family, allow_code=allow_code)
    rejects = RejectLog()
    corpus: Corpus
    if store is not None:
        if drop_text:
            raise InputError(
                "--drop-text is for tables, not for a store", hint="give the table and --model in place of the store"
            )
        given: dict[str, Any] = {"split": split, "group": group, "column": column, "root": root, "encoder": encoder}
        corpus = partial(open_vectors, store=store, table=None, mapped=bool(query), **given)
    else:
        assert table is not None
        assert encoder is not None
        require = (answers,) if query else _sides(direction)
        dataset = open_table(table, group=group, columns=column, root=root, require=require)  # type: ignore[arg-type]
        rejects = RejectLog(dataset.rejected)
        samples = without_texts(select_rows(dataset.samples, split), drop_text)
        corpus = _embedded(encoder, samples, batch_size, as_json=as_json, rejects=rejects)
    if query:
        assert encoder is not None
        _search(encoder, query, corpus, answers, top=top, as_json=as_json, rejects=rejects)
        return
    wanted = Wanted(tuple(direction or ("all",)), same, relevant_by, exclude, seed, examples, probe_rules)
    prober = encoder if probes else None
    _measure(cache(lambda side: corpus(side=side)), wanted, out, prober, as_json=as_json, rejects=rejects)


@dataclass(frozen=True)
class Wanted:
    """What of the command line says how to measure."""

    directions: tuple[str, ...]
    same: str
    relevant_by: str | None
    exclude: str | None
    seed: int
    examples: int
    probe_rules: Path | None

    def settings(self) -> dict[str, Any]:
        """Return what can change a number."""
        kept = {"directions": ", ".join(self.directions), "exclude": self.exclude or "by direction"}
        if self.probe_rules is not None:
            kept["probe rules"] = hashlib.sha256(self.probe_rules.read_bytes()).hexdigest()[:12]
        return kept | ({"relevant by": self.relevant_by} if self.relevant_by else {"same": self.same})


def _sides(direction: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return what a row of a table must have: None asks for whatever the table has columns for."""
    words = {word for name in direction or () for word in name.replace("_to_", "-").split("-")}
    return tuple(sorted(words)) if len(words) == 1 and words <= {"image", "text"} else None


def _search(
    encoder: Encoder, query: Sequence[str], corpus: Corpus, answers: str, *, top: int, as_json: bool, rejects: RejectLog
) -> None:
    from chiasm.cli.inputs import say_rejected
    from chiasm.tasks.retrieval import search

    asked, searched = _embed_queries(encoder, query), corpus(side=answers)
    found = search(asked, searched, k=top)
    if as_json:
        used = {"query": asked.precision, "corpus": searched.precision}
        print_json({**found.to_dict(), "precision": used, "rejected": len(rejects), "reasons": rejects.counts()})
        return
    for i, words in enumerate(query):
        rows = [(k + 1, f"{score:.3f}", _shown(found.texts, i, k, name, answers)) for k, (name, score) in
                enumerate(found.answers(i))]  # fmt: skip
        print_table(("rank", "cosine", answers), rows, title=words)
    say_rejected(rejects)


def _measure(
    sides: Callable[[str], Embeddings],
    wanted: Wanted,
    out: Path | None,
    prober: Encoder | None,
    *,
    as_json: bool,
    rejects: RejectLog,
) -> None:
    from chiasm.cli.inputs import say_rejected
    from chiasm.evaluate.run_card import make_run_card
    from chiasm.evaluate.search_scores import DIRECTIONS, score_search

    began = time.monotonic()
    names: tuple[str, ...] = tuple(n.replace("-", "_to_") if "_to_" not in n else n for n in wanted.directions)
    if names == ("all",):
        names = tuple(DIRECTIONS)
        if wanted.relevant_by or "case" in wanted.same:  # images alone, or texts alone, can be measured
            names = tuple(n for n, pair in DIRECTIONS.items() if all(_has(sides, side) for side in pair)) or names[:1]
    scores = score_search(
        sides,
        directions=names,
        same=tuple(word.strip() for word in wanted.same.split(",")),
        relevant_by=tuple(word.strip() for word in (wanted.relevant_by or "").split(",") if word.strip()),
        exclude=wanted.exclude,
        seed=wanted.seed,
    )
    turned = None if prober is None else _probe(prober, sides, wanted)
    used = {side: sides(side) for side in dict.fromkeys(s for n in scores.directions for s in DIRECTIONS[n])}
    card = make_run_card(
        "chiasm retrieval", used, seed=wanted.seed, settings=wanted.settings(), seconds=time.monotonic() - began
    )
    if out is not None:
        from chiasm.evaluate.page import save_page
        from chiasm.evaluate.retrieval_page import make_retrieval_page

        save_page(make_retrieval_page(scores, sides, card, probes=turned, examples=wanted.examples), out)
    if as_json:
        counts = {"rejected": len(rejects), "reasons": rejects.counts()}
        more = {} if turned is None else {"probes": turned.to_dict()}
        print_json({**scores.to_dict(), **more, **counts, "run_card": card.to_dict()})
        return
    print_table(("measure", "value [95 % interval]", "n", "chance", "majority"), scores.table())
    if turned is not None:
        print_table(("probe", "true sentence wins", "n", "no image", "always one way"), turned.table())
    for name, reason in scores.left_out.items():
        print(f"note: {name.replace('_to_', ' → ')} was left out: {reason}", file=sys.stderr)
    say_rejected(rejects)
    if out is not None:
        print(f"page: {out}")


def _probe(encoder: Encoder, sides: Callable[[str], Embeddings], wanted: Wanted) -> ProbeScores:
    from chiasm.embed import embed_texts
    from chiasm.evaluate.probe_scores import score_probes
    from chiasm.tasks.contradictions import ContradictionRules, make_probes

    images = sides("image")
    texts = images.texts
    if texts is None or not any(texts):
        reports = sides("text")
        by_id = dict(zip(reports.ids, reports.texts or (), strict=False))
        texts = tuple(by_id.get(name) for name in images.ids)
    found = make_probes(texts, ContradictionRules.load(wanted.probe_rules))
    return score_probes(images, found, lambda sentences: embed_texts(encoder, list(sentences)), seed=wanted.seed)


def _has(sides: Callable[[str], Embeddings], side: str) -> bool:
    try:
        return len(sides(side)) > 0
    except InputError:
        return False


def _shown(texts: Sequence[Sequence[str | None]] | None, query: int, rank: int, name: str, side: str) -> str:
    """Return what a person sees of an answer: an image's file name, the beginning of a text."""
    text = texts[query][rank] if texts is not None and side == "text" else None
    if text is None:
        return Path(name).name
    plain = " ".join(text.split())
    return plain if len(plain) <= SHOWN_LETTERS else plain[: SHOWN_LETTERS - 1] + "…"


def _embedded(
    encoder: Encoder, samples: Sequence[Sample], batch_size: int, *, as_json: bool, rejects: RejectLog
) -> Corpus:
    from chiasm.embed import embed_images, embed_texts

    def corpus(*, side: Any) -> Embeddings:
        progress = make_progress(as_json, unit="rows")
        if side == "image":
            return embed_images(encoder, samples, batch_size=batch_size, rejects=rejects, progress=progress)
        return embed_texts(encoder, samples, batch_size=batch_size, rejects=rejects, progress=progress)

    return corpus


def _check_search(table: Path | None, store: Path | None, answers: str, query: Sequence[str]) -> None:
    from chiasm.cli.inputs import is_file
    from chiasm.datasets.folder import IMAGE_SUFFIXES

    if bool(table) == bool(store):
        raise InputError("give --table or --store, one of the two", hint="`chiasm embed` makes a store of a table")
    if answers not in ("image", "text"):
        raise InputError(f"--answers must be image or text, got `{answers}`", hint="--answers image")
    if not all(q.strip() for q in query):
        raise InputError("a query is empty", hint="write what to look for, or leave it out to measure")
    for name in query:  # a mistyped file must not be searched for as words
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not is_file(name):
            raise InputError(f"image `{Path(name).name}` does not exist", hint="check the path")


def _embed_queries(encoder: Encoder, query: Sequence[str]) -> Embeddings:
    from chiasm.cli.inputs import is_file
    from chiasm.embed import embed_images, embed_texts

    files = [is_file(q) for q in query]
    if all(files):
        return embed_images(encoder, [Sample(id=q, image=Path(q)) for q in query], on_bad="fail")
    if any(files):
        raise InputError("queries must be all texts or all image files", hint="run the command once for each kind")
    return embed_texts(encoder, query)
