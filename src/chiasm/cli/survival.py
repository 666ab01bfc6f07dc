"""Predict survival from images, texts and clinical columns, out of fold, with what each adds."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
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
from chiasm.cli.vectors import PageOption, StoreOption
from chiasm.errors import InputError, UnknownName

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from chiasm.evaluate.survival_scores import SurvivalScores
    from chiasm.tasks.survival import SurvivalData, SurvivalEstimator
    from chiasm.types import Embeddings, LabelValue

METHODS = ("coxnet", "forest", "neural")
SIDES = ("image", "text")

FeaturesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        help="image, text, joint, clinical:age,sex, columns:*_rnaseq, joined by +; may be repeated, the first is asked about.",
    ),
]
WhereOption = Annotated[list[str] | None, typer.Option("--where", help="Keep rows: COLUMN=VALUE.")]


@dataclass
class _Rows:
    """Rows that every side has, with their columns."""

    ids: list[str]
    patients: list[str]
    labels: dict[str, list[LabelValue]]
    sides: dict[str, Embeddings] = field(default_factory=dict)


def run(
    time_column: Annotated[str, typer.Option("--time", help="Column of the time to the event or to the last contact.")],
    unit: Annotated[str, typer.Option("--unit", help="Unit of that column: days, months or years.")],
    event: Annotated[str | None, typer.Option("--event", help="Column of the event flag.")] = None,
    event_is: Annotated[
        str | None, typer.Option("--event-is", help="Value of --event that means the event was seen; 1.")
    ] = None,
    censored: Annotated[
        str | None, typer.Option("--censored", help="Column in which 1 means censored, in place of --event.")
    ] = None,
    table: TableOption = None,
    store: StoreOption = None,
    model: ModelOption = "",
    features: FeaturesOption = None,
    method: Annotated[str, typer.Option("--method", help="coxnet, forest or neural.")] = "coxnet",
    pooling: Annotated[str, typer.Option("--pooling", help="Rows of a patient to one vector: mean or max.")] = "mean",
    folds: Annotated[int, typer.Option("--folds", min=2, help="Outer folds, by patient.")] = 5,
    groups: Annotated[int, typer.Option("--groups", min=2, max=5, help="Risk groups.")] = 2,
    horizon: Annotated[
        float | None, typer.Option("--horizon", help="Time of the calibration; by default the median event time.")
    ] = None,
    where: WhereOption = None,
    split: SplitOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    out: PageOption = None,
    resamples: Annotated[int, typer.Option("--resamples", min=10, help="Bootstrap resamples of patients.")] = 1000,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cross-validate, score, and write the page."""
    started = time.perf_counter()
    make = _maker(method, seed)
    flag, value, is_censoring = _flag(event, event_is, censored)
    if horizon is not None and not horizon > 0:
        raise InputError(f"--horizon must be a time after 0, got {horizon:g}", hint="in the unit of --time")
    wanted = _parse(features or (["image"] if model or store else []))
    from chiasm.evaluate.run_card import make_run_card
    from chiasm.evaluate.survival_scores import score_survival
    from chiasm.tasks.survival import check_unit, event_flags

    named = {"split": split, "group": group, "column": column, "root": root}
    opened = {
        "batch_size": batch_size, "device": device, "precision": precision, "family": family, "allow_code": allow_code,
    }  # fmt: skip
    rows = _where(_open(wanted, table, store, model, as_json, named, opened), where)
    times, flags = _column(rows, time_column), event_flags(_column(rows, flag), event_is=value, censored=is_censoring)
    known, sets = _blocks(rows, wanted, (time_column, flag)), {}
    for name, parts in _with_parts(wanted).items():
        sets[name] = _data(known, parts, rows, times, flags, pooling)
    inputs = _inputs(known, rows, time_column, flag)
    caution = check_unit(next(iter(sets.values())).time, unit)
    scores = score_survival(
        sets, make, method=method, unit=unit, folds=folds, groups=groups, horizon=horizon, n_resamples=resamples,
        seed=seed, warnings=(caution,) if caution else (), progress=make_progress(as_json, unit="folds"),
    )  # fmt: skip
    settings = {
        "method": method, "features": list(sets), "time": time_column, "unit": unit, "event": flag,
        "event is": f"not {value}" if is_censoring else value, "pooling": pooling,
        "folds": folds, "groups": groups, "where": list(where or ()), "resamples": resamples, "horizon": scores.horizon,
    }  # fmt: skip
    card = make_run_card(
        f"chiasm survival --method {method} --features {next(iter(sets)).replace(' ', '')}", inputs, seed=seed,
        settings=settings, split=scores.first.fold.tolist(), seconds=time.perf_counter() - started,
    )  # fmt: skip
    page = None
    if out is not None:
        from chiasm.evaluate.page import save_page
        from chiasm.evaluate.survival_page import survival_page

        page = save_page(survival_page(scores, card), out)
    if as_json:
        print_json({**scores.to_dict(), "page": None if page is None else str(page), "run_card": card.to_dict()})
        return
    _say(scores, page)


def _maker(method: str, seed: int) -> Callable[[SurvivalData], SurvivalEstimator]:
    """Return what makes the estimator for some data; what is absent is missed before anything is embedded."""
    from chiasm.tasks.survival_models import CoxNet, SurvivalForest, require_sksurv

    if method not in METHODS:
        raise UnknownName("method", method, METHODS, hint=f"--method {', '.join(METHODS)}")
    if method == "neural":
        from chiasm.train.heads import NeuralCox

        return lambda data: NeuralCox(seed=seed)
    require_sksurv()
    if method == "forest":
        return lambda data: SurvivalForest(free=data.free, seed=seed)
    return lambda data: CoxNet(free=data.free, seed=seed)


def _flag(event: str | None, event_is: str | None, censored: str | None) -> tuple[str, str, bool]:
    """Return the column of the flag, the value that is named, and whether it means censoring."""
    from chiasm.tasks.survival import check_event_name

    if (event is None) == (censored is None):
        raise InputError(
            "give --event or --censored, one of the two",
            hint="--event dead, or --censored censorship where 1 = censored",
        )
    if censored is not None:
        if event_is is not None:
            raise InputError("--event-is belongs to --event, not to --censored", hint="give one of the two columns")
        return censored, "1", True
    assert event is not None
    if event_is is None:
        check_event_name(event)
    return event, event_is or "1", False


def _parse(features: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return each feature set with its parts: ``image``, ``text``, ``clinical:age,sex``, ``columns:*_rnaseq``."""
    if not features:
        raise InputError(
            "no features were named", hint="--features clinical:age,sex for a table alone, --model for images"
        )
    found: dict[str, tuple[str, ...]] = {}
    for words in features:
        parts = [p.strip() for word in words.split("+") for p in (SIDES if word.strip() == "joint" else (word,))]
        for part in parts:
            kind, separator, names = part.partition(":")
            if not (part in SIDES or (kind in ("clinical", "columns") and separator and names.strip())):
                raise InputError(
                    f"--features names `{part}`",
                    hint="image, text, joint, clinical:COLUMN,COLUMN, columns:PATTERN, joined by +",
                )
        found[" + ".join(dict.fromkeys(parts))] = tuple(dict.fromkeys(parts))
    return found


def _with_parts(wanted: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return the feature sets, and after them each part of the first alone."""
    first = next(iter(wanted.values()))
    return {**wanted, **{part: (part,) for part in first if part not in wanted}}


def _open(
    wanted: Mapping[str, tuple[str, ...]],
    table: Path | None,
    store: Path | None,
    model: str,
    as_json: bool,
    named: Mapping[str, Any],
    opened: Mapping[str, Any],
) -> _Rows:
    sides = [s for s in SIDES if any(s in parts for parts in wanted.values())]
    if not sides and table is not None:
        from chiasm.cli.inputs import open_table, select_rows

        dataset = open_table(table, group=named["group"], columns=named["column"], root=named["root"], require=())
        samples = select_rows(dataset.samples, named["split"])
        names = sorted({k for s in samples for k in s.labels})
        return _Rows(
            [s.id for s in samples], [s.group for s in samples], {k: [s.labels.get(k) for s in samples] for k in names}
        )
    from chiasm.cli.inputs import load_encoder
    from chiasm.cli.vectors import open_vectors

    settings = {k: v for k, v in opened.items() if k in ("device", "precision", "family", "allow_code")}
    encoder = load_encoder(model, **settings) if table is not None and store is None else None
    found: dict[str, Embeddings] = {}
    for side in sides or ["image"]:
        found[side] = open_vectors(
            store=store, table=table, side=cast(Literal["image", "text"], side), encoder=encoder, as_json=as_json,
            **named, **opened,
        )  # fmt: skip
    shared = set.intersection(*(set(e.ids) for e in found.values()))
    first = next(iter(found.values()))
    kept = [k for k, name in enumerate(first.ids) if name in shared]
    if not kept:
        raise InputError("no row has all of the sides that --features names", hint="name one side")
    chosen = first.select(np.asarray(kept))
    labels = {name: list(column) for name, column in chosen.labels.items()}
    return _Rows(list(chosen.ids), list(chosen.groups), labels, found if sides else {})


def _where(rows: _Rows, conditions: Sequence[str] | None) -> _Rows:
    kept = list(range(len(rows.ids)))
    for condition in conditions or ():
        name, separator, value = condition.partition("=")
        if not separator:
            raise InputError(f"--where must be COLUMN=VALUE, got `{condition}`", hint="--where cohort=LUAD")
        column = _column(rows, name)
        kept = [k for k in kept if str(column[k]) == value]
    if not kept:
        raise InputError("no row is left after --where", hint="values are compared as text, letter by letter")
    labels = {name: [column[k] for k in kept] for name, column in rows.labels.items()}
    return _Rows([rows.ids[k] for k in kept], [rows.patients[k] for k in kept], labels, rows.sides)


def _column(rows: _Rows, name: str) -> list[LabelValue]:
    if name not in rows.labels:
        raise InputError(
            f"there is no column `{name}`", hint=f"columns: {', '.join(sorted(rows.labels)[:40]) or 'none'}"
        )
    return rows.labels[name]


def _blocks(
    rows: _Rows, wanted: Mapping[str, tuple[str, ...]], outcome: Sequence[str]
) -> dict[str, tuple[NDArray[np.float64], list[str]]]:
    """Return numbers and their names for each part; the columns of the outcome are refused."""
    from chiasm.tasks.modalities import make_modalities

    found: dict[str, tuple[NDArray[np.float64], list[str]]] = {}
    for part in dict.fromkeys(p for parts in wanted.values() for p in parts):
        if part in SIDES:
            embeddings = rows.sides[part]
            both: dict[str, Any] = {"images": embeddings} if part == "image" else {"texts": embeddings}
            block = make_modalities(rows.ids, **both).blocks[part]
            found[part] = (block, [f"{part} {k + 1}" for k in range(block.shape[1])])
        else:
            found[part] = _clinical(rows, part.partition(":")[2].split(","), outcome)
    return found


def _clinical(rows: _Rows, patterns: Sequence[str], outcome: Sequence[str]) -> tuple[NDArray[np.float64], list[str]]:
    """Return columns of the table as numbers; of the categories of a column the first is what the others differ from."""
    from chiasm.tasks.modalities import encode_clinical, is_blank

    names: list[str] = []
    for pattern in (p.strip() for p in patterns):
        matched = [pattern] if pattern in rows.labels else sorted(fnmatch.filter(rows.labels, pattern))
        if not matched:
            _column(rows, pattern)
        if told := [m for m in matched if m in outcome]:
            raise InputError(
                f"--features takes in `{told[0]}`, the outcome itself (by `{pattern}`)",
                hint="a narrower pattern, or the columns by name",
            )
        names += [m for m in matched if m not in names]
    known = {n: rows.labels[n] for n in names if not all(is_blank(v) for v in rows.labels[n])}
    if not known:
        raise InputError(f"none of {len(names)} clinical columns has a value in these rows", hint="leave them out")
    matrix, columns = encode_clinical(known)
    reference = {c.partition("=")[0]: c for c in reversed(columns) if "=" in c}
    kept = [k for k, c in enumerate(columns) if c not in reference.values()]
    kept = kept or list(range(len(columns)))
    return matrix[:, kept], [columns[k] for k in kept]


def _data(
    known: Mapping[str, tuple[NDArray[np.float64], list[str]]],
    parts: Sequence[str],
    rows: _Rows,
    times: Sequence[object],
    flags: Sequence[float],
    pooling: str,
) -> SurvivalData:
    from chiasm.tasks.survival import survival_data

    names = [n for part in parts for n in known[part][1]]
    free = [p for p in parts if p.startswith("clinical:")]
    marks = [part in free for part in parts for _ in known[part][1]]
    return survival_data(
        np.concatenate([known[part][0] for part in parts], axis=1), rows.patients, times, flags,
        pooling=cast(Any, pooling), names=names, free=[k for k, m in enumerate(marks) if m],
    )  # fmt: skip


def _inputs(
    known: Mapping[str, tuple[NDArray[np.float64], list[str]]], rows: _Rows, time_column: str, flag: str
) -> dict[str, Embeddings]:
    """Return what entered, for the run card: clinical columns as rows of a space of their own."""
    from chiasm.types import Embeddings, Space

    labels = {name: tuple(rows.labels[name]) for name in (time_column, flag)}
    kept = set(rows.ids)  # what --where and the other side left
    found: dict[str, Embeddings] = {
        f"{side}s": e.select([k for k, name in enumerate(e.ids) if name in kept]) for side, e in rows.sides.items()
    }
    for part, (block, _) in known.items():
        if part not in SIDES:
            space = Space("columns of the table", "none", "none", block.shape[1])
            found[part] = Embeddings(
                np.asarray(block, np.float32), tuple(rows.ids), space, "text", normalized=False,
                patients=tuple(rows.patients), labels=labels,
            )  # fmt: skip
    return found


def _say(scores: SurvivalScores, page: Path | None) -> None:
    print(f"{scores.patients} patients, {scores.events} events, {scores.folds} folds by patient, {scores.method}")
    for warning in scores.warnings:
        print(f"note: {warning}")
    print_table(
        ("features", "Harrell's C", "Uno's C", "integrated Brier score"),
        [(name, str(m.harrell), str(m.uno), str(m.brier)) for name, m in scores.models.items()],
    )
    for name, gain in scores.gains.items():
        print(f"{scores.name} less {name}: {gain.difference}, p = {gain.p_value:.3f}")
    if scores.separation is not None:
        print(f"risk groups: log-rank p = {scores.separation.p_value:.2g}, stratified by fold")
    if page is not None:
        print(f"page: {page}")
