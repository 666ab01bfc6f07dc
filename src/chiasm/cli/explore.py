"""Map embeddings, cluster them, and say how far either can be believed."""

from __future__ import annotations

import csv
import io
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    from chiasm.encoders.base import Encoder
    from chiasm.evaluate.explore_scores import Exploration
    from chiasm.evaluate.run_card import RunCard
    from chiasm.types import Embeddings


OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write: map.html, index.html, points.csv ...")]
MethodOption = Annotated[str, typer.Option("--method", help="The map: tsne, umap (extra `analysis`), pca.")]
ClustersOption = Annotated[
    str, typer.Option("--clusters", help="kmeans:8, kmeans (k by its stability), hdbscan, hdbscan:15, none.")
]
ColorOption = Annotated[
    list[str] | None,
    typer.Option("--color", "--label", help="Label column to colour by and compare with clusters; may be repeated."),
]
SideOption = Annotated[str, typer.Option("--side", help="image, text, both; auto: what there is.")]
CenterOption = Annotated[
    bool, typer.Option("--center", help="Take each side's mean out, so that images and texts share one cloud.")
]
ThumbnailsOption = Annotated[bool, typer.Option("--thumbnails", help="Put small pictures into map and page.")]
BudgetOption = Annotated[float, typer.Option("--thumbnail-mb", min=0.1, help="Most that they may weigh.")]
TextsOption = Annotated[bool, typer.Option("--texts", help="Put the rows' texts into the map.")]
TermsOption = Annotated[
    str | None,
    typer.Option(
        "--terms", help="Vocabulary, or file of one term a line: the nearest describe a cluster; needs --model."
    ),
]
ComponentsOption = Annotated[
    int | None, typer.Option("--components", min=0, help="Principal components to start from; 0: none, all dimensions.")
]
PerplexityOption = Annotated[float | None, typer.Option("--perplexity", help="Of t-SNE.")]
NeighborsOption = Annotated[int, typer.Option("--neighbors", min=2, help="Of UMAP.")]


def run(
    store: StoreOption = None,
    table: TableOption = None,
    model: ModelOption = "",
    out: OutOption = Path("explored"),
    method: MethodOption = "tsne",
    clusters: ClustersOption = "kmeans",
    color: ColorOption = None,
    side: SideOption = "auto",
    center: CenterOption = False,
    thumbnails: ThumbnailsOption = False,
    thumbnail_mb: BudgetOption = 12.0,
    texts: TextsOption = False,
    terms: TermsOption = None,
    components: ComponentsOption = None,
    perplexity: PerplexityOption = None,
    neighbors: NeighborsOption = 15,
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
    """Map, cluster, compare with labels; write the folder."""
    from chiasm.cli.inputs import load_encoder
    from chiasm.evaluate.explore_scores import explore
    from chiasm.evaluate.run_card import make_run_card
    from chiasm.tasks.clustering import COMPONENTS, parse_clusters

    began = time.monotonic()
    _check_options(method, side, out)
    settings = None if clusters == "none" else parse_clusters(clusters, components=components, seed=seed)
    if terms is not None and (settings is None or not model):
        raise InputError("--terms needs --clusters, and --model to embed the terms")
    encoder = None
    if table is not None or terms is not None:
        encoder = load_encoder(model, device=device, precision=precision, family=family, allow_code=allow_code)
    read = partial(
        open_vectors,
        store=store, table=table, split=split, group=group, column=column, root=root, batch_size=batch_size,
        as_json=as_json, encoder=encoder,
    )  # fmt: skip
    own, other = _sides(read, side, table, encoder)
    words = None if terms is None else _terms(cast("Encoder", encoder), terms)
    found = explore(
        own, other, clusters=settings, colour=tuple(color or ()), terms=words,
        progress=make_progress(as_json, unit="draws"), method=method, seed=seed, engine="opentsne",
        perplexity=perplexity, umap_neighbors=neighbors, center_modalities=center,
        components=(COMPONENTS if own.dim > COMPONENTS else 0) if components is None else components,
    )  # fmt: skip
    chosen = {"method": method, "clusters": clusters, "components": components, "centered": center}
    card = make_run_card(
        f"chiasm explore --method {method} --clusters {clusters}",
        {f"{e.modality}s": e for e in (own, other) if e is not None},
        seed=seed,
        settings={**chosen, **found.projection.settings},
        prompts=None if words is None else words.texts,  # type: ignore[arg-type]  # embedded from texts
        seconds=time.monotonic() - began,
    )
    result = _write(out, found, card, thumbnails, thumbnail_mb, texts, as_json)
    if as_json:
        print_json(result)
        return
    _say(found, result)


def _check_options(method: str, side: str, out: Path) -> None:
    """Miss what is wrong, and an absent package, before minutes of embedding, not after."""
    from importlib.util import find_spec

    from chiasm.errors import MissingExtra

    if side not in ("auto", "image", "text", "both"):
        raise InputError(f"--side must be auto, image, text or both, got `{side}`")
    if method not in ("tsne", "umap", "pca"):
        raise InputError(f"--method must be tsne, umap or pca, got `{method}`")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out `{out.name}` is a file; an exploration is a folder", hint="name another")
    for name, module, package in (("tsne", "openTSNE", "openTSNE"), ("umap", "umap", "umap-learn")):
        if method == name and find_spec(module) is None:
            raise MissingExtra(package, "analysis")


def _sides(read: Any, side: str, table: Path | None, encoder: Encoder | None) -> tuple[Embeddings, Embeddings | None]:
    """Return what is clustered, and what is mapped beside it."""
    if side in ("image", "text"):
        return read(side=side), None
    if side == "both":
        return read(side="image"), read(side="text")
    found: list[Embeddings] = []
    for name in ("image", "text"):
        if table is not None and encoder is not None and not getattr(encoder.config, f"has_{name}"):
            continue
        try:
            found.append(read(side=name))
        except InputError as error:
            missing = error
    if not found:
        raise missing
    return found[0], found[1] if len(found) == 2 else None


def _terms(encoder: Encoder, source: str) -> Embeddings:
    from chiasm.embed import embed_texts
    from chiasm.tasks.terms import load_vocabulary

    return embed_texts(encoder, list(load_vocabulary(source).terms))


def _write(
    out: Path, found: Exploration, card: RunCard, thumbnails: bool, budget_mb: float, texts: bool, as_json: bool
) -> dict[str, Any]:
    """Write map, page, points and numbers; return what ``--json`` prints."""
    from chiasm.evaluate.explore_map import make_thumbnails, render_map
    from chiasm.evaluate.explore_page import explore_page, map_notes
    from chiasm.evaluate.page import Note, save_page
    from chiasm.io.manifest import write_bytes_atomic, write_json_atomic

    out.mkdir(parents=True, exist_ok=True)
    parts = [e for e in (found.embeddings, found.other) if e is not None]
    notes = map_notes(found)
    pictures = None
    if thumbnails:
        paths = [p for e in parts for p in (e.paths or (None,) * len(e))]
        pictures = make_thumbnails(
            paths, budget_mb=budget_mb, seed=found.projection.seed, progress=make_progress(as_json, unit="images")
        )
        notes.append(Note(pictures.note))
    if thumbnails or texts:
        notes.append(Note("This file holds data of patients. Keep it where patient data may lie.", "warning"))
    page = render_map(
        found.projection.xy,
        found.projection.ids,
        found.columns,
        title="Map of embeddings",
        subtitle=f"{len(found.projection):,} rows · {found.projection.method} · {found.projection.space}",
        notes=notes,
        modalities=found.projection.modalities,
        texts=[t for e in parts for t in (e.texts or (None,) * len(e))] if texts else None,
        thumbnails=pictures,
    )
    write_bytes_atomic(out / "map.html", page.encode())
    save_page(
        explore_page(found, card, pictures=(found.embeddings.paths or ()) or None if thumbnails else None),
        out / "index.html",
    )
    _write_points(out, found)
    numbers = {
        **found.to_dict(),
        "thumbnails": None if pictures is None else {"shown": pictures.shown, "of": pictures.of},
        "run_card": card.to_dict(),
    }
    write_json_atomic(out / "results.json", numbers)
    files = {
        "map": "map.html",
        "page": "index.html",
        "points": "points.csv",
        "parquet": "points.parquet",
        "results": "results.json",
    }
    return {**numbers, "files": {name: str(out / file) for name, file in files.items()}}


def _write_points(out: Path, found: Exploration) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    from chiasm.io.manifest import write_bytes_atomic

    table: dict[str, list[Any]] = {
        "id": list(found.projection.ids),
        "modality": list(found.projection.modalities),
        "x": [float(x) for x in found.projection.xy[:, 0]],
        "y": [float(y) for y in found.projection.xy[:, 1]],
    }
    for c in found.columns:
        if c.name != "side":
            table[c.name] = [c.categories[code] if code >= 0 else None for code in c.codes.tolist()]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    write_bytes_atomic(out / "points.csv", buffer.getvalue().encode(errors="surrogateescape"))
    sink = io.BytesIO()
    parquet.write_table(pa.table(table), sink)
    write_bytes_atomic(out / "points.parquet", sink.getvalue())


def _say(found: Exploration, result: dict[str, Any]) -> None:
    print(found.projection.faith.note)
    print(found.projection.warning)
    if found.projection.gap is not None:
        print(found.projection.gap.note)
    if found.clustering is not None:
        print(f"{found.clustering.settings.name}: {found.clustering.structure.verdict}")
    if found.agreement:
        rows = [
            [
                name,
                *(f"{a.scores[s]}" for s in ("ari", "ami", "purity")),
                f"{a.scores['purity'].chance:.3f}",
                f"{a.p_value:.3f}",
            ]
            for name, a in found.agreement.items()
        ]
        print_table(["agreement with", "ARI", "AMI", "purity", "purity by chance", "p"], rows)
    print(f"page: {result['files']['page']}")
    print(f"map: {result['files']['map']}")
