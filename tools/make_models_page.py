"""Write docs/models.md from the tables of the package: `python tools/make_models_page.py`.

A test compares the page with what this program would write.
"""

from __future__ import annotations

from pathlib import Path

from chiasm.encoders.advice import Advice, advise, load_targets
from chiasm.encoders.entry import Figure
from chiasm.encoders.facts import ModelFacts, load_datasets, load_facts

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Models

What is known about every model that has a name in chiasm, and which one to take. This page is written by
`tools/make_models_page.py` from `src/chiasm/encoders/models/` (`facts.toml`, `datasets.toml`, `advice.toml`): correct
the tables, not the page. In the terminal: `chiasm models`, `chiasm models NAME`, `chiasm models --for chexpert`.

- Weights are not part of this package. *open*: anybody may download; *agreement*: after accepting terms with an
  account; *request*: handed out by the authors.
- Figures were published by others, under their own protocols, and were not measured by chiasm. A figure that could not
  be confirmed does not stand here. Fractions lie in [0, 1].
- Research use only. A licence named here is a pointer: read it at its source before you use a model.
"""
VERDICTS = """
Verdicts: **recommended** and **possible** are models that did not learn from the data set. **in-domain**: it saw these
images, so its number says nothing about other hospitals. **not zero-shot**: it learned these labels. **features**: no
text tower, so labels are needed for a probe. **baseline**: knows photographs; the floor to beat. Models that are not
listed are of another field or have one tower; the command lists them too.
"""
FIELDS = (
    ("chest X-ray", "Chest radiographs"),
    ("pathology", "Pathology"),
    ("biomedical figures", "Biomedical images of many kinds"),
    ("natural images", "Photographs"),
    ("species", "Species (not medicine)"),
    ("clinical text", "Text towers, clinical"),
    ("biomedical text", "Text towers, biomedical"),
    ("general text", "Text towers, general"),
)


def render() -> str:
    """Return the page."""
    parts = [HEAD, "## All models\n"]
    for scope, title in FIELDS:
        models = {n: f for n, f in load_facts().items() if f.scopes[0] == scope}
        parts.append(f"### {title}\n")
        parts.append(
            _table(
                ("name", "towers", "size", "dim", "input", "tokens", "licence", "weights"), map(_row, models.items())
            )
        )
    parts.append("## Which model for which data set\n" + VERDICTS)
    for key, target in load_targets().items():
        parts.append(f"### `--for {key}`\n\n{target.title}. {target.note}\n\n{target.corrects}\n")
        rows = [a for a in advise(key) if a.rank <= len(target.ranks) or (a.verdict == "features" and a.figures)]
        parts.append(_table(("", "model", "verdict", "why", "overlap", "published here"), map(_advice, rows)))
    parts.append("## What each was trained on, and what to mind\n")
    parts += [_model(name, facts) for name, facts in load_facts().items()]
    parts.append("## Published figures\n")
    figures = [(n, f) for n, facts in load_facts().items() for f in facts.figures]
    parts.append(
        _table(("model", "data", "task", "kind", "metric", "value", "source"), (_figure(n, f) for n, f in figures))
    )
    return "\n".join(parts).rstrip() + "\n"


def _table(head: tuple[str, ...], rows: object) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]  # type: ignore[attr-defined]
    return "\n".join(lines) + "\n"


def _row(item: tuple[str, ModelFacts]) -> tuple[object, ...]:
    name, facts = item
    towers = " + ".join(t for t in (facts.image_tower, facts.text_tower) if t)
    size = f"{facts.image_size_px} px" if facts.image_size_px else ""
    gate = facts.gate if facts.released else "none released"
    millions = f"{facts.parameters / 1e6:.0f} M" if facts.parameters else ""
    return (
        f"`{name}`",
        towers,
        millions + (f" × {facts.members}" if facts.members > 1 else ""),
        facts.dim or "",
        size,
        facts.context or "",
        facts.licence,
        gate,
    )


def _advice(row: Advice) -> tuple[object, ...]:
    reason = "" if row.overlap.level == "none known" else f": {row.overlap.reason}"
    first = row.figures[0] if row.figures else None
    published = f"{first.metric} {first.value:.4g}, {first.task}" if first else ""
    return row.rank, f"`{row.model}`", row.verdict, row.why, f"*{row.overlap.short}*{reason}", published


def _model(name: str, facts: ModelFacts) -> str:
    lines = [f"**`{name}`** — {facts.title}: {facts.description}.", f"- Training: {facts.training}."]
    lines.append(f"- Good for: {facts.good_for}. Not for: {facts.not_for}.")
    lines.append(
        f"- Licence: {facts.licence} ({facts.licence_source})." + (f" Weights: {facts.ask}." if facts.ask else "")
    )
    lines += [f"- Mind: {c}." for c in facts.caveats]
    return "\n".join([lines[0], "", *lines[1:]]) + "\n"


def _figure(name: str, figure: Figure) -> tuple[object, ...]:
    data = load_datasets()[figure.on].name
    return f"`{name}`", data, figure.task, figure.kind, figure.metric, f"{figure.value:.4g}", figure.source


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
