"""Let images in, turn them away or ask a person, by a policy of texts; with the evidence, and fitted where truth is known."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, ImagesArgument, RootOption, TableOption
from chiasm.cli.output import (
    BatchOption,
    CodeOption,
    DeviceOption,
    FamilyOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    SeedOption,
    check_output,
    make_progress,
    print_json,
    print_table,
)
from chiasm.cli.vectors import PageOption, StoreOption
from chiasm.errors import InputError

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder
    from chiasm.evaluate.moderation_scores import ModerationScores
    from chiasm.tasks.moderation import ModerationResult, Policy
    from chiasm.types import Embeddings

#: Images that are printed; ``--csv``, ``--jsonl`` and ``--json`` give all.
SHOWN_IMAGES = 20

PolicyOption = Annotated[Path, typer.Option("--policy", "-p", help="TOML: texts, thresholds and an action a category.")]
TruthOption = Annotated[
    str | None, typer.Option("--truth", help="Column of the category; `*`: a 0/1 column a category. Judges the policy.")
]
FitOption = Annotated[
    Path | None,
    typer.Option(
        "--fit", help="Fit thresholds on validation patients, write the policy to this file.", callback=check_output
    ),
]
SensitivityOption = Annotated[float, typer.Option("--sensitivity", help="With --fit: share of a category to find.")]
SpecificityOption = Annotated[
    float, typer.Option("--specificity", help="With --fit: share of others that a category with a review leaves alone.")
]
ConservativeOption = Annotated[
    bool, typer.Option("--conservative", help="Keep the expected sensitivity of new patients at what is asked.")
]
FitPartOption = Annotated[str | None, typer.Option("--fit-split", help="Split to fit on; val by default.")]
TestPartOption = Annotated[str | None, typer.Option("--test-split", help="Split to judge on; test by default.")]
ShareOption = Annotated[float, typer.Option("--fit-share", help="Without splits: share of the patients to fit on.")]
CsvOption = Annotated[
    Path | None, typer.Option("--csv", help="Write every decision with its deciding evidence.", callback=check_output)
]
JsonlOption = Annotated[
    Path | None, typer.Option("--jsonl", help="Write every decision with all evidence.", callback=check_output)
]
ExamplesOption = Annotated[
    int, typer.Option("--examples", min=0, help="Pictures of each decision on the page; 0: none.")
]
ResamplesOption = Annotated[int, typer.Option("--resamples", min=10, help="Of the bootstrap behind each interval.")]


def run(
    policy: PolicyOption,
    images: ImagesArgument = None,
    model: ModelOption = "",
    table: TableOption = None,
    store: StoreOption = None,
    truth: TruthOption = None,
    fit: FitOption = None,
    sensitivity: SensitivityOption = 0.95,
    specificity: SpecificityOption = 0.95,
    conservative: ConservativeOption = False,
    fit_split: FitPartOption = None,
    test_split: TestPartOption = None,
    fit_share: ShareOption = 0.5,
    csv: CsvOption = None,
    jsonl: JsonlOption = None,
    out: PageOption = None,
    examples: ExamplesOption = 0,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    resamples: ResamplesOption = 1000,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read the policy, embed, decide; fit and judge where the truth is named."""
    started = time.perf_counter()
    if fit is not None and truth is None:
        raise InputError("--fit chooses thresholds on labelled images", hint="name the column: --truth COLUMN")
    if truth is not None and images:
        raise InputError("`--truth` names a column, but images are given", hint="use --table or --store")
    from chiasm.cli.inputs import load_encoder
    from chiasm.embed import embed_texts
    from chiasm.tasks.moderation import embed_policy, moderate, read_policy

    wanted = read_policy(policy)  # a wrong policy is missed before a model is loaded
    encoder = load_encoder(model, device=device, precision=precision, family=family, allow_code=allow_code)
    options: dict[str, Any] = {
        "group": group,
        "column": column,
        "root": root,
        "batch_size": batch_size,
        "as_json": as_json,
    }
    embedded = _embed(encoder, images, table, store, options)
    if fit is not None:
        wanted = _unbound(wanted)
    result = moderate(embedded, embed_policy(wanted, lambda texts: embed_texts(encoder, texts)))
    columns = None if truth is None else _truth(embedded, truth, wanted)
    split, parts = None, None
    refused: dict[str, str] = {}
    judged = list(range(len(result)))
    if fit is not None and columns is not None:
        aims = {"sensitivity": sensitivity, "specificity": specificity, "conservative": conservative}
        chosen = (fit_split, test_split, fit_share, seed)
        result, judged, split, refused, parts = _fit(result, embedded, columns, fit, aims, chosen)
    scores = None if columns is None else _judge(result, columns, judged, resamples, seed)
    settings = {"policy": result.policy.digest, "resamples": resamples, "split": split}
    card = _card(embedded, result.policy, parts, settings, seed, time.perf_counter() - started)
    files = _write(result, csv, jsonl)
    if out is not None:
        files["page"] = _write_page(result, card, scores, columns, judged, examples, out)
    if as_json:
        print_json({"policy": result.policy.to_dict(), "counts": result.counts(), "images": result.to_records(),
                    "scores": None if scores is None else scores.to_dict(), "split": split, "refused": refused,
                    **files, "run_card": card.to_dict()})  # fmt: skip
        return
    _print(result, scores, split, refused, {**files, **({} if fit is None else {"policy": str(fit)})})


def _embed(
    encoder: Encoder,
    images: Sequence[Path] | None,
    table: Path | None,
    store: Path | None,
    options: dict[str, Any],
) -> Embeddings:
    from chiasm.cli.inputs import read_images, say_rejected
    from chiasm.cli.vectors import open_vectors
    from chiasm.embed import embed_images
    from chiasm.io.manifest import RejectLog

    if not images:
        return open_vectors(store=store, table=table, encoder=encoder, **options)
    if table is not None or store is not None:
        raise InputError("give images, --table or --store, one of the three", hint="leave the others out")
    rows = read_images(images, None)
    rejects = RejectLog(rows.rejected)
    found = embed_images(encoder, rows.samples, batch_size=options["batch_size"], rejects=rejects,
                         progress=make_progress(options["as_json"], unit="images"))  # fmt: skip
    say_rejected(rejects)
    return found


def _unbound(policy: Policy) -> Policy:
    """Return a policy whose earlier thresholds bind it to no model: they are about to be chosen anew."""
    import dataclasses

    return dataclasses.replace(policy, space=None)


def _truth(images: Embeddings, column: str, policy: Policy) -> dict[str, list[Any]]:
    """Return category -> 0, 1 or None an image, of the categories that the column names; others have no truth."""
    from chiasm.cli.inputs import truth_columns
    from chiasm.cli.vectors import label_column
    from chiasm.types import Sample

    if column != "*":
        label_column(images, column)
    samples = [
        Sample(id=i, labels={name: values[k] for name, values in images.labels.items()})
        for k, i in enumerate(images.ids)
    ]
    found: dict[str, list[Any]] = {}
    for name in policy.names:
        try:
            found[name] = list(truth_columns(samples, column, [name])[name])
        except InputError:
            continue
    if not found:
        raise InputError(
            f"no category of the policy occurs in the truth: {', '.join(policy.names)}",
            hint="name the categories as the column does; several of one image are joined by `|`",
        )
    return found


def _fit(
    result: ModerationResult,
    images: Embeddings,
    truth: Mapping[str, Sequence[Any]],
    out: Path,
    aims: Mapping[str, Any],
    chosen: tuple[str | None, str | None, float, int],
) -> tuple[ModerationResult, list[int], str, dict[str, str], list[str]]:
    """Fit on validation patients, write the policy, and return the result under it with the rows to judge by."""
    from chiasm.evaluate.moderation_scores import truth_of
    from chiasm.evaluate.run_card import digest_of_rows
    from chiasm.io.manifest import write_bytes_atomic
    from chiasm.tasks.moderation import fit_policy, policy_text, redecide, select_rows
    from chiasm.tasks.scored_rows import choose_parts

    fit_split, test_split, share, seed = chosen
    parts = images.labels.get("split") or (None,) * len(images)
    fitting, judging, split = choose_parts([None if p is None else str(p) for p in parts], images.groups, fit=fit_split,
                                           test=test_split, share=share, seed=seed)  # fmt: skip
    rows = [int(i) for i in fitting]
    made, refused = fit_policy(select_rows(result, rows), truth_of(truth, rows), data=digest_of_rows(images.select(rows)),
                               **aims)  # fmt: skip
    if len(refused) == len(result.policy.categories):
        raise InputError(f"no category could be fitted; the first: {next(iter(refused.values()))}",
                         hint="give more labelled images")  # fmt: skip
    write_bytes_atomic(out, policy_text(made).encode())
    place = [""] * len(result)
    for i in rows:
        place[i] = "fit"
    for i in judging:
        place[int(i)] = "test"
    return redecide(result, made), [int(i) for i in judging], split, refused, place


def _judge(
    result: ModerationResult, truth: Mapping[str, Sequence[Any]], rows: Sequence[int], resamples: int, seed: int
) -> ModerationScores:
    from chiasm.evaluate.moderation_scores import score_moderation, truth_of
    from chiasm.tasks.moderation import select_rows

    return score_moderation(select_rows(result, rows), truth_of(truth, rows), n_resamples=resamples, seed=seed)


def _card(
    images: Embeddings, policy: Policy, parts: Sequence[str] | None, settings: dict[str, Any], seed: int, seconds: float
) -> Any:
    from chiasm.evaluate.run_card import make_run_card

    return make_run_card("chiasm moderate", {"images": images}, seed=seed, split=parts, prompts=policy.texts,
                         settings=settings, seconds=seconds)  # fmt: skip


def _write(result: ModerationResult, csv: Path | None, jsonl: Path | None) -> dict[str, Any]:
    """Write decisions, and return where they lie."""
    from chiasm.io.manifest import to_json, write_bytes_atomic

    found = {}
    if csv is not None:
        import pandas as pd

        write_bytes_atomic(csv, pd.DataFrame(result.to_records(flat=True)).to_csv(index=False).encode())
        found["csv"] = str(csv)
    if jsonl is not None:
        write_bytes_atomic(jsonl, "".join(to_json(record) + "\n" for record in result.to_records()).encode())
        found["jsonl"] = str(jsonl)
    return found


def _write_page(
    result: ModerationResult,
    card: Any,
    scores: ModerationScores | None,
    truth: Mapping[str, Sequence[Any]] | None,
    rows: Sequence[int],
    examples: int,
    out: Path,
) -> str:
    from chiasm.evaluate.moderation_page import moderation_page
    from chiasm.evaluate.moderation_scores import truth_of
    from chiasm.evaluate.page import save_page
    from chiasm.tasks.moderation import select_rows

    shown = select_rows(result, rows)
    columns = None if truth is None else truth_of(truth, rows)
    return str(save_page(moderation_page(shown, card, scores=scores, truth=columns, examples=examples), out))


def _print(
    result: ModerationResult,
    scores: ModerationScores | None,
    split: str | None,
    refused: Mapping[str, str],
    files: Mapping[str, Any],
) -> None:
    records = result.to_records(flat=True)[:SHOWN_IMAGES]
    if scores is None:
        print_table(
            ("image", "decision", "because", "margin", "nearest text"),
            [(Path(str(r["id"])).name, r["decision"], r["because"] or "–", f"{r['margin']:+.3f}", r["text"])
             for r in records],
        )  # fmt: skip
        if len(records) < len(result):
            print(f"  ... {len(result) - len(records)} more; `--csv FILE` or `--json` gives all")
    else:
        print_table(
            ("category", "images", "others", "AUROC", "found", "others left alone"),
            [(c.category, c.positives, c.negatives, c.auroc, c.found, c.left_alone) for c in scores.categories],
        )
        chance = "–" if scores.wanted.chance is None else f"{scores.wanted.chance:.3f}"
        print(f"  right decisions, reviews left out: {scores.wanted}, always the commonest {chance}; "
              f"to review: {scores.reviewed}")  # fmt: skip
        if split is not None:
            print(f"  {split}")
    print("  " + ", ".join(f"{action}: {count}" for action, count in result.counts().items()))
    for name, reason in refused.items():
        print(f"  {name} keeps its threshold: {reason}")
    if result.policy.by_hand:
        print(f"warning: thresholds of {', '.join(result.policy.by_hand)} were fitted to nothing", file=sys.stderr)
    for what, where in files.items():
        print(f"{what}: {where}")
