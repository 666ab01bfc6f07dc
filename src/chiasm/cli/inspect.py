"""Show what an embedding is: the five steps of zero-shot classification of one image, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli.output import CodeOption, DeviceOption, FamilyOption, JsonOption, ModelOption, print_json, print_table


def run(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    texts: Annotated[list[str], typer.Argument(help="Two or more sentences to compare it with.")],
    model: ModelOption = "",
    device: DeviceOption = "cpu",
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed both sides and print each step."""
    from chiasm.cli.inputs import load_encoder
    from chiasm.embed import embed_images, embed_texts
    from chiasm.tasks.inspection import inspect
    from chiasm.types import Sample

    encoder = load_encoder(model, device=device, family=family, allow_code=allow_code)
    shown = inspect(
        embed_images(encoder, [Sample(id=image.name, image=image)], on_bad="fail", normalize=False),
        embed_texts(encoder, texts, normalize=False),
    )
    if as_json:
        print_json(shown.to_dict())
        return
    for number, (title, lines) in enumerate(shown.steps(), start=1):
        print(f"{number}. {title}")
        for line in lines:
            print(f"   {line}")
    print_table(
        ("text", "cosine", "logit", "softmax"),
        [(t, f"{c:+.4f}", f"{x:+.3f}", f"{p:.4f}") for t, c, x, p in shown.rows()],
    )
    print(f"winner: {shown.winner}")
