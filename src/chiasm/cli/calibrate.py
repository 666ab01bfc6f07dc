"""Make scores believable: calibrate, choose thresholds and "cannot tell" on validation patients, judge on test patients."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, RootOption, TableOption
from chiasm.cli.output import (
    BatchOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    SeedOption,
    check_output,
    print_json,
    print_table,
)
from chiasm.cli.vectors import PageOption, StoreOption
from chiasm.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from chiasm.evaluate.calibration_scores import CalibrationScores, DomainScores
    from chiasm.evaluate.run_card import RunCard
    from chiasm.tasks.calibrated import Calibration
    from chiasm.tasks.calibration_file import SavedCalibration
    from chiasm.tasks.domain import DomainReference
    from chiasm.tasks.scored_rows import ScoredRows
    from chiasm.types import Embeddings

#: Rows that ``--apply`` prints; ``--csv`` and ``--json`` give all.
SHOWN_ROWS = 20

ScoresOption = Annotated[
    Path | None, typer.Option("--scores", help="CSV, Parquet or JSON of scores: truth, `score LABEL` ..., patient.")
]
LabelsOption = Annotated[str | None, typer.Option("--labels", help='Class names: "pneumonia, normal".')]
LabelsFileOption = Annotated[Path | None, typer.Option("--labels-file", help="Prompts, as for `chiasm zero-shot`.")]
TemplateOption = Annotated[str | None, typer.Option("--template", help="As for `chiasm zero-shot`.")]
MultiOption = Annotated[bool, typer.Option("--multi", help="Any number of labels can be true.")]
TruthOption = Annotated[str, typer.Option("--truth", help="Column of the true class; `*`: a 0/1 column a label.")]
FitPartOption = Annotated[str | None, typer.Option("--fit-split", help="Split to fit on; val by default.")]
TestPartOption = Annotated[str | None, typer.Option("--test-split", help="Split to judge on; test by default.")]
ShareOption = Annotated[
    float, typer.Option("--fit-share", help="Without splits: share of the patients to fit on, drawn by patient.")
]
MethodOption = Annotated[str, typer.Option("--method", help="platt, temperature, isotonic, or auto.")]
SensitivityOption = Annotated[float, typer.Option("--sensitivity", help="Of the threshold and of a band's lower end.")]
SpecificityOption = Annotated[float, typer.Option("--specificity", help="Of a band's upper end.")]
ConservativeOption = Annotated[
    bool, typer.Option("--conservative", help="Keep the expected sensitivity of new patients at what is asked.")
]
CoverageOption = Annotated[float, typer.Option("--coverage", help="Of the prediction sets.")]
ByClassOption = Annotated[
    bool | None,
    typer.Option("--by-class/--overall", help="Coverage for each class by itself; labels: yes, classes: no."),
]
InDomainOption = Annotated[
    list[Path] | None,
    typer.Option("--in-domain", help="Store of images of the kind, for the out-of-domain score; once a hospital."),
]
ForeignOption = Annotated[
    list[Path] | None, typer.Option("--out-of-domain", help="Store of images of other kinds, to judge that score by.")
]
DomainMethodOption = Annotated[str, typer.Option("--domain-method", help="mahalanobis or knn.")]
AlarmsOption = Annotated[float, typer.Option("--false-alarms", help="Share of images of the kind it may turn away.")]
SaveOption = Annotated[
    Path | None, typer.Option("--save", help="Write the calibration to this JSON file.", callback=check_output)
]
ApplyOption = Annotated[Path | None, typer.Option("--apply", help="Use this calibration instead of fitting one.")]
CsvOption = Annotated[
    Path | None,
    typer.Option("--csv", help="With --apply: write every row's answers to this file.", callback=check_output),
]
ResamplesOption = Annotated[int, typer.Option("--resamples", min=10, help="Of the bootstrap behind each interval.")]


@dataclass(frozen=True)
class Source:
    """Where scores come from, as the command line says it."""

    scores: Path | None
    store: Path | None
    table: Path | None
    model: str
    labels: str | None
    labels_file: Path | None
    template: str | None
    multi: bool
    truth: str
    group: str | None
    column: Sequence[str] | None
    root: Path | None
    device: str
    precision: str
    batch_size: int
    as_json: bool


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores, read or computed, with what they were computed from."""

    rows: ScoredRows
    parts: tuple[str | None, ...]
    has_patients: bool
    images: Embeddings | None
    prompts: tuple[str, ...] | None


def run(
    scores: ScoresOption = None,
    store: StoreOption = None,
    table: TableOption = None,
    model: ModelOption = "",
    labels: LabelsOption = None,
    labels_file: LabelsFileOption = None,
    template: TemplateOption = None,
    multi: MultiOption = False,
    truth: TruthOption = "truth",
    fit_split: FitPartOption = None,
    test_split: TestPartOption = None,
    fit_share: ShareOption = 0.5,
    method: MethodOption = "auto",
    sensitivity: SensitivityOption = 0.95,
    specificity: SpecificityOption = 0.95,
    conservative: ConservativeOption = False,
    coverage: CoverageOption = 0.9,
    by_class: ByClassOption = None,
    in_domain: InDomainOption = None,
    out_of_domain: ForeignOption = None,
    domain_method: DomainMethodOption = "mahalanobis",
    false_alarms: AlarmsOption = 0.05,
    save: SaveOption = None,
    apply: ApplyOption = None,
    csv: CsvOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    resamples: ResamplesOption = 1000,
    out: PageOption = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score, split by patient, fit, judge, save; or apply what was saved."""
    started = time.perf_counter()
    source = Source(scores, store, table, model, labels, labels_file, template, multi, truth, group, column, root, device, precision,
                    batch_size, as_json)  # fmt: skip
    _check_source(source, csv, apply)
    if apply is not None:
        _apply(apply, source, csv)
        return
    if out_of_domain and not in_domain:
        raise InputError("--out-of-domain needs images of the kind to compare with", hint="add --in-domain STORE")
    from chiasm.evaluate.calibration_scores import score_calibration
    from chiasm.tasks.calibrated import CalibrationPlan, fit_calibration
    from chiasm.tasks.scored_rows import choose_parts

    plan = CalibrationPlan(cast(Any, method), sensitivity, specificity, conservative, coverage, by_class, seed=seed)
    scored = _score(source)
    fitting, judging, split = choose_parts(scored.parts, scored.rows.groups, fit=fit_split, test=test_split,
                                           share=fit_share, seed=seed)  # fmt: skip
    calibration = fit_calibration(scored.rows.select(fitting), plan)
    found = score_calibration(calibration, scored.rows.select(judging), n_resamples=resamples, seed=seed)
    if not scored.has_patients:
        found = replace(found, notes=("there is no column of patients: each row counts as a patient", *found.notes))
    domain: DomainReference | None = None
    if in_domain:
        domain, judged = _domain(scored, in_domain, out_of_domain, domain_method, false_alarms, group, resamples, seed)
        found = _with_domain(found, judged)
    settings = {**plan.to_dict(), "split": split, "resamples": resamples}
    card = _card(scored, (fitting, judging), settings, seed, time.perf_counter() - started)
    files = _write(calibration, found, card, domain, save, out)
    if as_json:
        print_json({"calibration": calibration.to_dict(), "scores": found.to_dict(), "split": split, **files,
                    "run_card": card.to_dict()})  # fmt: skip
        return
    _print(calibration, found, split, files)


def _check_source(source: Source, csv: Path | None, apply: Path | None) -> None:
    given = [source.scores is not None, source.store is not None, source.table is not None]
    if sum(given) != 1:
        raise InputError("give --scores, --table or --store, one of the three",
                         hint="--scores FILE, or --table t.csv --model M --labels-file PROMPTS")  # fmt: skip
    if source.scores is not None and (source.model or source.labels_file):
        raise InputError(
            "--model and --labels-file make scores; --scores has them already", hint="leave one of them out"
        )
    if csv is not None and apply is None:
        raise InputError("--csv belongs to --apply", hint="--out PAGE.html or --json show what was fitted")


def _score(source: Source, *, with_truth: bool = True, saved: SavedCalibration | None = None) -> Scored:
    if source.scores is not None:
        from chiasm.evaluate.score_table import read_score_table

        names = [n.strip() for n in source.labels.split(",") if n.strip()] if source.labels else None
        options: dict[str, Any] = {"multi": True if source.multi else None}
        if saved is not None:
            origin = saved.calibration.origin
            names = names or list(origin.labels)
            options = {"multi": origin.mode == "multi", "kind": origin.activation}
        truth = source.truth if with_truth else None
        found = read_score_table(source.scores, labels=names, truth=truth, patient=source.group, **options)
        return Scored(found.rows, found.parts, found.has_patients, None, None)
    return _zero_shot(source, with_truth)


def _zero_shot(source: Source, with_truth: bool) -> Scored:
    import numpy as np

    from chiasm.cli.inputs import load_encoder, read_prompts, truth_columns
    from chiasm.cli.vectors import open_vectors
    from chiasm.embed import embed_texts
    from chiasm.metrics.labels import as_binary
    from chiasm.tasks.scored_rows import rows_of
    from chiasm.tasks.zero_shot import build_classifier, classify
    from chiasm.types import Sample

    prompts = read_prompts(source.labels, source.labels_file, pairs=source.multi, template=source.template)
    encoder = load_encoder(
        source.model, device=source.device, precision=source.precision, family=None, allow_code=False
    )
    images = open_vectors(
        store=source.store, table=source.table, model=source.model, group=source.group, column=source.column,
        root=source.root, batch_size=source.batch_size, device=source.device, as_json=source.as_json, encoder=encoder,
    )  # fmt: skip
    truth = np.full((len(images), len(prompts.names)), np.nan)
    if with_truth:
        rows = [
            Sample(id=i, labels={name: values[k] for name, values in images.labels.items()})
            for k, i in enumerate(images.ids)
        ]
        columns = truth_columns(rows, source.truth, prompts.names)
        truth = np.stack([as_binary(list(columns[name])) for name in prompts.names], axis=1)
    classifier = build_classifier(prompts, lambda texts: embed_texts(encoder, texts))
    mode: Literal["single", "multi"] = "multi" if source.multi else "single"
    result = classify(images, classifier, mode=mode)
    parts = images.labels.get("split")
    return Scored(
        rows_of(result, truth),
        tuple(None if p is None else str(p) for p in parts) if parts else (None,) * len(images),
        images.patients is not None and any(p is not None for p in images.patients),
        images,
        tuple(prompts.texts()),
    )


def _domain(
    scored: Scored,
    in_domain: Sequence[Path],
    out_of_domain: Sequence[Path] | None,
    method: str,
    false_alarms: float,
    group: str | None,
    resamples: int,
    seed: int,
) -> tuple[DomainReference, DomainScores]:
    """Return the reference and what it is worth: three fifths of the patients make it, a fifth each sets and judges."""
    import numpy as np

    from chiasm.evaluate.calibration_scores import score_domain
    from chiasm.tasks.domain import fit_domain
    from chiasm.tasks.scored_rows import deal_patients
    from chiasm.types import check_same_space

    if scored.images is None:
        raise InputError("an out-of-domain score needs embeddings; scores from a table have none",
                         hint="use --table or --store with --model")  # fmt: skip
    kind = _read_stores(in_domain, group)
    check_same_space(scored.images, kind)
    foreign = _read_stores(out_of_domain, None) if out_of_domain else None
    held = deal_patients(kind.groups, 0.4, seed=seed)
    rest = kind.select(held)
    judged = deal_patients(rest.groups, 0.5, seed=seed + 1)
    reference = fit_domain(kind.select(~held), rest.select(np.flatnonzero(~judged)), method=cast(Any, method),
                           false_alarms=false_alarms)  # fmt: skip
    options: dict[str, Any] = {"n_resamples": resamples, "seed": seed}
    return reference, score_domain(reference, rest.select(judged), foreign, **options)


def _read_stores(stores: Sequence[Path], group: str | None) -> Embeddings:
    """Return the images of several stores; equal names of patients in two stores are two patients."""
    import dataclasses

    import numpy as np

    from chiasm.cli.vectors import open_vectors
    from chiasm.types import check_same_space

    found = [open_vectors(store=store, table=None, group=group) for store in stores]
    check_same_space(*found)
    if len(found) == 1:
        return found[0]
    return dataclasses.replace(
        found[0],
        vectors=np.concatenate([e.normalize().vectors for e in found]),
        normalized=True,
        ids=tuple(f"{k} {i}" for k, e in enumerate(found) for i in e.ids),
        patients=tuple(f"{k} {g}" for k, e in enumerate(found) for g in e.groups),
        texts=None,
        paths=None,
        labels={},
    )


def _with_domain(scores: CalibrationScores, domain: DomainScores) -> CalibrationScores:
    import dataclasses

    return dataclasses.replace(scores, domain=domain)


def _card(
    scored: Scored, parts: Sequence[NDArray[np.intp]], settings: dict[str, Any], seed: int, seconds: float
) -> RunCard:
    from chiasm.evaluate.run_card import RunCard, make_run_card, package_versions
    from chiasm.types import digest_of

    place = [""] * len(scored.rows)
    for name, part in zip(("fit", "test"), parts, strict=True):
        for i in part:
            place[int(i)] = name
    command = "chiasm calibrate"
    if scored.images is not None:
        return make_run_card(command, {"images": scored.images}, seed=seed, split=place, prompts=scored.prompts,
                             settings=settings, seconds=seconds)  # fmt: skip
    rows = scored.rows
    data = digest_of([rows.ids, rows.groups, rows.scores.tolist(), [[str(v) for v in r] for r in rows.truth.tolist()]])
    return RunCard(command, {"scores": data}, {"scores": len(rows)}, "a table of scores", seed, digest_of(place), None,
                   settings, seconds, package_versions())  # fmt: skip


def _write(
    calibration: Calibration,
    scores: CalibrationScores,
    card: RunCard,
    domain: DomainReference | None,
    save: Path | None,
    out: Path | None,
) -> dict[str, Any]:
    """Write the calibration and the page, and return where they lie."""
    found: dict[str, Any] = {}
    if save is not None:
        from chiasm.tasks.calibration_file import save_calibration

        found["saved"] = [str(p) for p in save_calibration(save, calibration, domain)]
    if out is not None:
        from chiasm.evaluate.calibration_page import calibration_page
        from chiasm.evaluate.page import save_page

        page = calibration_page(calibration, scores, card, file=None if save is None else save.name)
        found["page"] = str(save_page(page, out))
    return found


def _print(calibration: Calibration, scores: CalibrationScores, split: str, files: dict[str, Any]) -> None:
    from chiasm.evaluate.calibration_page import summary_rows

    plan = calibration.plan
    print_table(
        ("label", "AUROC", "ECE before", "ECE after", "Brier after", f"sensitivity ({plan.sensitivity:.2f} asked)",
         "specificity", f"coverage ({plan.coverage:.2f})", "cannot tell"),
        summary_rows(scores),
    )  # fmt: skip
    fitted = calibration.patients
    print(f"  {split}: {fitted['probabilities']} patients fitted probabilities, {fitted['sets']} others the sets, "
          f"{scores.patients} judge")  # fmt: skip
    for label, reason in scores.refused.items():
        print(f"  {label}: {reason}")
    for note in scores.notes:
        print(f"  {note}")
    if scores.domain is not None:
        print(f"  images of the kind turned away: {scores.domain.false_alarms}")
        if scores.domain.auroc is not None:
            print(f"  foreign images turned away: {scores.domain.caught}, AUROC {scores.domain.auroc}")
    for what, where in files.items():
        print(f"{what}: {', '.join(where) if isinstance(where, list) else where}")


def _apply(path: Path, source: Source, csv: Path | None) -> None:
    from chiasm.tasks.calibration_file import load_calibration

    saved = load_calibration(path)
    scored = _score(source, with_truth=False, saved=saved)
    records = saved.records(scored.rows, scored.images)
    if csv is not None:
        write_records(csv, records)
    if source.as_json:
        print_json({"rows": records, "out_of_domain_score": saved.domain is not None and scored.images is not None})
        return
    print_records(records)


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write flat records as CSV."""
    import pandas as pd

    from chiasm.io.manifest import write_bytes_atomic

    write_bytes_atomic(path, pd.DataFrame(list(records)).to_csv(index=False).encode())


def print_records(records: Sequence[dict[str, Any]]) -> None:
    """Print calibrated probabilities and answers of the first rows."""
    shown = records[:SHOWN_ROWS]
    labels = [key.partition(" ")[2] for key in (shown[0] if shown else {}) if key.startswith("probability ")]

    def cell(record: dict[str, Any], label: str) -> str:
        p = record[f"probability {label}"]
        return "–" if p is None else f"{p:.2f} {record.get(f'answer {label}', '')}".strip()

    rows = [[Path(str(r["id"])).name, *(cell(r, label) for label in labels)] for r in shown]
    extra = [key for key in ("answer", "out of domain") if shown and key in shown[0]]
    for row, record in zip(rows, shown, strict=True):
        row += [{True: "yes", False: "no"}.get(record[key], str(record[key])) for key in extra]
    print_table(("image", *labels, *extra), rows)
    if len(records) > len(shown):
        print(f"  ... {len(records) - len(shown)} more; `--csv FILE` or `--json` gives all")
