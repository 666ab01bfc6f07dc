"""Make a picture that follows a text by CLIP's gradient, or score how images agree with their texts (CLIPScore)."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, RootOption, SplitOption, TableOption
from chiasm.cli.output import (
    BatchOption,
    CodeOption,
    DeviceOption,
    FamilyOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    SeedOption,
    make_progress,
    print_json,
    print_table,
)
from chiasm.cli.vectors import StoreOption, open_vectors
from chiasm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

AgainstOption = Annotated[
    list[str] | None, typer.Option("--against", help="What the picture shall not fit; may be repeated.")
]
StartOption = Annotated[Path | None, typer.Option("--start", help="An image to start from; by default soft noise.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Steps of the optimiser.")]
RateOption = Annotated[float, typer.Option("--lr", help="Step size, in grey values of 0 to 1.")]
CutoutsOption = Annotated[int, typer.Option("--cutouts", min=1, help="Squares that are looked at in each step.")]
SmoothOption = Annotated[float, typer.Option("--smooth", help="Weight of the total variation.")]
StayOption = Annotated[float, typer.Option("--stay", help="Weight of staying near the start.")]
SizeOption = Annotated[
    int | None, typer.Option("--size", min=8, help="Side of the picture without --start; by default the model's.")
]
GreyOption = Annotated[bool, typer.Option("--grey/--colour", help="Whether the picture is grey, as a film is.")]
ControlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--control", help="A text to follow without being guided by it; by default the words in another order."
    ),
]
FramesOption = Annotated[int, typer.Option("--frames", min=1, help="Pictures to keep.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of frames and page; with --score a page (HTML).")
]
ScoreOption = Annotated[bool, typer.Option("--score", help="CLIPScore of the pairs of --table or --store.")]


def run(
    text: Annotated[list[str] | None, typer.Argument(help="What the picture shall fit; several pull together.")] = None,
    model: ModelOption = "",
    against: AgainstOption = None,
    start: StartOption = None,
    out: OutOption = None,
    steps: StepsOption = 150,
    lr: RateOption = 0.02,
    cutouts: CutoutsOption = 8,
    smooth: SmoothOption = 0.5,
    stay: StayOption = 0.0,
    size: SizeOption = None,
    grey: GreyOption = True,
    control: ControlOption = None,
    frames: FramesOption = 6,
    score: ScoreOption = False,
    table: TableOption = None,
    store: StoreOption = None,
    split: SplitOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Guide pixels, or score pairs."""
    began = time.perf_counter()
    loading = {"device": device, "precision": precision, "family": family, "allow_code": allow_code}
    if score:
        if text or start or against or control:
            raise InputError("--score reads pairs of a table; texts, --start, --against and --control make pictures")
        rows = {"split": split, "group": group, "column": column, "root": root, "batch_size": batch_size, **loading}
        _score(table, store, model, rows, out, seed=seed, began=began, as_json=as_json)
        return
    if table or store:
        raise InputError("--table and --store go with --score", hint="chiasm guide --score --table T --model M")
    if not text:
        raise InputError("name what the picture shall fit", hint='chiasm guide "a text" --model M --out DIR')
    if out is None:
        raise InputError("the picture needs a folder", hint="--out DIR")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out `{out.name}` is a file; pictures are a folder", hint="name another")
    options = {"steps": steps, "lr": lr, "total_variation": smooth, "stay": stay, "grey": grey, "frames": frames}
    seen = {"against": against or (), "cutouts": cutouts, "seed": seed}
    _guide(text, model, loading, seen, options, start, size, control, out, began=began, as_json=as_json)


def _guide(
    texts: list[str],
    model: str,
    loading: dict[str, Any],
    seen: dict[str, Any],
    options: dict[str, Any],
    start: Path | None,
    size: int | None,
    control: list[str] | None,
    out: Path,
    *,
    began: float,
    as_json: bool,
) -> None:
    from chiasm.cli.inputs import load_encoder

    encoder = load_encoder(model, **loading)
    from chiasm.evaluate.guidance_page import NO_EVIDENCE, guidance_page, to_picture
    from chiasm.evaluate.page import save_page
    from chiasm.evaluate.run_card import RunCard, package_versions
    from chiasm.io.manifest import write_json_atomic
    from chiasm.train.guidance import ClipGuidance, optimise_pixels
    from chiasm.types import digest_of

    guidance = ClipGuidance(encoder, texts, **seen)
    pixels = _start(start, size or encoder.preprocess_spec.size, options["grey"], seen["seed"]).to(encoder.device)
    controls = control if control is not None else _other_order(texts, seen["seed"])
    bar = make_progress(as_json, unit="steps")
    found = optimise_pixels(guidance, pixels, controls=controls, progress=bar, **options)
    out.mkdir(parents=True, exist_ok=True)
    for step, frame in found.frames:
        to_picture(frame[0]).save(out / f"step_{step:05d}.png")
    settings = {**options, "cutouts": seen["cutouts"], "start": "image" if start else "noise"}
    card = RunCard(
        command="chiasm guide",
        data={"start": hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest()[:12]},
        rows={"start": 1},
        model=str(encoder.space),
        seed=seen["seed"],
        prompts=digest_of([*texts, "against", *seen["against"]]),
        settings=settings,
        seconds=time.perf_counter() - began,
        versions=package_versions(),
    )
    page = save_page(guidance_page(found, texts, seen["against"], card), out / "index.html")
    document = {**found.to_dict(), "note": NO_EVIDENCE, "page": str(page), "out": str(out), "run_card": card.to_dict()}
    write_json_atomic(out / "guidance.json", document)
    if as_json:
        print_json(document)
        return
    rows = [
        (text, "guides" if k < len(texts) else "control", f"{found.cosines[0][k]:.3f}", f"{found.cosines[-1][k]:.3f}")
        for k, text in enumerate(found.followed)
    ]
    print_table(("text", "role", "start", "end"), rows)
    print(f"note: {NO_EVIDENCE}")
    print(f"page: {page}")


def _start(path: Path | None, size: int, grey: bool, seed: int) -> Tensor:
    """Return the first pixels (1, 3, height, width): an image, or soft noise around the middle grey."""
    import numpy as np
    import torch

    if path is not None:
        from chiasm.io.image import open_image

        values = np.asarray(open_image(path).convert("RGB"), dtype=np.float32) / 255
        return torch.from_numpy(values.copy()).permute(2, 0, 1)[None]
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1 if grey else 3, 12, 12, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return (0.5 + 0.4 * (smooth - 0.5)).clamp(0, 1).expand(-1, 3, -1, -1).clone()


def _other_order(texts: list[str], seed: int) -> list[str]:
    """Return each text with its words in another order; a text of one word has none."""
    import numpy as np

    rng = np.random.default_rng(seed)
    found: list[str] = []
    for words in (text.split() for text in texts):
        turned = words
        for _ in range(20):
            turned = [words[int(i)] for i in rng.permutation(len(words))]
            if turned != words:
                break
        if turned != words and " ".join(turned) not in (*texts, *found):
            found.append(" ".join(turned))
    return found


def _score(
    table: Path | None,
    store: Path | None,
    model: str,
    rows: dict[str, Any],
    out: Path | None,
    *,
    seed: int,
    began: float,
    as_json: bool,
) -> None:
    from chiasm.cli.inputs import load_encoder
    from chiasm.evaluate.run_card import make_run_card
    from chiasm.tasks.clip_score import score_agreement

    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"`--out {out.name}` is no page", hint="let it end in .html")
    encoder = None
    if table is not None and store is None:
        encoder = load_encoder(model, **{k: rows[k] for k in ("device", "precision", "family", "allow_code")})
    opened = {
        side: open_vectors(store=store, table=table, model=model, side=side, as_json=as_json, encoder=encoder, **rows)  # type: ignore[arg-type]
        for side in ("image", "text")
    }
    scores = score_agreement(opened["image"], opened["text"], seed=seed)
    named = {"images": opened["image"], "texts": opened["text"]}
    card = make_run_card("chiasm guide --score", named, seed=seed, seconds=time.perf_counter() - began)
    written = None
    if out is not None:
        from chiasm.evaluate.guidance_page import score_page
        from chiasm.evaluate.page import save_page

        written = save_page(score_page(scores, card), out)
    if as_json:
        print_json({**scores.to_dict(), "page": None if written is None else str(written), "run_card": card.to_dict()})
        return
    print_table(("measure", "value", "pairs", "chance"), scores.table())
    if written is not None:
        print(f"page: {written}")
