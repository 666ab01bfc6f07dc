"""Write docs/reference/distill-recipe.md from the dataclasses of a recipe: `python tools/make_recipe_page.py`.

A test compares the page with what this program would write, and looks that no field lacks a sentence.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from chiasm.data.augment import PRESETS, Augment
from chiasm.datasets.columns import Columns
from chiasm.distill import recipe
from chiasm.encoders.base import ImageTowerConfig, LoraConfig
from chiasm.encoders.heads import HeadsConfig
from chiasm.types import Preprocess

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "distill-recipe.md"
HEAD = """# The recipe of `chiasm distill`, field by field

A recipe is one TOML file; [distill.md](../distill.md) begins with a short one, `recipes/clip_it_*.toml` are examples. A field
that is left out has the default below; `--set fuse.kd_weight=10` changes one; a typo is an error that names the nearest
field. Every run writes its recipe, resolved, into its folder. This page is written by `tools/make_recipe_page.py` from the
docstrings of `chiasm.distill.recipe`: correct those, not the page.
"""
#: Heading -> the dataclass, and what to say before its table.
SECTIONS: dict[str, tuple[type, str]] = {
    "At the top": (recipe.DistillRecipe, "Before the first table."),
    "`[data]`": (recipe.DistillData, "Labelled images, and what is held out."),
    "`[data.columns]`": (Columns, "For a table whose columns do not tell by their names what they hold."),
    "`[data.synthetic]`": (
        recipe.SyntheticConfig,
        "Made-up features in place of images; `[backbone]` is left out then.",
    ),
    "`[pairing]`": (recipe.PairingConfig, "Reports, and the CLIP that pairs them with images."),
    "`[backbone]`": (recipe.BackboneConfig, "The vision backbone, whose features the heads take."),
    "`[backbone.lora]`, `[fuse.text_lora]`": (
        LoraConfig,
        "Low-rank adapters; an empty table, `lora = {}`, takes the defaults.",
    ),
    "`[backbone.image]`": (ImageTowerConfig, "A tower to build in place of `backbone.encoder`."),
    "`[backbone.preprocess]`": (
        Preprocess,
        "How images are prepared for `[backbone.image]`; `backbone.encoder` knows it itself.",
    ),
    "`[backbone.augment]`": (
        Augment,
        f"For stages that train the tower. `preset` sets all of them ({', '.join(f'`{n}`' for n in PRESETS)}; `none` changes "
        "nothing and is the start where none is named); each may then be changed by itself.",
    ),
    "`[heads]`": (
        recipe.HeadOptions,
        "`logits = W [h_v(v); h_t(h_d(v))] + b`. Widths follow from backbone, classes and texts.",
    ),
    "`[unimodal]`, `[text]`, `[fuse]`": (recipe.StageConfig, "The three stages."),
    "`[fuse]`, besides": (
        recipe.FuseConfig,
        "The stage that distils: `CE(logits, y) + kd_weight * KD(target, predicted)`.",
    ),
    "`[run]`": (recipe.DistillRun, "Where and on what it runs; nothing here but `ref_compat` changes what is learnt."),
}
#: Tables of their own, which the top of the recipe need not list again.
_TABLES = {name for name, hint in typing.get_type_hints(recipe.DistillRecipe).items() if dataclasses.is_dataclass(hint)}
#: Defaults that the dataclass alone does not tell.
DEFAULTS = {
    (recipe.DistillRecipe, "name"): "the file's name",
    (Augment, "crop_scale"): "`[1.0, 1.0]`",
}


def meanings(cls: type) -> dict[str, str]:
    """Return field -> its text in the docstring's ``Attributes``, those of the classes it stands for included."""
    found: dict[str, str] = meanings(HeadsConfig) if cls is recipe.HeadOptions else {}
    if found:  # TOML has no null: a recipe says it in another way
        found["text_length"] = found["text_length"].replace("None: ", "With `raw_text` it is ")
    block = re.search(r"^Attributes[^\n]*:\n((?:[ \n].*\n?)+)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    name = ""
    for line in (block.group(1) if block else "").splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start.group(1)
            found[name] = start.group(2)
        elif line.startswith("        ") and name:
            found[name] += " " + line.strip()
        elif line and not line.startswith(" "):
            break
    return found


def rows(cls: type) -> list[tuple[str, str, str, str]]:
    """Return (field, values, default, meaning) of a dataclass' own fields."""
    told, hints = meanings(cls), typing.get_type_hints(cls)
    own = [f for f in dataclasses.fields(cls) if f.name in cls.__annotations__]
    if cls is recipe.DistillRecipe:
        own = [f for f in own if f.name not in _TABLES]
    return [
        (f.name, _values(hints[f.name]), DEFAULTS.get((cls, f.name)) or _default(f), _plain(told.get(f.name, "")))
        for f in own
    ]


def _values(hint: Any) -> str:
    """Return what a field may hold, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_values(a) for a in arguments if a is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        each = list(dict.fromkeys(_values(a) for a in arguments if a is not Ellipsis))
        return f"list of {' and '.join(each)}"
    if (isinstance(origin, type) and issubclass(origin, typing.Mapping)) or dataclasses.is_dataclass(hint):  # type: ignore[arg-type]
        return "table"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[hint]


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is dataclasses.MISSING:
        return "must be given" if f.default_factory is dataclasses.MISSING else "–"
    value = f.default
    if value is None or value in ((), ""):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _plain(text: str) -> str:
    """Return a docstring's text as Markdown."""
    text = re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`")
    text = text.replace("; None:", "; left out:").replace("None:", "Left out:").replace("None keeps", "left out keeps")
    return text.replace("|", "\\|")


def render() -> str:
    """Return the page."""
    lines = [HEAD]
    for heading, (cls, about) in SECTIONS.items():
        lines += [f"## {heading}", "", about, "", "| field | values | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {values} | {default} | {told} |" for name, values, default, told in rows(cls)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
