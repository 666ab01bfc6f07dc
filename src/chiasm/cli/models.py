"""List the models that have a name, and say which to take for a data set, with the reason."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.output import JsonOption, print_json

if TYPE_CHECKING:
    from chiasm.encoders.advice import Advice

FIELDS = {
    "chest X-ray": "Chest radiographs",
    "pathology": "Pathology",
    "biomedical figures": "Biomedical images of many kinds",
    "natural images": "Photographs",
    "species": "Species (not medicine)",
    "clinical text": "Text towers, clinical",
    "biomedical text": "Text towers, biomedical",
    "general text": "Text towers, general",
    "": "Other",
}
COLUMNS = ("name", "image tower", "text tower", "size", "dim", "input", "weights", "licence")
#: Columns that a narrow terminal does without, the first one first.
DISPENSABLE = (7, 2, 3)


def run(
    name: Annotated[str | None, typer.Argument(help="Show one model in full.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Rank the models for a data set: chexpert, mimic-cxr, nih14, tuberculosis, pcam, bach, crc, general, "
            "natural.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the catalog, one model, or the ranking for a data set."""
    from chiasm.encoders.advice import advise, describe_model, list_models

    advice = {a.model: a for a in advise(target)} if target else {}
    names: Sequence[str] = [name] if name else list(advice) if target else list_models()
    models = [describe_model(n) for n in names]
    if as_json:
        print_json([{**m, "advice": advice[m["name"]].to_dict()} if m["name"] in advice else m for m in models])
    elif name:
        _print_model(models[0], advice.get(models[0]["name"]))
    elif target:
        _print_ranking(target, list(advice.values()))
    else:
        _print_list(models)


def _width() -> int:
    return min(max(shutil.get_terminal_size((110, 24)).columns, 80), 120)


def _print_list(models: Sequence[dict[str, Any]]) -> None:
    groups: dict[str, list[tuple[str, ...]]] = {title: [] for title in FIELDS.values()}
    for model in models:
        scopes = model.get("scopes") or ("",)
        if not model["variant_of"]:
            groups[FIELDS.get(scopes[0], FIELDS[""])].append(_row(model))
    rows = [row for group in groups.values() for row in group]
    widths = [max(len(r[i]) for r in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    shown = list(range(len(COLUMNS)))
    for column in DISPENSABLE:
        if sum(widths[i] + 2 for i in shown) > _width():
            shown.remove(column)
    print(_line(COLUMNS, widths, shown))
    print(_line(["─" * w for w in widths], widths, shown))
    for title, group in groups.items():
        if group:
            print(f"  {title}")
            for row in group:
                print(_line(row, widths, shown))
    if not all(m["loads"] or not m["released"] for m in models):
        print("  * known, but without loading code in this version")
    _print_wrapped(
        "Weights are not part of this package. `chiasm models NAME` says where they come from, what they were trained "
        "on and what was published; `chiasm models --for chexpert` ranks them for a data set and says why. Others load "
        "as `hf-hub:ORG/REPO`, `open_clip:NAME/TAG` or by their path.",
        "  ",
    )


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    side = model["image_size_px"]
    text = " ".join(w for w in (model["text_tower"] or "–").split(" ") if not w.replace("x", "").isdigit())
    return (
        model["name"] + ("" if model["loads"] or not model["released"] else " *"),
        textwrap.shorten(re.sub(r", (\d+) registers", r" reg\1", model["image_tower"] or "–"), 17, placeholder="…"),
        textwrap.shorten(text.removesuffix(" transformer"), 15, placeholder="…"),
        f"{model['parameters'] / 1e6:.0f} M" if model["parameters"] else "–",
        str(model["dim"] or "–"),
        f"{side} px" if side else "–",
        model["gate"] if model["released"] else "none",
        model["licence"],
    )


def _line(cells: Sequence[str], widths: Sequence[int], shown: Iterable[int]) -> str:
    return (
        "  "
        + "  ".join(cells[i].rjust(widths[i]) if i in (3, 4, 5) else cells[i].ljust(widths[i]) for i in shown).rstrip()
    )


def _print_wrapped(text: str, indent: str, first: str | None = None) -> None:
    print(
        textwrap.fill(
            text,
            _width(),
            initial_indent=indent if first is None else first,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _print_ranking(target: str, rows: Sequence[Advice]) -> None:
    from chiasm.encoders.advice import VERDICTS, load_targets

    aim = load_targets()[target]
    print(f"  {aim.title}")
    for text in (aim.note, aim.corrects):
        _print_wrapped(text, "  ")
    count = len(aim.ranks)
    for row in rows[:count]:
        print()
        print(f"  {row.rank:>2}  {row.model:<22}{row.verdict:<15}overlap: {row.overlap.short}")
        _print_wrapped(row.why, " " * 6)
        if row.overlap.level != "none known":
            _print_wrapped(row.overlap.reason, " " * 6)
        if row.figures:
            more = f" (and {len(row.figures) - 1} more)" if len(row.figures) > 1 else ""
            _print_wrapped(f"Published: {_say(row.figures[0])}{more}.", " " * 6)
    scored = [r for r in rows[count:] if r.verdict == "features" and r.figures]
    if scored:
        print()
        _print_wrapped(scored[0].why, "  ", first="  features: ")
        for row in scored:
            start = f"  {row.rank:>2}  {row.model:<22}"
            _print_wrapped(f"overlap: {row.overlap.short}. {_say(row.figures[0])}", " " * 28, first=start)
    print()
    for verdict in VERDICTS:
        others = [_brief(r) for r in rows[count:] if r.verdict == verdict and r not in scored]
        if others:
            label = "other features" if verdict == "features" and scored else verdict
            _print_wrapped(", ".join(others), "      ", first=f"  {label}: ")
    print()
    _print_wrapped(
        "Overlap compares what is known of the training data, not the images themselves. Figures were published by "
        "others under their own protocols; a difference between two rows may be one of protocol.",
        "  ",
    )


def _brief(row: Advice) -> str:
    """A name, with its first zero-shot score on the data set itself."""
    own = [f for f in row.figures if f.kind == "zero-shot" and row.verdict == "baseline"]
    return f"{row.model} ({own[0].value:.4g})" if own else row.model


def _say(figure: Any) -> str:
    kind = "" if figure.kind == "zero-shot" or figure.kind in figure.task else f", {figure.kind}"
    return f"{figure.metric} {figure.value:.4g} on {figure.task}{kind} [{figure.source}]"


def _print_model(model: dict[str, Any], advice: Advice | None) -> None:
    from chiasm.encoders.advice import find_overlap, load_targets

    print(f"  {model['name']}" + (f": {model['title']}" if "title" in model else ""))
    print("  " + "─" * (_width() - 2))
    for label, value in _details(model):
        if value:
            _print_wrapped(str(value), " " * 18, first=f"  {label:<16}")
    for caveat in model.get("caveats", ()):
        _print_wrapped(caveat, " " * 18, first=f"  {'mind':<16}")
    sources: dict[str, list[str]] = {}
    for figure in model["figures"] or ():
        sources.setdefault(figure["source"], []).append(_figure(figure))
    if sources:
        print("\n  published figures (not measured by chiasm)")
    for source, figures in sources.items():
        _print_wrapped(source, " " * 6, first="    ")
        for text in figures:
            _print_wrapped(text, " " * 14, first=" " * 6)
    if advice is not None:
        print(f"\n  for {advice.target}: {advice.verdict}, rank {advice.rank}")
        _print_wrapped(advice.why, "    ")
    if "trained_on" in model:
        print("\n  overlap of its training data")
        said: dict[str, list[str]] = {}
        for key, aim in load_targets().items():
            if aim.datasets:
                overlap = find_overlap(model["variant_of"] or model["name"], aim.datasets)
                said.setdefault(f"{overlap.short}. {overlap.reason}", []).append(key)
        for text, keys in said.items():
            _print_wrapped(f"{', '.join(keys)}: {text}", " " * 6, first="    ")


def _details(model: dict[str, Any]) -> list[tuple[str, object]]:
    count = model.get("members", 1)
    size = f"{model['parameters']:,} weights" if model["parameters"] else ""
    towers = [t for t in (model["image_tower"], model["text_tower"]) if t]
    context = f", {model['context']} tokens" if model.get("context") else ""
    weights = model["weights"] or {}
    where = model.get("ask") or weights.get("ask") or weights.get("url") or weights.get("repository")
    return [
        ("what", model["description"]),
        ("variant of", model["variant_of"]),
        ("aliases", ", ".join(model["aliases"])),
        ("towers", " and ".join(towers)),
        ("dimensions", model["dim"]),
        ("input", f"{model['image_size_px']} px" if model["image_size_px"] else ""),
        ("tokenizer", f"{model['tokenizer_kind']}{context}" if model.get("tokenizer_kind") else ""),
        ("size", f"{size}, {count} files averaged" if count > 1 else size),
        ("training data", model["training_data"]),
        ("starts from", ", ".join(model.get("starts_from", ()))),
        ("licence", model["licence"] + (f" ({model['licence_source']})" if model.get("licence_source") else "")),
        ("gate", model["gate"] if model["released"] else "no weights of this name were released"),
        ("weights", where),
        ("good for", model.get("good_for")),
        ("not for", model.get("not_for")),
        ("loading code", "" if model["loads"] else "not in this version yet"),
    ]


def _figure(figure: dict[str, Any]) -> str:
    kind = "" if figure["kind"] == "zero-shot" or figure["kind"] in figure["task"] else f", {figure['kind']}"
    return f"{figure['value']:<6.4g}  {figure['metric']}{kind}: {figure['task']}"
