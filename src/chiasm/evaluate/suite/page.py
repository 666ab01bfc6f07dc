"""A suite's run to one page: models × tasks, each data set with intervals and tests, groups, leakage, run cards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from chiasm.evaluate.page import Block, Commands, Figure, KeyNumber, Note, Page, Section, Table
from chiasm.evaluate.suite.cells import CellOutcome
from chiasm.evaluate.suite.comparisons import GroupScore
from chiasm.evaluate.suite.figures import HeatCell, heat_table, model_dots, shade_of
from chiasm.evaluate.suite.run import SuiteRun
from chiasm.types import Interval

DISCLAIMER = "Research and teaching only; not a medical device."
#: Findings and pairs whose tests are listed; the JSON holds all.
MOST_TESTS = 40
#: Tasks that a coloured table of half the page's width can show.
WIDEST_HALF = 6
#: With fewer patients on a side, the numbers of a finding say little.
FEW_PATIENTS = 10


def suite_page(run: SuiteRun) -> Page:
    """Return the page of a run."""
    done = [c for c in run.cells if c.result is not None]
    data = list(dict.fromkeys(c.data for c in run.cells))
    sections = [_summary(run)] if done else []
    sections += [_data_section(run, name) for name in data if any(c.data == name for c in done)]
    sections += [_leakage(run)]
    if run.failed:
        sections.append(_failures(run))
    sections += [_cards(run), run.card.section()]
    models = list(dict.fromkeys(c.model for c in run.cells))
    tasks = list(dict.fromkeys(c.task for c in run.cells))
    return Page(
        f"Suite: {run.suite.name}",
        f"{_count(len(models), 'model')}, {_count(len(data), 'data set')}, {_count(len(tasks), 'task')}: "
        f"{len(done)} of {len(run.cells)} cells have a result. Intervals are 95 % and resample patients.",
        _keys(run, done),
        tuple(sections),
        (DISCLAIMER, "Numbers of public data sets say little of another hospital; see the leakage report above."),
    )


def _keys(run: SuiteRun, done: Sequence[CellOutcome]) -> tuple[KeyNumber, ...]:
    found = []
    for (data, task), model in list(run.best.items())[:4]:
        cell = run.cell(model, data, task)
        if cell is not None and cell.result is not None and math.isfinite(cell.result.main.value.value):
            found.append(KeyNumber(f"{data} · {task}", cell.result.main.value, f"{model}, better than every other"))
    if not found:
        for c in done:
            if c.result is not None and math.isfinite(c.result.main.value.value):
                return (KeyNumber(f"{c.data} · {c.task}", c.result.main.value, c.model),)
    return tuple(found)


def _summary(run: SuiteRun) -> Section:
    figures: list[Block] = []
    rows: list[tuple[object, ...]] = []
    for data in dict.fromkeys(c.data for c in run.cells):
        here = [c for c in run.cells if c.data == data]
        if not any(c.result for c in here):
            continue
        models, tasks = (list(dict.fromkeys(names)) for names in zip(*((c.model, c.task) for c in here), strict=True))
        cells = {}
        for task in tasks:
            for c in (c for c in here if c.task == task):
                best = run.best.get((data, task)) == c.model
                if c.result is None:
                    cells[c.model, task] = HeatCell(math.nan, math.nan)
                    continue
                main = c.result.main
                shade = shade_of(main.value.value, main.value.chance, lower=main.better == "lower")
                cells[c.model, task] = HeatCell(main.value.value, shade, best)
                rows.append((data, task, c.model, _measure_name(c.result.primary), _interval(main.value),
                             _number(main.value.chance), _number(main.majority), main.value.n,
                             "better than every other" if best else ""))  # fmt: skip
        figures.append(Figure(heat_table(models, tasks, cells), f"{data}", wide=len(tasks) > WIDEST_HALF))
    return Section(
        "Models × tasks",
        f"The number by which models are compared. A frame marks a model that is better than every other one by paired "
        f"tests on the same rows (p < {run.suite.alpha:g} after Holm's correction over the pairs); where there is no "
        "frame, no model is proven best, whatever the digits say.",
        (
            *figures,
            Note(
                "Shade: from what chance gives (light) to perfect (dark); of calibration errors, from 0.5 to 0. A dash: no "
                "result. Columns have different test rows, so numbers compare downwards only."
            ),
            Table(
                ("data", "task", "model", "measure", "value", "chance", "majority", "n", ""),
                tuple(rows),
                "n counts labelled test rows (retrieval: queries). Majority: what a constant answer reaches.",
            ),
        ),
    )


def _data_section(run: SuiteRun, data: str) -> Section:
    rows = run.rows[data]
    cells = [c for c in run.cells if c.data == data]
    tasks = list(dict.fromkeys(c.task for c in cells))
    models = list(dict.fromkeys(c.model for c in cells))
    panels: dict[str, dict[str, Interval]] = {}
    labels: dict[str, str] = {}
    for task in tasks:
        values = {c.model: c.result for c in cells if c.task == task and c.result is not None}
        if values:
            first = next(iter(values.values()))
            panels[task] = {m: r.main.value for m, r in values.items()}
            arrow = " (less is better)" if first.main.better == "lower" else ""
            labels[task] = f"{_measure_name(first.primary)}{arrow}"
    parts = ", ".join(f"{len(rows.rows_of(p)):,} {p}" for p in ("train", "val", "test") if len(rows.rows_of(p)))
    blocks: list[Block] = [Note(text, "warning") for text in rows.cautions]
    blocks.append(Figure(model_dots(panels, xlabels=labels, models=models),
                         "Dots: value; bars: 95 % interval; dashed: chance. The interval of a calibration error can lie above it: "
                         "resamples are noisier than the rows.", wide=True))  # fmt: skip
    blocks += _few(run, data)
    blocks.append(_numbers(cells))
    blocks += _tests(run, data)
    blocks += _groups(run, data)
    what = f"labels: {', '.join(rows.labels)} ({rows.mode})" if rows.labels else "no labels"
    return Section(f"Data set: {data}", f"{len(rows):,} rows ({parts}); {what}.", tuple(blocks))


def _few(run: SuiteRun, data: str) -> list[Block]:
    """Name the findings whose test rows have few patients on a side."""
    rows = run.rows[data]
    tested = rows.rows_of("test")
    few = []
    for k, label in enumerate(rows.labels):
        sides = [len({rows.groups[r] for r in tested[rows.truth[tested, k] == side].tolist()}) for side in (1, 0)]
        if min(sides) < FEW_PATIENTS:
            few.append(f"{label} ({sides[0]} with, {sides[1]} without)")
    if not few:
        return []
    return [Note(f"Fewer than {FEW_PATIENTS} patients on a side among the test rows: {', '.join(few)}. Their numbers and "
                 "intervals say little, and the mean over findings counts them.", "warning")]  # fmt: skip


def _numbers(cells: Sequence[CellOutcome]) -> Table:
    """Return a row a task and measure, a column a model."""
    models = list(dict.fromkeys(c.model for c in cells))
    found = {(c.task, name, c.model): number for c in cells if c.result for name, number in c.result.numbers.items()}
    rows: list[tuple[object, ...]] = []
    for task, name in dict.fromkeys((task, name) for task, name, _ in found):
        given = {m: found[task, name, m] for m in models if (task, name, m) in found}
        one = next(iter(given.values()))
        rows.append((task, _measure_name(name), *(_interval(given[m].value, wrap=len(models) > 3) if m in given else "–" for m in models),
                     _number(one.value.chance), _number(one.majority), one.value.n))  # fmt: skip
    return Table(("task", "measure", *models, "chance", "majority", "n"), tuple(rows), "Every number.")


def _tests(run: SuiteRun, data: str) -> list[Block]:
    tests = [t for t in run.tests if t.data == data]
    if not tests:
        return []
    main = [t for t in tests if not t.finding]
    named = sorted((t for t in tests if t.finding), key=lambda t: (math.isnan(t.test.p), t.test.p))
    blocks: list[Block] = []
    for chosen, caption in (
        (main, "Paired tests between models on the same rows. Difference: first less second."),
        (
            named[:MOST_TESTS],
            f"Finding by finding, the smallest p first ({min(len(named), MOST_TESTS)} of {len(named)}).",
        ),
    ):
        if not chosen:
            continue
        families = "; ".join(dict.fromkeys(f"{t.task}: {t.family}" for t in chosen))
        rows = tuple(
            (t.task, *([t.finding] if t.finding else []), t.first, t.second, _interval(t.test.difference), _p(t.test.p_raw),
             _p(t.test.p), t.test.test.replace("_", ", "), t.test.patients)
            for t in chosen
        )  # fmt: skip
        columns = ("task", *(["finding"] if chosen[0].finding else []), "first", "second", "difference", "p", "p, Holm",
                   "test", "patients")  # fmt: skip
        blocks.append(Table(columns, rows, f"{caption} Corrected together: {families}."))
    return blocks


def _groups(run: SuiteRun, data: str) -> list[Block]:
    rows: list[tuple[object, ...]] = []
    for (model, name, task), found in run.subgroups.items():
        if name == data:
            rows += [(task, model, g.column, *_group_row(g)) for g in found]
    if not rows:
        return []
    least = run.suite.smallest_group
    return [
        Table(
            ("task", "model", "column", "group", "n", "patients", "value", "less the rest", "p", "p, Holm"),
            tuple(rows),
            f"Groups of test rows by columns of the table. No number where a group has fewer than {least} patients, or no "
            f"finding with {max(1, least // 4)} patients on both sides. The number is the mean over the findings that "
            "have enough patients, in the rest too. p: bootstrap of patients, Holm over all groups of a model and task. "
            "A difference describes these rows: groups may differ in age, severity, device and prevalence, too.",
        )
    ]


def _group_row(g: GroupScore) -> tuple[object, ...]:
    if g.value is None:
        return (g.group, "–", "–", g.suppressed, "–", "–", "–")
    return (
        g.group,
        g.n,
        g.patients,
        _interval(g.value),
        "–" if g.difference is None else _interval(g.difference),
        _p(g.p_raw),
        _p(g.p),
    )


def _leakage(run: SuiteRun) -> Section:
    rows: list[tuple[object, ...]] = []
    for x in run.leakage:
        parts = ", ".join(f"{p} {n:,} rows of {k:,}" for p, (n, k) in x.parts.items())
        parts += " patients" if x.known_patients else " (no patient column: every row counts as a patient)"
        kinds = ", ".join(f"{n} {kind}" for kind, n in x.counts.items()) or "none"
        if len(x.parts) < 2:
            kinds = "one part only"
        rows.append((x.data, parts, kinds, x.test_rows, f"{x.images:,}" if x.images else "not opened"))
    exposed = tuple(
        (e.model, e.data, e.level, e.reason, "–" if e.near is None else f"{e.near:,}") for e in run.exposure
    )
    cosine = run.suite.near_cosine
    blocks: list[Block] = [
        Table(
            ("data", "parts", "in several parts", "test rows concerned", "images compared"),
            tuple(rows),
            "Patients, studies, slides and ids by name; pictures by their pixels, a hash and small copies (also mirrored "
            "and turned). Cropped copies are not found.",
        ),
        Table(
            ("model", "data", "overlap", "reason", "near test rows"),
            exposed,
            "Overlap of training data as far as it is stated. Near test rows: their vector has a cosine of at least "
            f"{cosine:g} with a training or validation row of another patient; vectors of one model may crowd, so this "
            "is a hint to look, not a proof.",
        ),
    ]
    seen = [e for e in run.exposure if e.level.startswith("same data") and "other split" not in e.level]
    if seen:
        names = ", ".join(dict.fromkeys(f"{e.model} on {e.data}" for e in seen))
        blocks.insert(0, Note(f"Trained on the tested data, or on data that holds it: {names}. Such numbers say nothing "
                              "of new patients.", "warning"))  # fmt: skip
    if any(x.test_rows for x in run.leakage):
        blocks.insert(0, Note("Some test rows are not independent of training rows: see the first table.", "warning"))
    return Section("Leakage", "What the numbers may owe to having been seen before.", tuple(blocks))


def _failures(run: SuiteRun) -> Section:
    grouped: dict[tuple[str, str], list[str]] = {}
    for c in run.failed:
        grouped.setdefault((c.model, c.reason), []).append(f"{c.data} · {c.task}")
    rows = tuple((model, ", ".join(where), reason) for (model, reason), where in grouped.items())
    return Section(
        "Without a result",
        "These cells did not run; they are tried again by the next run of the suite.",
        (Table(("model", "cells", "why"), rows),),
    )


def _cards(run: SuiteRun) -> Section:
    rows = tuple(
        (c.data, c.task, c.model, c.card.model, c.card.data.get("images", ""), c.card.split or "–", c.card.prompts or "–",
         f"{c.card.seconds:.1f} s" if c.card.seconds is not None else "–", c.card.digest)
        for c in run.cells
        if c.card is not None
    )  # fmt: skip
    return Section(
        "Cells",
        "What each number was computed from: space of the model (weights and preprocessing), rows, parts, prompts.",
        (
            Table(("data", "task", "model", "space", "rows", "parts", "prompts", "time", "card"), rows),
            Commands(
                "chiasm evaluate SUITE.toml --list\nchiasm evaluate SUITE.toml --only data=NAME --only task=NAME",
                "What is on disk, and a part of the suite; results that are there are not computed again.",
            ),
        ),
    )


def _measure_name(name: str) -> str:
    for short, long in (
        ("auroc", "AUROC"),
        ("concordance", "C-index"),
        ("auprc", "AUPRC"),
        ("ece", "calibration error"),
        ("brier", "Brier score"),
    ):
        if name == short or name.startswith(short + " "):
            return long + name[len(short) :]
    return name


def _interval(number: Interval, *, wrap: bool = False) -> str:
    """Return a number with its interval in one line; with ``wrap`` it may break before the bracket."""
    if not math.isfinite(number.value):
        return "–"
    text = str(number).replace(" ", "\u00a0")
    return text.replace("\u00a0[", " [") if wrap else text


def _p(p: float) -> str:
    if not math.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
