"""Write a model as a folder that loads without a network: weights, tokenizer, preprocessing, prompts, licence, checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli.output import FamilyOption, JsonOption, print_json
from chiasm.errors import InputError


def run(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... OUT",
            help="A name, an address (hf-hub:org/repo), a file or folder, several files of an ensemble; then the "
            "folder to write, new or empty.",
        ),
    ],
    pretrained: Annotated[Path | None, typer.Option("--pretrained", help="With a name: the file or folder.")] = None,
    family: FamilyOption = None,
    check: Annotated[bool, typer.Option("--check", help="Only compare a bundle with its checksums.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write or check a bundle."""
    if check:
        from chiasm.bundle import check_bundle

        found = {Path(word).name: check_bundle(word) for word in words}
        if as_json:
            print_json({"bundles": found})
        for name, files in found.items() if not as_json else ():
            print(f"  {name}: all {len(files)} files are as they were written")
        return
    *models, out = words
    if not models:
        raise InputError("no folder to write was named", hint="chiasm bundle MODEL OUT")
    from chiasm.fetch import prepare

    for model in models:
        prepare(model, pretrained=pretrained)
    from chiasm.bundle import write_bundle

    done = write_bundle(models, out, family=family, pretrained=pretrained)
    if as_json:
        print_json(done.to_dict())
        return
    print(f"  {done.name}: {len(done.files) + 1} files, {done.size_bytes / 1e6:,.1f} MB in {done.directory}")
    print(f"  space: {done.space}; loaded again and found the same")
    print(f"  protocols: {', '.join(done.protocols) or 'none published for it'}")
    print(f"  licence: {done.licence or 'not known to chiasm; see NOTICE.txt'}")
    print(f"  load it with `--model {out}`; `chiasm bundle --check {out}` compares it with its checksums")
