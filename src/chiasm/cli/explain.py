"""Draw where an image supports a sentence; name the words it is near; score all methods against boxes."""

from __future__ import annotations

import io
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, RootOption, SplitOption, TableOption
from chiasm.cli.output import (
    CodeOption,
    DeviceOption,
    FamilyOption,
    JsonOption,
    ModelOption,
    SeedOption,
    check_output,
    make_progress,
    print_json,
    print_table,
)
from chiasm.errors import InputError

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder
    from chiasm.tasks.terms import NearestTerms
    from chiasm.types import Box

#: Endings that an overlay can be written with, and Pillow's names for them.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
METHODS_HELP = (
    "auto, attention (CLIP's ViT), layer_cam or grad_cam (its ResNet), similarity, biovil, occlusion (any tower), combined "
    "(its own and occlusion), gloria (its encoder)."
)


MethodOption = Annotated[str, typer.Option("--method", help=METHODS_HELP)]
MethodsOption = Annotated[
    str | None, typer.Option("--methods", help="Several side by side, with commas, or `all`; needs --page or --table.")
]
AgainstOption = Annotated[
    list[str] | None, typer.Option("--against", help="A sentence that says the opposite; may be repeated.")
]
BoxOption = Annotated[
    list[str] | None, typer.Option("--box", help="Where the finding lies, x0,y0,x1,y1 in pixels; may be repeated.")
]
CurvesOption = Annotated[bool, typer.Option("--curves", help="Deletion and insertion curves.")]
FillOption = Annotated[str, typer.Option("--fill", help="What stands for absent pixels: blur, mean.")]
TermsOption = Annotated[
    str | None, typer.Option("--terms", help="Name the nearest words of a vocabulary: chest, pathology, medical, FILE.")
]
RegionOption = Annotated[
    str | None, typer.Option("--region", help="With --terms: of this place too, x0,y0,x1,y1 in pixels.")
]
HowOption = Annotated[str, typer.Option("--region-how", help="cover, crop, patches.")]
ReferenceOption = Annotated[
    Path | None, typer.Option("--reference", help="With --terms: a table or folder of ordinary images to compare with.")
]
RankOption = Annotated[
    str | None, typer.Option("--rank", help="Order of the terms: z (with --reference), excess, cosine.")
]
TopOption = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Terms to name.")]
BoxesOption = Annotated[
    Path | None, typer.Option("--boxes", help="boxes.json of the table, where it does not lie beside it.")
]
LabelsOption = Annotated[
    Path | None, typer.Option("--labels-file", help="With --table: prompts of each label of the boxes.")
]
FidelityOption = Annotated[bool, typer.Option("--fidelity", help="With --table: the check with shuffled weights.")]
LimitOption = Annotated[
    int, typer.Option("--limit", min=1, help="At most this many findings, or reference images, drawn at random.")
]
ExamplesOption = Annotated[int, typer.Option("--examples", min=0, help="Findings of the table to show on the page.")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Picture to write; by default IMAGE.heat.png in the present folder.", callback=check_output
    ),
]
PageOption = Annotated[Path | None, typer.Option("--page", help="Page (HTML) to write.", callback=check_output)]


@dataclass(frozen=True)
class _Circumstances:
    """What all ways of the command share."""

    model: str
    loading: dict[str, Any]
    opening: dict[str, Any]
    page: Path | None
    limit: int
    seed: int
    as_json: bool
    began: float


def run(
    image: Annotated[Path | None, typer.Argument(help="An image file.")] = None,
    text: Annotated[list[str] | None, typer.Argument(help="A sentence, or several for a page.")] = None,
    model: ModelOption = "",
    method: MethodOption = "auto",
    methods: MethodsOption = None,
    against: AgainstOption = None,
    box: BoxOption = None,
    curves: CurvesOption = False,
    fill: FillOption = "blur",
    terms: TermsOption = None,
    region: RegionOption = None,
    region_how: HowOption = "cover",
    reference: ReferenceOption = None,
    rank: RankOption = None,
    top_k: TopOption = 10,
    table: TableOption = None,
    boxes: BoxesOption = None,
    labels_file: LabelsOption = None,
    fidelity: FidelityOption = False,
    limit: LimitOption = 300,
    examples: ExamplesOption = 0,
    split: SplitOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    out: OutOption = None,
    page: PageOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the maps, write picture or page, say where the maximum lies."""
    began = time.perf_counter()
    if (image is None) == (table is None):
        raise InputError("give an image or --table, one of the two", hint='chiasm explain IMAGE "a sentence" --model M')
    loading = {"device": device, "precision": "fp32", "family": family, "allow_code": allow_code}
    opening = {"group": group, "column": column, "root": root}
    shared = _Circumstances(model, loading, opening, page, limit, seed, as_json, began)
    if table is not None:
        if text or terms or box or region or out:
            raise InputError(
                "--table scores all its boxes; texts, --terms, --box, --region and --out are for one image"
            )
        drawing = {"methods": _names(methods or method), "curves": curves, "fill": fill, "fidelity": fidelity}
        _table(table, boxes, labels_file, drawing, shared, examples=examples, split=split)
        return
    assert image is not None
    if labels_file or boxes or fidelity or examples:
        raise InputError("--labels-file, --boxes, --fidelity and --examples are for --table")
    if terms is None and (region or reference or rank):
        raise InputError("--region, --reference and --rank are for --terms", hint="--terms chest")
    several = methods is not None or len(text or []) > 1 or curves
    if several and page is None and not as_json:
        raise InputError("several maps need a page", hint="--page out.html, or --json")
    if not text and terms is None:
        raise InputError("a heat map needs a text", hint='chiasm explain IMAGE "a sentence", or --terms chest')
    if several or page is not None or terms is not None:
        drawing = {"methods": _names(methods or method), "against": against or (), "curves": curves, "fill": fill}
        near = {"region": region, "how": region_how, "reference": reference, "rank_by": rank, "k": top_k}
        _page(image, text or [], box or [], terms, drawing, near, shared)
        return
    _overlay(image, (text or [""])[0], method, against or [], box or [], out, shared)


def _overlay(
    image: Path,
    text: str,
    method: str,
    against: list[str],
    box: list[str],
    out: Path | None,
    shared: _Circumstances,
) -> None:
    """One text, one method: a picture."""
    from chiasm.cli.inputs import load_encoder
    from chiasm.io.image import open_image
    from chiasm.io.manifest import write_bytes_atomic

    target = out or Path(f"{image.stem}.heat.png")
    kind = FORMATS.get(target.suffix.lower())
    if kind is None:
        raise InputError(f"`--out {target.name}` is no picture", hint=f"let it end in {', '.join(FORMATS)}")
    found_boxes = [parse_box(word) for word in box]
    encoder = load_encoder(shared.model, **shared.loading)
    from chiasm.explain.heatmap import overlay  # imports torch, which an absent model must not wait for
    from chiasm.explain.methods import MethodName, explain

    picture = open_image(image)
    heat = explain(encoder, picture, text, method=cast(MethodName, method), against=against)
    stream = io.BytesIO()
    overlay(picture, heat).save(stream, format=kind)
    write_bytes_atomic(target, stream.getvalue())
    x, y = heat.peak()
    document: dict[str, Any] = {
        "method": heat.method,
        "text": text,
        "width_px": picture.width,
        "height_px": picture.height,
        "peak_px": [x, y],
        "cosine": heat.cosine,
        "written": str(target),
        "space": str(encoder.space),
    }
    if found_boxes:
        from chiasm.evaluate.explain_image import score_boxes

        document["boxes"] = score_boxes(heat, found_boxes).to_dict()
    if shared.as_json:
        print_json(document)
        return
    print(f"{heat.method}: maximum at x={x}, y={y} of {picture.width}×{picture.height}; wrote {target}")
    if found_boxes:
        scores = document["boxes"]
        print(f"pointing game {scores['pointing_game']:.2f} (chance {scores['chance']:.2f}), IoU {scores['iou']:.2f}")


def _page(
    image: Path,
    texts: list[str],
    box: list[str],
    vocabulary: str | None,
    drawing: dict[str, Any],
    near: dict[str, Any],
    shared: _Circumstances,
) -> None:
    """Several maps of one image, or its nearest terms: a page and one JSON document."""
    found_boxes = [parse_box(word) for word in box]
    place = None if near["region"] is None else parse_box(near["region"], "--region")
    from chiasm.cli.inputs import load_encoder
    from chiasm.io.image import open_image

    if vocabulary is not None:
        from chiasm.tasks.terms import load_vocabulary

        load_vocabulary(vocabulary)  # a wrong name is missed before the model is loaded
    encoder = load_encoder(shared.model, **shared.loading)
    picture = open_image(image)
    from chiasm.evaluate.explain_image import explain_image
    from chiasm.evaluate.explain_page import image_page
    from chiasm.evaluate.explain_terms import region_terms
    from chiasm.evaluate.page import save_page

    found = explain_image(encoder, picture, texts, boxes=found_boxes, seed=shared.seed, **drawing) if texts else None
    lists: list[tuple[str, NearestTerms]] = []
    if vocabulary is not None:
        samples = None if near["reference"] is None else _reference(near["reference"], shared)
        bar = make_progress(shared.as_json, unit="images")
        asked = near | {"region": place, "reference": samples}
        lists = region_terms(encoder, picture, vocabulary, own=image, progress=bar, **asked)
    settings = {"texts": len(texts), "methods": ", ".join(found.methods) if found else "none", "fill": drawing["fill"]}
    settings |= {"vocabulary": vocabulary or "none", "reference images": lists[0][1].n_reference if lists else 0}
    card = _card(encoder, [picture], texts, settings, shared)
    written = None
    if shared.page is not None:
        written = save_page(image_page(found, card, terms=lists, encoder=encoder.name), shared.page)
    if shared.as_json:
        print_json({
            "image": None if found is None else found.to_dict(),
            "terms": {what: listed.to_dict() for what, listed in lists},
            "space": str(encoder.space),
            "page": None if written is None else str(written),
            "run_card": card.to_dict(),
        })  # fmt: skip
        return
    if found is not None:
        maps = [panel.heat for row in found.rows for panel in row]
        print_table(
            ("text", "method", "cosine", "peak"), [(h.text, h.method, f"{h.cosine:.3f}", str(h.peak())) for h in maps]
        )
    for what, listed in lists:
        rows = [(t.term, f"{t.cosine:.3f}", f"{t.z:+.2f}" if listed.n_reference else "-") for t in listed.terms]
        print_table(("term", "cosine", "z"), rows, title=f"{what}, by {listed.ranked_by}:")
    if lists and near["reference"] is None:
        print("note: without --reference, terms that are near to every image come first", file=sys.stderr)
    if written is not None:
        print(f"page: {written}")


def _table(
    table: Path,
    boxes: Path | None,
    labels_file: Path | None,
    drawing: dict[str, Any],
    shared: _Circumstances,
    *,
    examples: int,
    split: str | None,
) -> None:
    """All methods on all boxes of a table."""
    if labels_file is None:
        raise InputError("--table needs --labels-file: the prompts of each label of the boxes")
    from chiasm.cli.inputs import load_encoder, open_table, say_rejected, select_rows
    from chiasm.evaluate.explain_scores import COLUMNS, cases_of, score_methods
    from chiasm.io.manifest import RejectLog
    from chiasm.tasks.prompt_files import load_prompts

    prompts = load_prompts(labels_file)
    opening = shared.opening
    named = {"group": opening["group"], "columns": opening["column"], "root": opening["root"]}
    dataset = open_table(table, require=("image",), **named)
    samples = select_rows(dataset.samples, split)
    if boxes is not None:
        samples = _with_boxes(samples, boxes)
    cases, unknown = cases_of(samples, prompts, limit=shared.limit, seed=shared.seed)
    encoder = load_encoder(shared.model, **shared.loading)
    bar = make_progress(shared.as_json, unit="findings")
    scores = score_methods(encoder, cases, seed=shared.seed, progress=bar, **drawing)
    settings = {"findings": scores.n, "large from": scores.large_from, "fill": drawing["fill"], "limit": shared.limit}
    settings |= {"methods": ", ".join(m.method for m in scores.methods)}
    texts = [t for label in prompts.labels for t in (*label.positive, *label.negative)]
    card = _card(encoder, [case.open() for case in cases], texts, settings, shared)
    written = None
    if shared.page is not None:
        from chiasm.evaluate.explain_page import methods_page
        from chiasm.evaluate.page import save_page

        shown = _examples(encoder, cases, scores.methods, examples, shared.seed)
        written = save_page(methods_page(scores, card, examples=shown, encoder=encoder.name), shared.page)
    if shared.as_json:
        document = scores.to_dict() | {"boxes_without_prompts": sum(unknown.values()), "run_card": card.to_dict()}
        print_json(document | {"page": None if written is None else str(written)})
        return
    print_table(COLUMNS, scores.table())
    first = scores.methods[0].all
    print(
        f"{scores.n} findings of {scores.n_patients} patients; a random pixel hits {first.pointing_game.chance or 0:.3f}, "
        f"one place {first.majority:.3f}, one place for each finding {first.majority_by_label:.3f}"
    )
    if unknown:
        print(f"note: {sum(unknown.values())} boxes have a label without prompts and were left out", file=sys.stderr)
    say_rejected(RejectLog(dataset.rejected))
    if written is not None:
        print(f"page: {written}")


def parse_box(word: str, option: str = "--box") -> Box:
    """Return the box that ``x0,y0,x1,y1`` says.

    Raises:
        InputError: Not four numbers, or no area.
    """
    from chiasm.types import Box

    try:
        x0, y0, x1, y1 = (float(part) for part in word.split(","))
    except ValueError:
        raise InputError(
            f"{option} must be x0,y0,x1,y1 in pixels, got `{word}`", hint=f"{option} 10,20,60,80"
        ) from None
    if not (-math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf):
        raise InputError(f"{option} must have x0 < x1 and y0 < y1, all finite, got `{word}`")
    return Box(x0, y0, x1, y1)


def _names(word: str) -> Any:
    names = [part.strip() for part in word.split(",") if part.strip()]
    if not names:
        raise InputError("--methods names no method", hint="--methods all, or several with commas")
    return "all" if names == ["all"] else names


def _with_boxes(samples: Any, path: Path) -> Any:
    """Return the samples with the boxes of a file, by id or by the end of the image's path."""
    import dataclasses

    from chiasm.datasets.boxes import read_boxes

    known = read_boxes(path)

    def boxes_of(sample: Any) -> Any:
        image = sample.image.as_posix() if sample.image is not None else ""
        names = (sample.id, image, *("/".join(image.split("/")[-k:]) for k in (2, 1)))
        return next((known[name] for name in names if name in known), ())

    return tuple(dataclasses.replace(sample, boxes=boxes_of(sample)) for sample in samples)


def _reference(path: Path, shared: _Circumstances) -> Any:
    """Return at most ``limit`` ordinary images of a table or folder."""
    import numpy as np

    from chiasm.cli.inputs import read_images

    opening = shared.opening
    named = {"group": opening["group"], "columns": opening["column"], "root": opening["root"]}
    samples = read_images([path], None).samples if path.is_dir() else read_images(None, path, **named).samples
    if len(samples) <= shared.limit:
        return samples
    rows = np.sort(np.random.default_rng(shared.seed).permutation(len(samples))[: shared.limit])
    return tuple(samples[int(i)] for i in rows)


def _examples(encoder: Encoder, cases: Any, methods: Any, count: int, seed: int) -> list[Any]:
    if not count:
        return []
    import numpy as np

    from chiasm.explain.methods import explain

    rows = np.sort(np.random.default_rng(seed).permutation(len(cases))[:count])
    names = [m.method for m in methods if m.method != "centre"]
    shown = []
    for case in (cases[int(i)] for i in rows):
        heats = [
            explain(encoder, case.open(), case.texts, method=name, against=() if name == "gloria" else case.against)
            for name in names
        ]
        shown.append((case, heats))
    return shown


def _card(
    encoder: Encoder, images: list[Any], texts: list[str], settings: dict[str, Any], shared: _Circumstances
) -> Any:
    """Return what the numbers rest on: digests of the pixels and the texts."""
    import hashlib

    from chiasm.evaluate.run_card import RunCard, package_versions
    from chiasm.types import digest_of

    pixels = hashlib.sha256()
    for image in images:
        pixels.update(f"{image.mode}{image.size}".encode())
        pixels.update(image.tobytes())
    return RunCard(
        command="chiasm explain",
        data={"images": pixels.hexdigest()[:12]},
        rows={"images": len(images)},
        model=str(encoder.space),
        seed=shared.seed,
        prompts=digest_of(texts),
        settings=settings,
        seconds=time.perf_counter() - shared.began,
        versions=package_versions(),
    )
