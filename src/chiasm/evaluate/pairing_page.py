"""Pairs to a page: what was done, how alike pairs are, who shares a report, what chance would give, examples, an audit.

Comes in: a run, its scores, and the images for the examples. Goes out: a :class:`~chiasm.evaluate.page.Page`. Texts,
pictures and ids are on it only where examples were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import chiasm
from chiasm.datasets.images import open_sample_image
from chiasm.errors import ChiasmError
from chiasm.evaluate.page import (
    Block,
    Commands,
    Excerpt,
    Excerpts,
    Figure,
    KeyNumber,
    Note,
    Page,
    Picture,
    Section,
    Table,
    picture_source,
)
from chiasm.evaluate.pairing_figures import distributions, load_curve
from chiasm.evaluate.pairing_scores import Audit, PairingScores
from chiasm.io.manifest import count_reasons
from chiasm.metrics.pairing import quantiles
from chiasm.types import Interval, Sample

if TYPE_CHECKING:
    from chiasm.pairing import PairingRun

#: Letters of a report that are shown before and after the marked chunk.
CONTEXT_LETTERS = 420
#: A report that more than this share of the images have is warned of.
MOST = 0.5
_PICTURE_PX = 240
_AGGREGATES = {
    "max": "its nearest chunk",
    "mean": "the mean over its chunks",
    "top_mean": "the mean over its three nearest chunks",
}
_CORRECTIONS = {
    "none": "none",
    "csls": "CSLS: less half the mean similarity of a report with its ten nearest images",
    "inverted_softmax": "inverted softmax: less the log-mean-exp of a report's similarities with all images",
}


def pairing_page(
    run: PairingRun, scores: PairingScores, samples: Sequence[Sample], *, examples: int = 0, folder: str = "pairs"
) -> Page:
    """Return the page.

    Args:
        run: From :func:`chiasm.pairing.pair_reports`.
        scores: From :func:`chiasm.evaluate.pairing_scores.score_pairing`.
        samples: The images, for the examples.
        examples: Pairs to show with picture and text; 0: none, and the page holds nothing of a patient.
        folder: Name of the folder of pairs, for the commands.
    """
    corrected = run.pairs.header.correction != "none"
    sections = [_made_of(run, scores), _similarity(scores, corrected), _sharing(scores), _control(scores)]
    if scores.audit is not None:
        sections.append(_audit(scores.audit))
    if examples and scores.paired:
        sections.append(_examples(run, samples, examples))
    sections.append(_go_on(folder))
    return Page(
        title="Images and their reports",
        subtitle=f"{scores.images:,} images that came without a report, each beside the nearest of {scores.distinct_reports:,} "
        "reports of a corpus. Nothing but the similarity of image and text decided; no label was read.",
        key_numbers=_key_numbers(scores),
        sections=tuple(sections),
        footer=(
            f"chiasm {chiasm.__version__}, space {run.pairs.header.space}, corpus digest {run.corpus.digest}, image digest "
            f"{run.pairs.header.image_digest}.",
            "Research and teaching only; not a medical device.",
        ),
    )


def _plain(value: float, n: int, chance: float | None = None) -> Interval:
    return Interval(value, math.nan, math.nan, n, chance if chance is None or math.isfinite(chance) else None)


def _key_numbers(scores: PairingScores) -> tuple[KeyNumber, ...]:
    own, random = quantiles(scores.similarity)["p50"], quantiles(scores.random_similarity)["p50"]
    used = scores.hubness.used
    found = [
        KeyNumber(
            "images with a report",
            _plain(scores.paired / scores.images, scores.images),
            f"{scores.paired:,} of {scores.images:,}",
        ),
        KeyNumber("similarity of a pair", _plain(own, scores.images, random), "median cosine"),
        KeyNumber("lead over the second report", _plain(quantiles(scores.margin)["p50"], scores.images), "median"),
        KeyNumber(
            "reports in use",
            _plain(used / scores.distinct_reports, scores.distinct_reports),
            f"{used:,} of {scores.distinct_reports:,}; one has {scores.hubness.max_load:,} images",
        ),
    ]
    if scores.audit is not None:
        nmi = scores.audit.pairs.nmi
        found.append(
            KeyNumber(f"agreement with “{scores.audit.column}”", _plain(nmi.value, nmi.n, nmi.chance), "audit only")
        )
    return tuple(k for k in found if math.isfinite(k.interval.value))


def _made_of(run: PairingRun, scores: PairingScores) -> Section:
    header = run.pairs.header
    repeated = scores.reports - scores.distinct_reports
    least = "none: every image gets a report"
    if header.min_similarity is not None:
        left_out = scores.images - scores.paired
        why = {
            "given": "as asked for",
            "auto": "what the median image without content reaches: the same image vectors with the signs of their "
            "principal components drawn at random",
        }[header.min_similarity_rule]
        least = (
            f"{header.min_similarity:.4f} ({why}); it leaves {left_out:,} of {scores.images:,} images without a report"
        )
    rows: list[tuple[object, ...]] = [
        ("encoder", f"{header.space}"),
        ("images", f"{scores.images:,}" + (f"; {scores.rejected:,} could not be read" if scores.rejected else "")),
        (
            "corpus",
            f"{header.corpus}: {scores.reports:,} reports"
            + (f"; {repeated:,} with the text of an earlier one, passed over" if repeated else ""),
        ),
        *(
            (f"not usable: {reason}", f"{count:,} rows of the corpus")
            for reason, count in count_reasons(run.corpus.rejected).items()
        ),
        *(
            (f"filter: {f.what.replace('`', '')}", f"{f.kept:,} kept, {f.dropped:,} dropped")
            for f in run.corpus.filters
        ),
        ("patients on both sides", _shared(scores.shared_patients)),
        (
            "long reports",
            f"{scores.long_reports:,} are longer than the {header.chunking.get('context_length')} tokens of the text side "
            f"and were cut at sentence ends: {scores.chunks:,} chunks in all, nothing dropped",
        ),
        ("similarity of a report", f"cosine of the image with {_AGGREGATES[header.aggregate]}"),
        ("reports an image", f"up to {header.k}"),
        ("correction of hubs", _CORRECTIONS[header.correction]),
        ("least similarity", least),
    ]
    return Section(
        "What was done",
        "Both sides were embedded once and compared exactly, every image with every report; equal similarities go to the "
        "report that comes first.",
        (Table(("", ""), tuple(rows)),),
    )


def _similarity(scores: PairingScores, corrected: bool) -> Section:
    line = None if scores.min_similarity is None else (scores.min_similarity, "least similarity")
    columns = quantiles([])
    rows = tuple(
        (name, *(_number(v) for v in quantiles(values).values()))
        for name, values in (
            ("nearest report", scores.similarity),
            ("a report at random", scores.random_similarity),
            ("lead over the second", scores.margin),
        )
    )
    leads: tuple[Block, ...] = ()
    if np.isfinite(scores.margin).any():  # a corpus of one report has no second
        leads = (
            Figure(
                distributions({"lead": scores.margin}, xlabel="similarity of the best report less that of the second"),
                "Near 0 the choice between the first two reports is a matter of chance."
                + (" Of similarities after the correction." if corrected else ""),
            ),
        )
    return Section(
        "How near is the nearest report",
        "A similarity says little by itself; how far it lies from that of a report chosen at random says more. A small "
        "lead means that the second report would have done as well.",
        (
            Figure(
                distributions(
                    {"nearest report": scores.similarity, "a report at random": scores.random_similarity},
                    xlabel="cosine of image and report",
                    line=line,
                ),
                "Where the two curves lie on each other, pairing has chosen nothing.",
            ),
            *leads,
            Table(("", *(f"{int(c[1:])} %" for c in columns)), rows, "Quantiles over images."),
        ),
    )


def _sharing(scores: PairingScores) -> Section:
    one, other = scores.hubness, scores.random_hubness

    def row(name: str, note: str, attribute: str, whole: bool = False) -> tuple[object, ...]:
        cells = [getattr(h, attribute) for h in (one, other)]
        return (name, *(f"{c:,}" if whole else _number(c, 2) for c in cells), note)

    return Section(
        "How many images share a report",
        "In a space of many dimensions some texts are near to everything. Such hubs give many images the same report, and "
        "a classifier learns little from them; the option --correction csls takes images from them.",
        (
            *_one_for_most(scores),
            Figure(
                load_curve(scores.loads, scores.random_loads),
                "Each step is one report; the area is the number of images.",
                wide=True,
            ),
            Table(
                ("", "pairs", "at random", ""),
                (
                    row("reports in use", f"of {scores.distinct_reports:,}", "used", whole=True),
                    row("images of the most used report", f"of {scores.paired:,}", "max_load", whole=True),
                    row("share of images with the most used 1 % of reports", "", "top_share"),
                    row("effective number of reports", "as many, equally used, are as varied", "effective"),
                    row("Gini index", "0: all equally used; near 1: few have all", "gini"),
                    row("skewness", "above about 1 there are hubs", "skewness"),
                    (
                        "chunks of a chosen report, mean",
                        _number(scores.chosen_chunks, 1),
                        _number(scores.chunks / scores.distinct_reports, 1),
                        "the nearest of many chunks is near by chance: long reports win unless --aggregate mean or a "
                        "correction evens it out",
                    ),
                ),
                "At random: every image draws a report, whatever it shows.",
            ),
        ),
    )


def _one_for_most(scores: PairingScores) -> tuple[Block, ...]:
    """Return a warning where most images have one and the same report."""
    load, paired = scores.hubness.max_load, scores.paired
    if paired < 2 or load <= MOST * paired or scores.distinct_reports < 2:
        return ()
    which = "All" if load == paired else f"{load:,} of"
    text = f"{which} {paired:,} images have one and the same report: these pairs tell images apart hardly or not at all, and "
    return (Note(text + "little can be learned from them. Another encoder is needed, or a correction.", "warning"),)


def _control(scores: PairingScores) -> Section:
    own, random = quantiles(scores.similarity)["p50"], quantiles(scores.random_similarity)["p50"]
    rows: list[tuple[object, ...]] = [
        ("median similarity", _number(own), _number(random)),
        ("share of images whose pair is nearer than the shuffled one", _number(scores.nearer_than_random), "0.500"),
    ]
    if scores.audit is not None:
        a, b = scores.audit.pairs, scores.audit.shuffled
        rows.append((f"agreement with “{scores.audit.column}” beyond chance", _number(a.adjusted), _number(b.adjusted)))
    return Section(
        "Control: the same reports, shuffled",
        "The chosen reports are dealt out to the images again at random, so that every report keeps its number of images. "
        "What shuffled reports have too was not found by pairing. The command chiasm distill --controls trains on them as "
        "well.",
        (Table(("", "pairs", "shuffled"), tuple(rows)),),
    )


def _audit(audit: Audit) -> Section:
    def row(name: str, a: object, b: object, note: str = "") -> tuple[object, ...]:
        return (name, a, b, note)

    one, other = audit.pairs, audit.shuffled
    known = "" if one.permuted == "images" else " Labels were permuted by patient, not by image."
    verdict = (
        f"Reports tell something about “{audit.column}”: p = {one.p_value:.3f} against permuted labels."
        if one.p_value < 0.05
        else f"Reports tell nothing about “{audit.column}” that chance would not: p = {one.p_value:.3f}."
    )
    return Section(
        f"Audit: do the reports agree with {audit.column}",
        f"{verdict} Labels were compared with the finished pairs; they took no part in them and must not choose options "
        "of pairing either.",
        (
            Table(
                ("", "pairs", "shuffled", ""),
                (
                    row("normalised mutual information", _number(one.nmi.value), _number(other.nmi.value)),
                    row("by chance", _number(one.nmi.chance), _number(other.nmi.chance), "mean over permuted labels"),
                    row("beyond chance", _number(one.adjusted), _number(other.adjusted), "0: none, 1: complete"),
                    row("p", _number(one.p_value), _number(other.p_value), "share of permutations that reach it"),
                    row("purity", _number(one.purity.value), _number(other.purity.value),
                        f"images with the commonest label of their report; by chance {_number(one.purity.chance)}"),
                ),
                f"{one.nmi.n:,} images with report and label. Many reports agree with any labels by chance, hence the null. "
                "An encoder that merely groups images by their look agrees, too: whether the words of the reports matter, "
                "only training with shuffled and with random texts can tell." + known,
            ),
        ),
    )  # fmt: skip


def _examples(run: PairingRun, samples: Sequence[Sample], count: int) -> Section:
    by_id = {s.id: s for s in samples}
    paired = np.flatnonzero(run.pairing.paired)
    order = paired[np.argsort(-run.pairing.similarity[paired, 0], kind="stable")]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))]
    rows = [
        e for row in chosen.tolist() if (e := _excerpt(run, row, by_id.get(run.pairing.image_ids[row]))) is not None
    ]
    blocks: tuple[Block, ...] = (
        Note(
            "These are pictures and texts of patients. Keep this page where patient data may lie, or make it again with "
            "the option --examples 0.",
            "warning",
        ),
        Excerpts(
            tuple(rows),
            "The chunk of the report that is nearest to the image is marked. The report was not written about this "
            "image: what it names need not be there.",
        ),
    )
    return Section(
        "Pairs side by side",
        f"{len(rows)} of {len(paired):,} pairs, evenly spaced from the nearest to the farthest.",
        blocks,
    )


def _excerpt(run: PairingRun, row: int, sample: Sample | None) -> Excerpt | None:
    if sample is None:
        return None
    try:
        image = open_sample_image(sample)
    except ChiasmError:
        return None
    pairing = run.pairing
    piece = run.pieces[int(pairing.chunk_rows[row, 0])]
    report = run.corpus[piece.report]
    before, after = report.text[: piece.start], report.text[piece.end :]
    pieces = sum(p.report == piece.report for p in run.pieces)
    lead = pairing.margin[row]
    facts = f"similarity {pairing.similarity[row, 0]:.3f}" + (f", lead {lead:.3f}" if math.isfinite(lead) else "")
    return Excerpt(
        Picture(picture_source(image, width_px=min(_PICTURE_PX, max(image.width, 96))), (sample.id,), alt="image"),
        facts,
        (
            f"report {report.id}"
            + (f", one of {pieces} chunks marked" if pieces > 1 else "")
            + (f", {report.tissue}" if report.tissue else ""),
        ),
        before if len(before) <= CONTEXT_LETTERS else "… " + before[-CONTEXT_LETTERS:].partition(" ")[2],
        piece.text,
        after if len(after) <= CONTEXT_LETTERS else after[:CONTEXT_LETTERS].rpartition(" ")[0] + " …",
    )


def _shared(count: int | None) -> str:
    if count is None:
        return "unknown: images or reports do not say whose they are"
    return f"{count:,}: some reports may be the images' own" if count else "none"


def _go_on(folder: str) -> Section:
    return Section(
        "Go on",
        "The pairs know encoder, corpus and images that they were made from, and refuse others.",
        (
            Commands(f'[pairing]\npairs = "{folder}"', "In a recipe of chiasm distill, with the same images."),
            Commands(
                "from chiasm.io.pairs import load_pairs\n\n"
                f'pairs = load_pairs("{folder}", corpus_digest=..., space=...)\n'
                "targets, similarity, mask = pairs.targets(image_ids, top_k=1)",
                "In Python: text vectors as targets.",
            ),
        ),
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
