"""Write docs/protocols.md from the protocols of the package: `python tools/make_protocols_page.py`.

A test compares the page with what this program would write.
"""

from __future__ import annotations

from pathlib import Path

from chiasm.tasks.protocol import Protocol, protocols

PAGE = Path(__file__).parents[1] / "docs" / "protocols.md"
HEAD = """# Zero-shot protocols

How the field's models were asked for their published figures: with which prompts, and how these were added up. This page
is written by `tools/make_protocols_page.py` from `src/chiasm/tasks/protocols/`: correct the data, not the page.

    chiasm zero-shot --protocol list
    chiasm zero-shot --protocol chexzero-chexpert14 --table T.csv --truth '*' --model chexzero

- The default variant, `published`, does what the authors' code does, also where that is wrong, since the figures hang on
  it. The result names protocol and variant, and lists the defects. `--variant corrected` mends them.
- A protocol runs with any model; a model of another family brings a warning: the published figures say nothing about it.
- *Needs*: prompts that are not printed at a source, or whose licence does not let them be passed on, are yours to bring
  as `--labels-file`. chiasm invents none.
- Research use only.
"""
EVIDENCE = {
    "read": "read in the authors' repository",
    "quoted": "quoted from a paper or its supplement",
    "inferred": "inferred",
}
#: More templates than this are counted, not listed.
LISTED = 8


def render() -> str:
    """Return the page."""
    found = protocols()
    rows = [
        f"| `{p.name}` | {', '.join(f'`{f}`' for f in p.families)} | {p.title} | {p.mode} |" for p in found.values()
    ]
    table = "\n".join(["| protocol | for | what it does | labels |", "|---|---|---|---|", *rows])
    return "\n".join([HEAD, table, "", *(_section(p) for p in found.values())]).rstrip("\n") + "\n"


def _section(protocol: Protocol) -> str:
    lines = [
        f"## {protocol.name}",
        "",
        f"{protocol.title}. Source: {protocol.source} ({EVIDENCE[protocol.evidence]}).",
        "",
    ]
    lines.append(f"- As published: {protocol.reproduced}.")
    lines += [f"- Not as published: {text}." for text in protocol.not_reproduced]
    lines += [f"- Defect of the reference: {text}." for text in protocol.defects]
    lines += [f"- Variant `{name}`: {variant.what}." for name, variant in protocol.variants.items()]
    if protocol.needs:
        lines.append(f"- Needs {protocol.needs}.")
    if protocol.labels:
        lines.append(f"- Labels: {', '.join(protocol.labels)}.")
    for what, texts in (("Templates", protocol.templates), ("Against", protocol.negative_templates)):
        if len(texts) > LISTED:
            lines.append(f"- {what}: {len(texts)}, beginning with {', '.join(f'`{t}`' for t in texts[:2])}.")
        elif texts:
            lines.append(f"- {what}: {', '.join(f'`{t}`' for t in texts)}.")
    for label, sides in dict(protocol.prompts.get("labels", {})).items():
        lines += [f"- {label}, {side}: {', '.join(f'`{t}`' for t in texts)}." for side, texts in sides.items()]
    if protocol.sample is not None:
        seed = f"seed {protocol.seed}" if protocol.seed is not None else "seed: `--seed`"
        lines.append(f"- Prompts drawn per class: {protocol.sample} ({seed}).")
    if protocol.top_j:
        lines.append(f"- Numbers of tiles: {', '.join(map(str, protocol.top_j))}.")
    if protocol.licence:
        lines.append(f"- Licence of the prompts: {protocol.licence}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
