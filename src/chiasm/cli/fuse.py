"""Classify from images, texts and clinical columns together, and tell whether that beats each alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, RootOption, SplitOption, TableOption
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
from chiasm.cli.vectors import LabelOption, PageOption, StoreOption
from chiasm.errors import InputError

if TYPE_CHECKING:
    from chiasm.evaluate.fusion_scores import FusionScores
    from chiasm.types import Embeddings

MODALITIES = ("image", "text", "clinical")

UseOption = Annotated[str, typer.Option("--use", help="Modalities, by comma: image, text, clinical.")]
ClinicalOption = Annotated[
    str, typer.Option("--clinical", help="Clinical columns, by comma: numbers, or words of few kinds.")
]
TextStoreOption = Annotated[
    Path | None, typer.Option("--text-store", help="Store of the texts, where another model embedded them.")
]
FoldsOption = Annotated[int, typer.Option("--folds", min=2, help="Outer folds, by patient.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Times that folds are drawn.")]
ComponentsOption = Annotated[int, typer.Option("--components", min=1, help="Numbers kept of each modality.")]


def run(
    label: LabelOption,
    table: TableOption = None,
    store: StoreOption = None,
    model: ModelOption = "",
    use: UseOption = "image,text,clinical",
    clinical: ClinicalOption = "",
    text_store: TextStoreOption = None,
    folds: FoldsOption = 5,
    repeats: RepeatsOption = 5,
    components: ComponentsOption = 32,
    split: SplitOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    out: PageOption = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Predict a label from every modality alone, early and late fusion, out of fold, and compare."""
    from chiasm.cli.inputs import load_encoder
    from chiasm.cli.vectors import open_vectors
    from chiasm.evaluate.fusion_page import fusion_page
    from chiasm.evaluate.fusion_scores import score_fusion
    from chiasm.evaluate.page import save_page
    from chiasm.evaluate.run_card import make_run_card
    from chiasm.tasks.fusion import compare_fusion
    from chiasm.tasks.modalities import make_modalities

    started = time.perf_counter()
    wanted = _wanted(use, clinical, label)
    columns = [c.strip() for c in clinical.split(",") if c.strip()]
    loading = {"device": device, "precision": precision, "family": family, "allow_code": allow_code}
    encoder = None if table is None else load_encoder(model, **loading)  # type: ignore[arg-type]

    def side(name: Literal["image", "text"], from_store: Path | None) -> Embeddings:
        other = from_store is not None and from_store is not store  # --text-store stands beside a table
        return open_vectors(
            store=from_store, table=None if other else table, side=name, split=split, group=group, batch_size=batch_size,
            column=None if other else column, root=None if other else root, as_json=as_json, encoder=encoder,
        )  # fmt: skip

    sides: dict[str, Embeddings] = {}
    if "image" in wanted:
        sides["image"] = side("image", store)
    if "text" in wanted:
        sides["text"] = side("text", text_store or store)
    if not sides:  # clinical columns alone still come from the rows of a side that exists
        sides["rows"] = side("image", store)
    rows = _labelled(sides, label, columns)
    modalities = make_modalities(
        rows.ids,
        images=sides.get("image"),
        texts=sides.get("text"),
        clinical={c: rows.column(c) for c in columns} if "clinical" in wanted else None,
    )
    run_ = compare_fusion(
        modalities, rows.classes, rows.groups, folds=folds, repeats=repeats, components=components, seed=seed,
        progress=make_progress(as_json, unit="folds"),
    )  # fmt: skip
    scores = score_fusion(run_, seed=seed)
    card = make_run_card(
        f"chiasm fuse --label {label} --use {','.join(wanted)}"
        + (f" --clinical {','.join(columns)}" if columns else ""),
        sides, seed=seed, seconds=time.perf_counter() - started,
        settings={"label": label, "use": wanted, "folds": folds, "repeats": repeats, "components": components,
                  "clinical": columns, "group": group},
    )  # fmt: skip
    if out is not None:
        save_page(fusion_page(scores, card, label=label), out)
    if as_json:
        print_json({**scores.to_dict(), "written": str(out) if out else None, "run_card": card.to_dict()})
    else:
        _tell(scores)
        if out is not None:
            print(f"page: {out}")


def _tell(scores: FusionScores) -> None:
    table_rows = [(arm, str(s.auroc), str(s.balanced_accuracy), str(s.log_loss)) for arm, s in scores.arms.items()]
    print_table(("arm", "AUROC [95 %]", "balanced accuracy", "log loss"), table_rows)
    tests = [(n.replace("-", " − ", 1), str(d.difference), f"{d.p:.3f}") for n, d in scores.differences.items()]
    if tests:
        print_table(("difference of AUROC", "value [95 %]", "p (Holm)"), tests)
    print(scores.verdict)


class _Rows:
    """Labelled rows of all sides: the first side that has a row states its class, patient and columns."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.classes: list[str] = []
        self.groups: list[str] = []
        self.values: dict[str, list[object]] = {}

    def column(self, name: str) -> list[str | int | float | None]:
        return self.values[name]  # type: ignore[return-value]  # values of label columns


def _labelled(sides: dict[str, Embeddings], label: str, columns: list[str]) -> _Rows:
    from chiasm.cli.vectors import label_column
    from chiasm.tasks.modalities import is_blank

    rows = _Rows()
    rows.values = {c: [] for c in columns}
    seen: set[str] = set()
    for side in sides.values():
        classes = label_column(side, label)
        given = {c: label_column(side, c) for c in columns}
        for k, name in enumerate(side.ids):
            if name in seen or is_blank(classes[k]):
                continue
            seen.add(name)
            rows.ids.append(name)
            rows.classes.append(str(classes[k]))
            rows.groups.append(side.groups[k])
            for c in columns:
                rows.values[c].append(given[c][k])
    if not rows.ids:
        raise InputError(
            f"no row has a label in column `{label}`", hint="blank, `?`, `none` and `unknown` are no labels"
        )
    return rows


def _wanted(use: str, clinical: str, label: str) -> list[str]:
    named = [u.strip() for u in use.split(",") if u.strip()]
    unknown = [u for u in named if u not in MODALITIES]
    if unknown or not named:
        raise InputError(f"--use names `{use}`", hint=f"of these, by comma: {', '.join(MODALITIES)}")
    if "clinical" in named and not clinical.strip():
        if use != ",".join(MODALITIES):
            raise InputError("--use names clinical, but no column was given", hint="--clinical age,sex")
        named.remove("clinical")
    if clinical.strip() and "clinical" not in named:
        raise InputError("--clinical was given, but --use leaves it out", hint="add clinical to --use")
    if label in [c.strip() for c in clinical.split(",")]:
        raise InputError(
            f"column `{label}` is what --label asks for, so it cannot be among --clinical", hint="leave it out there"
        )
    return named
