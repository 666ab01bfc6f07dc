"""Check the installation, and with --model a model: its files, its keys, its embeddings, its recorded self-test."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli.output import CodeOption, DeviceOption, FamilyOption, JsonOption, print_json


def run(
    model: Annotated[str | None, typer.Option("--model", "-m", help="A model to probe with phantoms.")] = None,
    pretrained: Annotated[Path | None, typer.Option("--pretrained", help="With a name: the file or folder.")] = None,
    family: FamilyOption = None,
    device: DeviceOption = "cpu",
    allow_code: CodeOption = False,
    precision: Annotated[str, typer.Option("--precision", help="int8: also compare it with float32.")] = "fp32",
    as_json: JsonOption = False,
) -> None:
    """Check and print; a check that is wrong makes the exit code 1."""
    from chiasm.fetch import prepare

    if model is not None:
        prepare(model, pretrained=pretrained)
    from chiasm.evaluate.doctor import check_environment, environment_checks, examine_model

    environment = check_environment()
    checks = environment_checks(environment)
    model_checks = []
    if model is not None:
        from chiasm.cli.inputs import members_of

        model_checks = examine_model(
            members_of(model), device=device, family=family, pretrained=pretrained, allow_code=allow_code,
            precision=precision,
        )  # fmt: skip
    everything = [*checks, *model_checks]
    if as_json:
        print_json({**environment, "checks": [c.to_dict() for c in everything]})
    else:
        marks = {"ok": "ok  ", "note": "note", "wrong": "BAD "}
        print(f"chiasm {environment['chiasm']}, Python {environment['python']}, {environment['platform']}")
        for check in everything:
            print(f"  {marks[check.state]}  {check.name}: {check.detail}")
            if check.hint:
                print(f"        hint: {check.hint}")
    if any(c.state == "wrong" for c in everything):
        raise typer.Exit(1)
