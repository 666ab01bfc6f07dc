"""The demo's page: what a CLIP learnt, in numbers with intervals and in pictures that anyone can judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluate.figures import grouped_bars, interval_dots, point_map, similarity_matrix, training_curve
from chiasm.evaluate.page import (
    Block,
    Commands,
    Figure,
    Gallery,
    KeyNumber,
    Note,
    Page,
    Picture,
    Section,
    Table,
    picture_source,
)
from chiasm.types import Box, Interval

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.evaluate.demo import DemoParts

#: Names as a reader says them.
SPOKEN = {
    "oedema": "pulmonary oedema",
    "effusion": "pleural effusion",
    "device": "support device",
    "no_finding": "no finding",
}
MATRIX_ROWS = 24
QUERIES = (
    "There is a large left-sided pleural effusion.",
    "There is a large right-sided pleural effusion.",
    "Severe cardiomegaly.",
    "There is a moderate right apical pneumothorax.",
    "left-sided dual-chamber pacemaker",
)


def spoken(name: str) -> str:
    """Return a finding's name with words apart."""
    return SPOKEN.get(name, name.replace("_", " "))


def make_demo_page(parts: DemoParts) -> Page:
    """Compose the page from the parts of one run."""
    r = parts.retrieval
    data = parts.results["data"]
    return Page(
        title="A CLIP learns to read synthetic chest films",
        subtitle=(
            f"Pretrained from scratch on {data['training']['train']['pairs']} drawn films with reports by the contrastive loss, "
            f"then tested on {len(parts.test)} films of {data['test_patients']} patients that it has never seen. "
            "Everything on this page is synthetic; no patient is shown."
        ),
        key_numbers=(
            KeyNumber("zero-shot, macro AUROC", parts.scores.macro_auroc),
            KeyNumber("left or right, macro AUROC", parts.laterality.macro_auroc),
            KeyNumber("text → image, R@10", r.text_to_image.recall_at_10),
            KeyNumber("image → text, R@10", r.image_to_text.recall_at_10),
            KeyNumber("heat maps, pointing game", parts.pointing.pointing_game),
        ),
        sections=(
            _learning(parts),
            _zero_shot(parts),
            _search(parts),
            _maps(parts),
            _space(parts),
            _steps(parts),
            _go_on(parts),
        ),
        footer=(
            f"chiasm {parts.results['versions']['chiasm']}, torch {parts.results['versions']['torch']}, seed {parts.results['seed']}, "
            f"space {parts.encoder.space}.",
            "Intervals: 95 %, bootstrap over patients. Research and teaching only; not a medical device.",
        ),
    )


def _learning(parts: DemoParts) -> Section:
    train = [line for line in parts.trained.log if line.get("kind") == "train"]
    checks = [line for line in parts.trained.log if line.get("kind") == "validation"]
    names = {"recall_at_10": "R@10"}
    curves = {label: [(line["step"], line[key]) for line in checks if key in line] for key, label in names.items()}
    rows = _distinct_rows(parts, MATRIX_ROWS)
    cosines = parts.images.vectors[rows] @ parts.reports.vectors[rows].T
    blocks: list[Block] = [
        Figure(
            training_curve(
                [line["step"] for line in train],
                [line["loss"] for line in train],
                curves,
                chance_loss=float(np.log(parts.results["training"]["batch_size"])),
            ),
            "Contrastive loss of each batch, and recall at 10 on validation patients. The weights with the lowest loss on validation patients are kept; the films below were not among them.",
        ),
        Figure(
            similarity_matrix(cosines),
            f"What the loss sees: cosines of {len(rows)} held-out films and their reports. Framed: the pairs that belong together. "
            "Bright squares elsewhere are often right too: two patients can have the same findings.",
        ),
    ]
    return Section(
        "Learning",
        "Two encoders, one space: images and reports of one examination are drawn together, others apart.",
        tuple(blocks),
    )


def _distinct_rows(parts: DemoParts, count: int) -> np.ndarray:
    """Return one image per patient, so that the matrix holds no near-duplicates by design."""
    seen: set[str] = set()
    rows = []
    for i, sample in enumerate(parts.test.samples):
        if sample.group not in seen:
            seen.add(sample.group)
            rows.append(i)
    return np.asarray(rows[:count])


def _zero_shot(parts: DemoParts) -> Section:
    intervals = {spoken(s.label): s.auroc for s in parts.scores.per_label}
    sides = {spoken(s.label): s.auroc for s in parts.laterality.per_label}
    rows = [
        (
            spoken(s.label),
            str(s.auroc),
            str(s.auprc),
            f"{s.positives}",
            f"{s.negatives}",
            f"{s.positives / (s.positives + s.negatives):.2f}",
        )
        for s in parts.scores.per_label
    ]
    return Section(
        "Classification by sentences",
        "No label was used in training. Each finding is scored by how much closer a film lies to sentences that state it than to sentences that deny it.",
        (
            Figure(
                interval_dots(intervals, xlabel="AUROC", limits=(0.45, 1.08)), "Findings, with intervals over patients."
            ),
            Figure(
                interval_dots(sides, xlabel="AUROC", limits=(0.45, 1.08)),
                "Which side is it on? Films with the finding on one side only, left against right.",
            ),
            Table(
                ("finding", "AUROC", "AUPRC", "present", "absent", "AUPRC by chance"),
                tuple(rows),
                "A constant answer (the majority) has AUROC 0.500 for every finding.",
            ),
        ),
    )


def _search(parts: DemoParts) -> Section:
    from chiasm.embed import embed_texts
    from chiasm.tasks.retrieval import search

    r = parts.retrieval
    bars: dict[str, dict[str, Interval]] = {
        "text → image": {
            "R@1": r.text_to_image.recall_at_1,
            "R@5": r.text_to_image.recall_at_5,
            "R@10": r.text_to_image.recall_at_10,
        },
        "image → text": {
            "R@1": r.image_to_text.recall_at_1,
            "R@5": r.image_to_text.recall_at_5,
            "R@10": r.image_to_text.recall_at_10,
        },
    }
    found = search(embed_texts(parts.encoder, list(QUERIES)), parts.images, k=6)
    index = {name: i for i, name in enumerate(parts.images.ids)}
    gallery = []
    for query, answers in zip(QUERIES, found.to_records(), strict=True):
        pictures = []
        for answer in answers:
            i = index[answer["id"]]
            pictures.append(
                Picture(
                    picture_source(parts.test.image(i), width_px=132),
                    (f"cosine {answer['score']:.2f}", _findings_of(parts, i)),
                    mark="right" if _answers_query(parts, i, query) else "wrong",
                    alt=f"synthetic film: {_findings_of(parts, i)}",
                )
            )
        gallery.append((query, tuple(pictures)))
    return Section(
        "Search",
        "The same cosines search: films for a sentence, reports for a film.",
        (
            Figure(
                grouped_bars(bars, ylabel="recall at K"),
                f"Among {len(parts.images)} films. Right: the film's own report, or one with the same words.",
            ),
            Table(
                ("direction", "R@1", "R@5", "R@10", "median rank"),
                tuple(
                    (k, str(v["R@1"]), str(v["R@5"]), str(v["R@10"]), str(d.median_rank))
                    for (k, v), d in zip(bars.items(), (r.text_to_image, r.image_to_text), strict=True)
                ),
                f"R@10 by chance: {r.text_to_image.recall_at_10.chance:.3f}. Always the same ten films, those that serve most reports: "
                f"{r.text_to_image.majority[10]:.3f}; always the same ten reports: {r.image_to_text.majority[10]:.3f}.",
            ),
            Gallery(
                tuple(gallery),
                size_px=118,
                caption="The six films nearest to each sentence. Green: the film has what the sentence says, on that side.",
            ),
        ),
    )


def _answers_query(parts: DemoParts, row: int, query: str) -> bool:
    labels = parts.test.samples[row].labels
    text = query.lower()
    finding = next(
        name
        for word, name in (
            ("effusion", "effusion"),
            ("cardiomegaly", "cardiomegaly"),
            ("pneumothorax", "pneumothorax"),
            ("pacemaker", "device"),
        )
        if word in text
    )
    side = next((s for s in ("left", "right") if s in text), None)
    return labels[f"{finding}_{side}"] == 1 if side else labels[finding] == 1


def _findings_of(parts: DemoParts, row: int) -> str:
    labels = parts.test.samples[row].labels
    names = []
    for name in parts.test.findings:
        if labels[name] == 1 and name != "no_finding":
            side = labels.get(f"{name}_side")
            names.append(f"{side} {spoken(name)}" if side else spoken(name))
    return ", ".join(names) or "no finding"


def _maps(parts: DemoParts) -> Section:
    from chiasm.explain.heatmap import overlay

    rows = []
    for finding in dict.fromkeys(name for _, name, _ in parts.maps):
        pictures: list[Picture] = []
        for i, name, heat in parts.maps:
            if name != finding or len(pictures) >= 5:
                continue
            boxes = [b for b in parts.test.samples[i].boxes if b.label == name]
            x, y = heat.peak()
            hit = any(b.x0_px <= x < b.x1_px and b.y0_px <= y < b.y1_px for b in boxes)
            picture = overlay(parts.test.image(i), heat).resize((264, 264))
            pictures.append(
                Picture(_with_boxes(picture, boxes, 264 / parts.test.size_px, (x, y)), ("maximum inside" if hit else "maximum outside",),
                        mark="right" if hit else "wrong", alt=f"heat map for {spoken(name)}")
            )  # fmt: skip
        rows.append((spoken(finding), tuple(pictures)))
    table = tuple((spoken(n), str(v)) for n, v in parts.pointing.per_label.items())
    return Section(
        "Where it looked",
        "Heat maps for the sentences of a finding that is present. The frame is the true place, the cross the map's maximum.",
        (
            Gallery(tuple(rows), "No place was ever given in training: the maps come from the sentences alone."),
            Table(
                ("finding", "maximum inside the true box"),
                table,
                f"By chance: {parts.pointing.pointing_game.chance:.3f} over all findings (the share of the film that the boxes cover). "
                f"Always the same place, the one in most boxes: {parts.pointing.majority:.3f}; one place for each finding: "
                f"{parts.pointing.majority_by_label:.3f}.",
            ),
        ),
    )


def _with_boxes(picture: Image, boxes: Sequence[Box], scale: float, peak: tuple[int, int]) -> str:
    """Return the picture with the true places framed and a cross on the maximum."""
    from PIL import ImageDraw

    picture = picture.convert("RGB")
    draw = ImageDraw.Draw(picture)
    for b in boxes:
        draw.rectangle(
            [b.x0_px * scale, b.y0_px * scale, b.x1_px * scale, b.y1_px * scale], outline=(255, 255, 255), width=2
        )
    x, y = (peak[0] + 0.5) * scale, (peak[1] + 0.5) * scale
    draw.line([x - 8, y, x + 8, y], fill=(120, 255, 220), width=3)
    draw.line([x, y - 8, x, y + 8], fill=(120, 255, 220), width=3)
    return picture_source(picture)


def _space(parts: DemoParts) -> Section:
    from chiasm.tasks.projection import project

    rows = np.arange(min(len(parts.images), 400))
    one = []
    for i in rows:
        present = [n for n in parts.test.findings if parts.test.samples[int(i)].labels[n] == 1 and n != "no_finding"]
        one.append(spoken(present[0]) if len(present) == 1 else "several findings" if present else "no finding")
    drawn = project(parts.images.select(rows), method="tsne", seed=parts.results["seed"])
    return Section(
        "The space",
        "Each point is a film; films with the same findings lie together although no label was used.",
        (
            Figure(
                point_map(drawn.xy, one, legend="finding"),
                f"t-SNE of {len(rows)} image embeddings; trustworthiness {drawn.trustworthiness:.2f} (1: neighbours on the map are neighbours in the space).",
                wide=True,
            ),
        ),
    )


def _steps(parts: DemoParts) -> Section:
    from chiasm.embed import embed_texts
    from chiasm.tasks.inspection import inspect

    row = next(
        (
            i
            for i, s in enumerate(parts.test.samples)
            if s.labels["effusion_left"] == 1 and s.labels["effusion_side"] == "left"
        ),
        0,
    )
    texts = [
        "There is a large left-sided pleural effusion.",
        "There is a large right-sided pleural effusion.",
        "No pleural effusion.",
    ]
    shown = inspect(parts.images.select([row]), embed_texts(parts.encoder, texts))
    rows = tuple(
        (t, f"{c:+.4f}", f"{x:+.2f}", f"{p:.3f}")
        for t, c, x, p in zip(texts, shown.cosines, shown.logits, shown.probabilities, strict=True)
    )
    return Section(
        "Zero-shot in five steps, in numbers",
        f"One film with {_findings_of(parts, row)}: embed, normalise, take cosines, multiply by the logit scale, softmax.",
        (
            Gallery(
                (("the film", (Picture(picture_source(parts.test.image(row), width_px=132), alt="synthetic film"),)),)
            ),
            Table(
                ("text", "cosine", "logit", "softmax"),
                rows,
                f"Logit scale {shown.logit_scale:.2f}. Winner: {shown.winner}",
            ),
        ),
    )


def _go_on(parts: DemoParts) -> Section:
    sample = parts.test.samples[0]
    image = f"data/images/{sample.id}.png"
    lines = [
        "# in this folder:",
        f'chiasm inspect {image} "left pleural effusion" "no pleural effusion" --model model',
        f'chiasm explain {image} "There is a moderate left-sided pleural effusion." --model model --out heat.png',
        "chiasm zero-shot --table data/table.csv --labels-file data/prompts.json --multi --truth '*' --model model",
        "chiasm retrieval --table data/table.csv --model model",
        'chiasm retrieval "Severe cardiomegaly." --table data/table.csv --model model',
        "chiasm embed data/table.csv --out store --model model",
        "chiasm doctor --model model",
    ]
    python = (
        "import chiasm\n"
        'encoder = chiasm.load("model")\n'
        'texts = encoder.encode(["left pleural effusion", "no pleural effusion"], normalize_embeddings=True)'
    )
    return Section(
        "Go on",
        "The model, the held-out films and the prompts lie beside this page; these commands compute its numbers again.",
        (
            Commands("\n".join(lines)),
            Commands(python, "The same from Python."),
            Note("Drawn by a program. This model must not be used on patients.", "warning"),
        ),
    )
