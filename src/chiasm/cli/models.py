"""List the models that have a name, with their towers, licence, training data and published scores."""

from __future__ import annotations

from typing import Annotated

import typer

from chiasm.cli.output import JsonOption, print_json, print_table


def run(
    name: Annotated[str | None, typer.Argument(help="Show one model in full.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the catalog."""
    from chiasm.encoders.catalog import CATALOG

    entries = [CATALOG.get(name)] if name else [CATALOG.get(n) for n in CATALOG.names()]
    if as_json:
        print_json([e.to_dict() for e in entries])
        return
    if name:
        for key, value in entries[0].to_dict().items():
            print(f"  {key}: {value}")
        return
    rows = [(e.name, e.image_tower, e.text_tower, e.dim, f"{e.image_size_px} px", e.licence) for e in entries]
    print_table(("name", "image tower", "text tower", "dim", "input", "licence"), rows)
    print("  weights are not part of this package; `chiasm models NAME` says where they come from")
