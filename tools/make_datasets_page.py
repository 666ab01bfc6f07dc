"""Write docs/reference/datasets.md from the table of public data sets: `python tools/make_datasets_page.py`.

A test compares the page with what this program would write.
"""

from __future__ import annotations

from pathlib import Path

from chiasm.datasets.facts import DatasetFacts
from chiasm.datasets.named import NAMED

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "datasets.md"
HEAD = """# Public data sets by name

`NAME:FOLDER` opens a data set as it is downloaded, wherever a table can be given: `--table pcam:/data/pcam`, `source =
"bach:${CHIASM_DATA}/bach"` in a recipe, `open_dataset("crc:/data/crc")` in Python. Nothing is downloaded; a file that is
missing is named, with where to get it. A name with a dash is the same data with another rule.

    chiasm embed pcam:/data/pcam --out embedded --modality image --model conch
    chiasm pairing --images crc:/data/crc --reports tcga:/data/tcga --tissue colo --encoder conch --out pairs

An image has one class, the label `label`, or several findings, each a label of its own: 1 present, 0 absent, None not
labelled (never "absent"); -1 is a labeller's "uncertain" where a section says so. `open_dataset(..., require=())` reads
labels without images, `require=("text",)` reports without images. Sets that name patients keep them in `Sample.patient`.

`chiasm.datasets.miniature.make_miniature("pcam", folder)` writes a small one with drawn pictures, to try a command.

This page is written by `tools/make_datasets_page.py` from the readers in `src/chiasm/datasets/`: correct these, not the
page. A magnification that nobody states is left out. Research use only; look at each licence before you pass images on.
"""


def render() -> str:
    """Return the page."""
    return HEAD + "".join(_section(entry.facts, entry.options) for entry in NAMED.values())


def _section(facts: DatasetFacts, options: tuple[str, ...]) -> str:
    sides = f"{facts.tile_px[0]} × {facts.tile_px[1]} px" if facts.tile_px else "they differ"
    scale = [part for part in (facts.magnification, facts.um_per_px and f"{facts.um_per_px:g} µm per pixel") if part]
    rows = {
        "images": ", ".join(f"{split} {n:,}" for split, n in facts.sizes.items()),
        "size": ", ".join([sides, *scale]),
        "splits": facts.split_rule,
        "lies in": f"`{facts.layout}`",
        "licence": facts.licence,
        "from": facts.page,
        "cite": facts.citation,
        "tissue of reports": f"`{facts.tissue}`" if facts.tissue else "",
        "labels beside": ", ".join(f"`{c}`" for c in facts.columns),
        "options in Python": ", ".join(f"`{o}`" for o in options),
        "facts from": "; ".join(dict.fromkeys(facts.sources.values())),
    }
    lines = [f"\n## `{facts.name}`: {facts.title}\n", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in rows.items() if text]
    noun = "class" if facts.kind == "classes" else "finding"
    if facts.classes:
        lines += ["", f"| number | {noun} | in words |", "|---|---|---|"]
    lines += [f"| {i} | `{c}` | {', '.join(facts.words[c])} |" for i, c in enumerate(facts.classes)]
    lines += ["", *(f"- {caution[0].upper()}{caution[1:]}." for caution in facts.cautions)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
