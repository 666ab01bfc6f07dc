"""Classify images by sentences: one label an image, or any number with --multi; with --truth it scores itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, ImagesArgument, RootOption, SplitOption, TableOption
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
    from chiasm.tasks.zero_shot import ZeroShotResult

#: Images that are printed; `--out` and `--json` give all.
SHOWN_IMAGES = 20


def run(
    images: ImagesArgument = None,
    model: ModelOption = "",
    labels: Annotated[str | None, typer.Option("--labels", help='Class names: "pneumonia, normal".')] = None,
    labels_file: Annotated[
        Path | None, typer.Option("--labels-file", help="JSON, TXT or CSV with names, synonyms, templates or pairs.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help='"a chest film showing {}", or chest, histology, ct-mr, general.')
    ] = None,
    multi: Annotated[
        bool, typer.Option("--multi", help="Any number of labels can be true (positive/negative pairs).")
    ] = False,
    table: TableOption = None,
    split: SplitOption = None,
    truth: Annotated[
        str | None,
        typer.Option("--truth", help="Column of the true class; `*`: a 0/1 column a label. Scores the result."),
    ] = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write every row's probabilities to this CSV.")] = None,
    device: DeviceOption = "cpu",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed, classify, print; score when the truth is named."""
    from chiasm.cli.inputs import load_encoder, read_images, read_prompts, say_rejected, truth_columns
    from chiasm.embed import embed_images, embed_texts
    from chiasm.evaluate.scores import score_zero_shot
    from chiasm.io.manifest import RejectLog, write_bytes_atomic
    from chiasm.tasks.zero_shot import build_classifier, classify

    prompts = read_prompts(labels, labels_file, pairs=multi, template=template)
    if len(prompts.labels) < 2 and not multi:
        raise InputError(
            f"`{prompts.names[0]}` is the only label, so it would always get probability 1",
            hint="name two labels or more, or ask for yes and no with `--multi`",
        )
    if truth is not None and table is None:
        raise InputError("`--truth` names a column, but no table was given", hint="add `--table t.csv`")
    rows = read_images(images, table, group=group, columns=column, root=root, split=split)
    if truth is not None:
        truth_columns(rows.samples, truth, prompts.names)  # a wrong column fails before the images are embedded
    encoder = load_encoder(model, device=device, family=family, allow_code=allow_code)
    classifier = build_classifier(prompts, partial(embed_texts, encoder))
    rejects = RejectLog(rows.rejected)
    embedded = embed_images(
        encoder, rows.samples, batch_size=batch_size, rejects=rejects, progress=make_progress(as_json, unit="images")
    )
    result = classify(embedded, classifier, mode="multi" if multi else "single")
    if out is not None:  # before the scoring, which may find the truth unusable
        write_bytes_atomic(out, result.to_frame().to_csv(index=False).encode())
    scores = None
    if truth is not None:
        kept = {s.id: s for s in rows.samples}
        columns = truth_columns([kept[i] for i in result.ids], truth, prompts.names)
        scores = score_zero_shot(result, columns, seed=seed)
    if as_json:
        document = {"data": rows.name, "rejected": len(rejects), "reasons": rejects.counts(), **result.to_dict()}
        if scores is not None:
            document["scores"] = scores.to_dict()
        print_json(document)
        return
    _print_result(result)
    say_rejected(rejects)
    print(f"  space {result.space}, logit scale {result.logit_scale:.2f} ({result.logit_scale_source})")
    if scores is not None:
        print()
        print_table(("measure", "value [95 % interval]", "n", "chance", "majority"), scores.table())


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
