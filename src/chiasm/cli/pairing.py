"""Give every image the nearest reports of a corpus, without looking at labels."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, RootOption, SplitOption
from chiasm.cli.output import (
    BatchOption,
    CodeOption,
    DeviceOption,
    FamilyOption,
    JsonOption,
    PrecisionOption,
    SeedOption,
    make_progress,
    print_json,
)
from chiasm.errors import InputError
from chiasm.types import Sample

if TYPE_CHECKING:
    from chiasm.datasets.reports import ReportCorpus
    from chiasm.evaluate.pairing_scores import PairingScores
    from chiasm.io.manifest import RejectLog
    from chiasm.pairing import PairingRun

#: What ``--report-column`` can name, and how `open_reports` calls it.
REPORT_ROLES = {"text": "text", "id": "id", "tissue": "tissue_column", "patient": "patient"}

ImagesOption = Annotated[
    str, typer.Option("--images", "-i", help="Table, folder, shards, or a data set: `pcam:FOLDER`.")
]
ReportsOption = Annotated[
    str,
    typer.Option("--reports", "-r", help="TXT (one report a line), CSV, JSONL, Parquet, folder, or tcga:FOLDER."),
]
EncoderOption = Annotated[
    str, typer.Option("--encoder", "--model", "-m", help="A name from `chiasm models`, a model file or folder.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder of the pairs and their page.")]
TopOption = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Reports an image.")]
LeastOption = Annotated[
    str | None, typer.Option("--min-similarity", help="Least cosine of a pair, or `auto`; none by default.")
]
TissueOption = Annotated[str | None, typer.Option("--tissue", help="Keep reports of this tissue: colon, =colon.")]
FilterOption = Annotated[
    list[str] | None,
    typer.Option("--text-filter", help="Keep reports that contain this in any case; `re:PATTERN` for an expression."),
]
DropOption = Annotated[
    list[str] | None, typer.Option("--text-drop", help="Leave out reports that contain this; as --text-filter.")
]
WhereOption = Annotated[
    list[str] | None, typer.Option("--where", help="Keep rows of the corpus: COLUMN=PATTERN, COLUMN==WHOLE VALUE.")
]
ReportColumnOption = Annotated[
    list[str] | None,
    typer.Option("--report-column", help="What a column of the corpus is: text=REPORT, id=KEY, tissue=ORGAN."),
]
AggregateOption = Annotated[
    str, typer.Option("--aggregate", help="A report's similarity from its chunks: max, mean, top_mean.")
]
CorrectionOption = Annotated[str, typer.Option("--correction", help="Against hubs: none, csls, inverted_softmax.")]
OverlapOption = Annotated[
    int | None, typer.Option("--overlap", min=0, help="Tokens that chunks of a long report share.")
]
ExamplesOption = Annotated[
    int, typer.Option("--examples", min=0, help="Pairs shown on the page, with patients' texts; 0: none.")
]
AuditOption = Annotated[
    str | None, typer.Option("--audit-label", help="Compare the finished pairs with this label; never used to pair.")
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Folder of vectors, found again by content; OUT/cache by default.")
]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Threads that read images.")]


def run(
    images: ImagesOption,
    reports: ReportsOption,
    encoder: EncoderOption,
    out: OutOption,
    top_k: TopOption = 1,
    min_similarity: LeastOption = None,
    tissue: TissueOption = None,
    text_filter: FilterOption = None,
    text_drop: DropOption = None,
    where: WhereOption = None,
    report_column: ReportColumnOption = None,
    aggregate: AggregateOption = "max",
    correction: CorrectionOption = "none",
    overlap: OverlapOption = None,
    split: SplitOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    group: GroupOption = None,
    examples: ExamplesOption = 6,
    audit_label: AuditOption = None,
    cache: CacheOption = None,
    workers: WorkersOption = 2,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pair, write the pairs, and describe them on a page."""
    if out.exists() and not out.is_dir():  # said before hours of embedding, not after
        raise InputError(f"--out `{out.name}` is a file; pairs are a folder", hint="name another")
    least = _least(min_similarity)
    _check_choices(aggregate, correction)
    from chiasm.cli.inputs import load_encoder, open_table, say_rejected, select_rows
    from chiasm.evaluate.pairing_scores import score_pairing
    from chiasm.io.manifest import RejectLog
    from chiasm.pairing import pair_reports

    dataset = open_table(images, group=group, columns=column, root=root, require=("image",))
    samples = select_rows(dataset.samples, split)
    _check_audit(samples, audit_label)
    filters = {"keep": tuple(text_filter or ()), "drop": tuple(text_drop or ()), "where": tuple(where or ())}
    corpus = _corpus(reports, report_column, tissue=tissue, **filters)
    model = load_encoder(encoder, device=device, precision=precision, family=family, allow_code=allow_code)
    try:
        found = pair_reports(
            model,
            samples,
            corpus,
            k=top_k,
            aggregate=cast(Any, aggregate),
            correction=cast(Any, correction),
            min_similarity=least,
            overlap_tokens=overlap,
            cache=cache or out / "cache",
            batch_size=batch_size,
            workers=workers,
            progress=make_progress(as_json, unit="rows"),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from the vectors that are kept") from None
    scores = score_pairing(found, samples=samples, audit_label=audit_label, seed=seed)
    log = RejectLog([*dataset.rejected, *found.rejected])
    result = _write(out, found, scores, samples, log, examples)
    if as_json:
        print_json(result)
        return
    _say(found, scores, result["page"])
    say_rejected(log)


def _write(
    out: Path, found: PairingRun, scores: PairingScores, samples: Sequence[Sample], log: RejectLog, examples: int
) -> dict[str, Any]:
    """Write pairs, page and numbers, and return what ``--json`` prints."""
    from chiasm.evaluate.page import save_page
    from chiasm.evaluate.pairing_page import pairing_page
    from chiasm.io.manifest import RejectLog, write_json_atomic
    from chiasm.io.pairs import save_pairs

    save_pairs(out, found.pairs)
    for name, rejected in (("rejected.jsonl", log), ("rejected_reports.jsonl", RejectLog(found.corpus.rejected))):
        if len(rejected) or (out / name).exists():  # not that of an earlier run
            rejected.write(out / name)
    page = save_page(pairing_page(found, scores, samples, examples=examples, folder=out.name), out / "index.html")
    numbers = {
        **scores.to_dict(),
        "corpus": found.corpus.to_dict(),
        "header": found.pairs.header.to_dict(),
        "found_in_cache": found.found,
        "left_out": log.counts(),
    }
    write_json_atomic(out / "pairing.json", numbers)
    return {**numbers, "out": str(out), "page": str(page)}


def _least(text: str | None) -> float | Literal["auto"] | None:
    if text is None or text == "none":
        return None
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"--min-similarity must be a cosine or `auto`, got `{text}`", hint="for example --min-similarity 0.2"
        ) from None


def _check_choices(aggregate: str, correction: str) -> None:
    for option, value, known in (
        ("--aggregate", aggregate, ("max", "mean", "top_mean")),
        ("--correction", correction, ("none", "csls", "inverted_softmax")),
    ):
        if value not in known:
            raise InputError(f"{option} must be one of {', '.join(known)}, got `{value}`")


def _check_audit(samples: Sequence[Sample], label: str | None) -> None:
    """Miss a label column before hours of embedding, not after."""
    known = sorted({name for s in samples for name in s.labels})
    if label is not None and label not in known:
        raise InputError(f"the images have no label column `{label}`", hint=f"columns: {', '.join(known) or 'none'}")


def _corpus(source: str, columns: Sequence[str] | None, **filters: Any) -> ReportCorpus:
    from chiasm.datasets.report_sources import open_reports

    named: dict[str, Any] = {}
    for word in columns or ():
        role, separator, name = word.partition("=")
        if role not in REPORT_ROLES or not separator:
            raise InputError(
                f"--report-column must be ROLE=NAME, got `{word}`", hint=f"roles: {', '.join(REPORT_ROLES)}"
            )
        key = REPORT_ROLES[role]
        if key in named and role != "text":
            raise InputError(f"the {role} column of the corpus is named twice", hint="name one of them")
        named[key] = [*named[key], name] if key in named else [name] if role == "text" else name
    return open_reports(source, **filters, **named)


def _say(found: PairingRun, scores: PairingScores, page: str) -> None:
    from chiasm.io.manifest import summarize_rejected
    from chiasm.metrics.pairing import quantiles

    if found.corpus.rejected:
        print(f"warning: reports: {summarize_rejected(found.corpus.rejected)}", file=sys.stderr)
    for count in found.corpus.filters:
        print(f"filter {count}")
    least = "" if scores.min_similarity is None else f" (similarity of at least {scores.min_similarity:.4f})"
    print(f"{scores.paired} of {scores.images} images have a report{least}")
    medians = [quantiles(v)["p50"] for v in (scores.similarity, scores.random_similarity, scores.margin)]
    own, random, lead = (f"{m:.3f}" if math.isfinite(m) else "–" for m in medians)
    print(f"similarity: median {own}, of shuffled reports {random}; lead over the second report: median {lead}")
    print(
        f"{scores.hubness.used} of {scores.distinct_reports} reports are in use, one by {scores.hubness.max_load} images"
        f" (Gini {scores.hubness.gini:.2f}, at random {scores.random_hubness.gini:.2f})"
    )
    if scores.audit is not None:
        nmi = scores.audit.pairs.nmi
        print(
            f"audit: agreement with `{scores.audit.column}` {nmi.value:.3f}, by chance {nmi.chance:.3f}, "
            f"p = {scores.audit.pairs.p_value:.3f}"
        )
    print(f"page: {page}")
