"""Show what an embedding is: the five steps of zero-shot classification of one image, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.output import CodeOption, DeviceOption, FamilyOption, JsonOption, ModelOption, print_json, print_table
from chiasm.errors import InputError

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder
    from chiasm.types import Embeddings, Modality


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
    from chiasm.io.image import open_image
    from chiasm.tasks.inspection import inspect

    if not all(text.strip() for text in texts):
        raise InputError("a text is empty", hint='write what the image may show: "left pleural effusion"')
    encoder = load_encoder(model, device=device, precision="fp32", family=family, allow_code=allow_code)
    shown = inspect(
        _raw(encoder, [open_image(image)], [image.name], "image"), _raw(encoder, list(texts), list(texts), "text")
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


def _raw(encoder: Encoder, inputs: Sequence[Any], ids: Sequence[str], modality: Modality) -> Embeddings:
    """Return vectors as the towers give them, before normalisation: that is one of the steps to show."""
    import numpy as np

    from chiasm.types import Embeddings

    return Embeddings(
        np.asarray(encoder.encode(inputs, normalize_embeddings=False, show_progress_bar=False)),
        tuple(ids),
        encoder.space,
        modality,
        normalized=False,
        logit_scale=encoder.logit_scale,
        logit_bias=encoder.logit_bias,
        members=encoder.members,
    )
