"""Draw where an image supports a sentence: a heat map over the image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, cast

import typer

from chiasm.cli.output import CodeOption, DeviceOption, FamilyOption, JsonOption, ModelOption, print_json
from chiasm.errors import InputError

#: Endings that an overlay can be written with, and Pillow's names for them.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}


def run(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    text: Annotated[str, typer.Argument(help="A sentence.")],
    model: ModelOption = "",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="auto, attention (CLIP's ViT), layer_cam or grad_cam (its ResNet), similarity, biovil, occlusion (any tower).",
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Picture to write; by default IMAGE.heat.png in the present folder.")
    ] = None,
    device: DeviceOption = "cpu",
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the map, write the overlay, say where its maximum lies."""
    from chiasm.cli.inputs import load_encoder
    from chiasm.io.image import open_image
    from chiasm.io.manifest import write_bytes_atomic

    target = out or Path(f"{image.stem}.heat.png")
    kind = FORMATS.get(target.suffix.lower())
    if kind is None:
        raise InputError(f"`--out {target.name}` is no picture", hint=f"let it end in {', '.join(FORMATS)}")
    encoder = load_encoder(model, device=device, family=family, allow_code=allow_code)
    from chiasm.explain.heatmap import overlay  # imports torch, which an absent model must not wait for
    from chiasm.explain.methods import MethodName, explain

    picture = open_image(image)
    heat = explain(encoder, picture, text, method=cast(MethodName, method))
    stream = io.BytesIO()
    overlay(picture, heat).save(stream, format=kind)
    write_bytes_atomic(target, stream.getvalue())
    x, y = heat.peak()
    document = {
        "method": heat.method,
        "text": text,
        "width_px": picture.width,
        "height_px": picture.height,
        "peak_px": [x, y],
        "cosine": heat.cosine,
        "written": str(target),
        "space": str(encoder.space),
    }
    if as_json:
        print_json(document)
    else:
        print(f"{heat.method}: maximum at x={x}, y={y} of {picture.width}×{picture.height}; wrote {target}")
