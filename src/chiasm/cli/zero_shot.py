"""Classify images by sentences: one label an image, or any number with --multi; with --truth it scores itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.calibrate import print_records
from chiasm.cli.inputs import ColumnOption, GroupOption, ImagesArgument, RootOption, SplitOption, TableOption
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
from chiasm.errors import InputError

if TYPE_CHECKING:
    from chiasm.cli.protocol import Question
    from chiasm.evaluate.scores import ZeroShotScores
    from chiasm.io.manifest import RejectLog
    from chiasm.tasks.calibration_file import SavedCalibration
    from chiasm.tasks.zero_shot import ZeroShotResult
    from chiasm.types import Embeddings

LabelsOption = Annotated[str | None, typer.Option("--labels", help='Class names: "pneumonia, normal".')]
LabelsFileOption = Annotated[
    Path | None,
    typer.Option(
        "--labels-file",
        help="JSON, TXT or CSV with names, synonyms, templates or pairs; or the folder of `chiasm prompts tune --save`.",
    ),
]
TemplateOption = Annotated[
    str | None, typer.Option("--template", help='"a chest film showing {}", or a set of `chiasm prompts list`.')
]
ProtocolOption = Annotated[
    str | None, typer.Option("--protocol", help="A published protocol with its prompts; `list` lists them.")
]
VariantOption = Annotated[
    str, typer.Option("--variant", help="Of the protocol: published, corrected, or another of its own.")
]
ChooseOption = Annotated[
    str | None, typer.Option("--choose-on", help="Split whose slides choose the number of tiles (with --split).")
]
MultiOption = Annotated[
    bool, typer.Option("--multi", help="Any number of labels can be true (positive/negative pairs).")
]
TruthOption = Annotated[
    str | None,
    typer.Option("--truth", help="Column of the true class; `*`: a 0/1 column a label. Scores the result."),
]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="What `chiasm calibrate --save` wrote, with these prompts.")
]
CsvOption = Annotated[
    Path | None, typer.Option("--out", help="Write every row's probabilities to this CSV.", callback=check_output)
]

#: Images that are printed; `--out` and `--json` give all.
SHOWN_IMAGES = 20


def run(
    images: ImagesArgument = None,
    model: ModelOption = "",
    labels: LabelsOption = None,
    labels_file: LabelsFileOption = None,
    template: TemplateOption = None,
    protocol: ProtocolOption = None,
    variant: VariantOption = "published",
    choose_on: ChooseOption = None,
    multi: MultiOption = False,
    table: TableOption = None,
    split: SplitOption = None,
    truth: TruthOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    calibration: CalibrationOption = None,
    out: CsvOption = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed, classify, print; score when the truth is named."""
    from chiasm.cli import protocol as by_protocol
    from chiasm.cli.inputs import load_encoder, read_images, truth_columns
    from chiasm.embed import embed_images
    from chiasm.io.manifest import RejectLog, write_bytes_atomic

    if protocol == by_protocol.LIST:
        by_protocol.print_protocols(as_json)
        return
    question = by_protocol.read_question(
        protocol, variant, labels, labels_file, multi=multi, template=template, seed=seed
    )
    if truth is not None and table is None:
        raise InputError("`--truth` names a column, but no table was given", hint="add `--table t.csv`")
    saved = None if calibration is None else _read_calibration(calibration, question)
    rows = read_images(images, table, group=group, columns=column, root=root, split=split)
    units = by_protocol.slide_samples(rows.samples, truth or "") if question.pools else rows.samples
    if truth is not None:
        truth_columns(units, truth, question.prompts.names)  # a wrong column fails before the images are embedded
    if choose_on is not None:
        held = read_images(images, table, group=group, columns=column, root=root, split=choose_on).samples
        by_protocol.check_choice(question, held, rows.samples, truth)
    encoder = load_encoder(model, device=device, precision=precision, family=family, allow_code=allow_code)
    rejects = RejectLog(rows.rejected)
    embedded = embed_images(
        encoder, rows.samples, batch_size=batch_size, rejects=rejects, progress=make_progress(as_json, unit="images")
    )
    names = (model, family)
    results = by_protocol.answer(question, encoder, embedded, rows.samples, names=names, batch_size=batch_size)
    if choose_on is not None:
        options: dict[str, Any] = {"truth": truth, "batch_size": batch_size, "seed": seed}
        results = by_protocol.choose_tiles(question, encoder, results, held, choose_on, **options)
    calibrated = None if saved is None else _calibrated(saved, results, embedded)
    if out is not None:  # before the scoring, which may find the truth unusable
        write_bytes_atomic(out, _csv(results, calibrated).encode())
    scores = {} if truth is None else by_protocol.score_all(results, units, truth, seed)
    if as_json:
        about: dict[str, Any] = {"data": rows.name, "rejected": len(rejects), "reasons": rejects.counts()}
        about["precision"] = encoder.precision
        about |= {} if calibrated is None else {"calibrated": calibrated}
        documents = {j: _document(result, scores.get(j)) for j, result in results.items()}
        print_json(about | ({"by_tiles": documents} if question.pools else documents[0]))
        return
    _print_results(results, scores, rejects, calibrated, encoder.precision)


def _read_calibration(path: Path, question: Question) -> SavedCalibration:
    """Return a calibration, before a model is loaded; one of other labels is missed here, of another space later."""
    from chiasm.tasks.calibration_file import load_calibration

    if question.pools:
        raise InputError("--calibration is of images; this protocol classifies slides")
    saved = load_calibration(path)
    origin = saved.calibration.origin
    if (origin.labels, origin.mode) != (question.prompts.names, question.mode):
        raise InputError(
            f"the calibration is of {', '.join(origin.labels)} ({origin.mode}), the question of "
            f"{', '.join(question.prompts.names)} ({question.mode})",
            hint="use the labels and prompts that it was fitted with; --multi for labels of which several can be true",
        )
    return saved


def _calibrated(
    saved: SavedCalibration, results: dict[int, ZeroShotResult], images: Embeddings
) -> list[dict[str, Any]]:
    """Return calibrated probabilities and answers, one flat record an image."""
    import numpy as np

    from chiasm.tasks.scored_rows import rows_of

    result = results[0]
    return saved.records(rows_of(result, np.full(result.logits.shape, np.nan)), images)


def _print_results(
    results: dict[int, ZeroShotResult],
    scores: dict[int, ZeroShotScores],
    rejects: RejectLog,
    calibrated: list[dict[str, Any]] | None,
    precision: str,
) -> None:
    """Print the results, what is to be known of them, and their scores; under 0 stands the only one."""
    from chiasm.cli.inputs import say_rejected

    for j, result in results.items():
        if j:
            print(f"mean of the best {j} tiles")
        _print_result(result) if calibrated is None else print_records(calibrated)
        if j == list(results)[-1]:
            say_rejected(rejects)
            _print_protocol(result, precision)
        if j in scores:
            print()
            print_table(("measure", "value [95 % interval]", "n", "chance", "majority"), scores[j].table())


def _csv(results: dict[int, ZeroShotResult], calibrated: list[dict[str, Any]] | None) -> str:
    """Return the probabilities as CSV; those of several numbers of tiles below each other, with a column ``tiles``.

    With a calibration its probabilities and answers stand in their place.
    """
    import pandas as pd

    if calibrated is not None:
        return str(pd.DataFrame(calibrated).to_csv(index=False))
    frames = [r.to_frame() if j == 0 else r.to_frame().assign(tiles=j) for j, r in results.items()]
    return str(pd.concat(frames).to_csv(index=False))


def _document(result: ZeroShotResult, scores: ZeroShotScores | None) -> dict[str, Any]:
    return {**result.to_dict(), **({} if scores is None else {"scores": scores.to_dict()})}


def _print_protocol(result: ZeroShotResult, precision: str) -> None:
    """Print where and how the images were compared, and what to know of the protocol."""
    print(f"  space {result.space} in {precision}, logit scale {result.logit_scale:.2f} ({result.logit_scale_source})")
    if result.protocol is not None:
        print(f"  protocol {result.protocol}, variant {result.variant}")
        for note in result.notes:
            print(f"    - {note}")


def _print_result(result: ZeroShotResult) -> None:
    """Print the best labels of the first images."""
    shown = min(len(result), SHOWN_IMAGES)
    table_rows = []
    for i in range(shown):
        best = sorted(zip(result.labels, result.probabilities[i], strict=True), key=lambda x: -x[1])[:3]
        name = Path(result.ids[i]).name
        table_rows.append((name, *[f"{label} {p:.2f}" for label, p in best]))
    print_table(("image", *("best", "second", "third")[: min(3, len(result.labels))]), table_rows)
    if shown < len(result):
        print(f"  ... {len(result) - shown} more; `--out FILE.csv` or `--json` gives all")
