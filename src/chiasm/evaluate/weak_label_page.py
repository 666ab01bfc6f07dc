"""Weak labels to a page: what the reports say, how that agrees with given labels, what a probe learns from it.

Texts of patients appear only where examples were asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.evaluate.figures import COLOURS, SOFT, draw, interval_dots
from chiasm.evaluate.page import Block, Excerpt, Excerpts, Figure, KeyNumber, Note, Page, Picture, Section, Table
from chiasm.evaluate.page import picture_source as _source
from chiasm.evaluate.run_card import RunCard, digest_of_rows, package_versions
from chiasm.evaluate.weak_label_scores import WeakLabelScores
from chiasm.evaluate.weak_probe import WeakProbeScores
from chiasm.tasks.weak_labels import WeakLabels
from chiasm.types import Embeddings, Interval, Sample, digest_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

_WORDS = {"positive": "stated", "uncertain": "doubted", "negative": "denied", "blank": "not named"}
_CONTEXT = 220


def report_card(
    weak: WeakLabels,
    samples: Sequence[Sample],
    settings: Mapping[str, Any],
    *,
    given: Mapping[str, NDArray[np.float64]] | None = None,
    images: Embeddings | None = None,
    seed: int,
    seconds: float,
) -> RunCard:
    """Return the card of a run on texts: digests of what was read and of what came out.

    Args:
        weak: Labels of the reports.
        samples: The reports.
        settings: What else can change a number.
        given: Given labels that they were compared with.
        images: Rows that a probe was trained on.
        seed: Of everything drawn.
        seconds: Wall time.
    """
    digest = hashlib.sha256()
    for s in samples:
        digest.update(f"{s.id}\0{s.group}\0{s.text or ''}\0".encode())
    made = hashlib.sha256(np.nan_to_num(weak.values, nan=-9).tobytes()).hexdigest()
    truth = {name: np.nan_to_num(column, nan=-9).tolist() for name, column in (given or {}).items()}
    more = {"given labels": digest_of(truth)} if truth else {}
    more |= {} if images is None else {"images": digest_of_rows(images)}
    sizes = {"given labels": sum(map(len, truth.values())), "images": 0 if images is None else len(images)}
    return RunCard(
        command="chiasm weak-labels",
        data={"reports": digest.hexdigest()[:12], "labels": made[:12], **more},
        rows={"reports": len(samples), "labels": weak.values.size, **{name: sizes[name] for name in more}},
        model="none" if images is None else str(images.space),
        seed=seed,
        settings=dict(settings),
        seconds=seconds,
        versions=package_versions(),
    )


def make_weak_label_page(
    weak: WeakLabels,
    card: RunCard,
    *,
    scores: WeakLabelScores | None = None,
    probes: WeakProbeScores | None = None,
    texts: Sequence[str] = (),
    examples: int = 0,
) -> Page:
    """Return the page.

    Args:
        weak: Labels of the reports.
        card: Of the run.
        scores: Agreement with given labels.
        probes: Probes trained on either.
        texts: The reports, for examples.
        examples: Reports to show with the words that decided; 0 shows no patient's text.
    """
    sections = [_said(weak)]
    if scores is not None:
        sections.append(_agreement(scores))
    if probes is not None:
        sections.append(_probes(probes))
    if examples > 0 and texts:
        sections.append(_examples(weak, texts, examples))
    sections.append(card.section())
    return Page(
        title="Labels from reports",
        subtitle=f"{len(weak.ids):,} reports of {len(set(weak.patients)):,} patients, {len(weak.findings)} findings. A label "
        "says what was written, not what a film shows.",
        key_numbers=_key_numbers(weak, scores, probes),
        sections=tuple(sections),
        footer=("Research and teaching only; not a medical device.",),
    )


def _key_numbers(
    weak: WeakLabels, scores: WeakLabelScores | None, probes: WeakProbeScores | None
) -> tuple[KeyNumber, ...]:
    n = len(weak.ids)
    named = sum(bool(m) for m in weak.mentions) / max(n, 1)
    found = [KeyNumber("reports that name a finding", Interval(named, np.nan, np.nan, n), "stated, denied or doubted")]
    if scores is not None and np.isfinite(scores.macro_f1):
        f1 = Interval(scores.macro_f1, np.nan, np.nan, n)
        found.append(KeyNumber("F1 against given labels", f1, f"mean over {len(scores.averaged)} findings"))
    if probes is not None:
        mean = [float(np.mean([getattr(p, k).value for p in probes.findings.values()])) for k in ("weak", "given")]
        number = Interval(mean[0], np.nan, np.nan, n, 0.5)
        found.append(KeyNumber("AUROC of a probe on weak labels", number, f"on given labels: {mean[1]:.3f}"))
    return tuple(found)


def _said(weak: WeakLabels) -> Section:
    counts = weak.counts()
    rows = tuple((name, *(f"{c[k]:,}" for k in _WORDS)) for name, c in counts.items())
    return Section(
        "What the reports say",
        "Of several mentions in a report a stated one beats a doubted one, and that a denied one. What is not named is "
        "neither present nor absent until a policy says so.",
        (
            Figure(
                _shares(counts),
                "Share of reports that state, doubt, deny a finding; the rest do not name it.",
                wide=True,
            ),
            Table(("finding", *_WORDS.values()), rows),
        ),
    )


def _shares(counts: Mapping[str, Mapping[str, int]]) -> str:
    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        names = list(counts)[::-1]
        left = np.zeros(len(names))
        for key, colour in zip(
            ("positive", "uncertain", "negative"), (COLOURS[1], COLOURS[4], COLOURS[0]), strict=True
        ):
            share = np.array([counts[n][key] / max(1, sum(counts[n].values())) for n in names])
            axes.barh(range(len(names)), share, left=left, color=colour, height=0.66, label=_WORDS[key])
            left += share
        axes.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of reports", color=SOFT)
        axes.grid(visible=False, axis="y")
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return draw(7.8, 0.3 * len(counts) + 0.9, paint)


def _agreement(scores: WeakLabelScores) -> Section:
    rows = []
    for name, a in scores.findings.items():
        rows.append((name, f"{a.positives:,} of {a.n:,}", *(_cell(v) for v in (a.precision, a.recall, a.f1)),
                     f"{a.always:.3f}" if a.positives else "–", _cell(a.kappa)))  # fmt: skip
    kinds = []
    for name, k in scores.kinds.items():
        one, zero = k["given 1"], k["given 0"]
        kinds.append(
            (name, one["stated"], one["doubted"], one["denied"], one["not named"], zero["stated"], zero["doubted"])
        )
    known = {n.replace("_", " "): a.f1 for n, a in scores.findings.items() if np.isfinite(a.f1.value)}
    return Section(
        "Agreement with the given labels",
        f"Doubt counts as: {scores.uncertain}; a finding that is not named as: {scores.blank}. The given labels may be wrong "
        "too, or mean something else by the same name.",
        (
            Figure(
                interval_dots(known, xlabel="F1", limits=(0, 1.08)),
                "Chance: labels drawn with the same share.",
                wide=True,
            ),
            Table(
                ("finding", "given", "precision", "recall", "F1", "F1 of “always”", "kappa"),
                tuple(rows),
                "Intervals resample patients. “Always”: every report is called positive.",
            ),
            Table(
                ("", "given and stated", "doubted", "denied", "not named", "not given but stated", "but doubted"),
                tuple(kinds),
                "Where both differ, by kind.",
            ),
        ),
    )


def _probes(probes: WeakProbeScores) -> Section:
    rows = [
        (
            name,
            f"{p.trained_weak:,} / {p.trained_given:,}",
            f"{p.weak.n:,}",
            p.weak,
            p.given,
            p.difference,
            f"{p.p_value:.3f}" if np.isfinite(p.p_value) else "–",
        )
        for name, p in probes.findings.items()
    ]
    blocks: list[Block] = [
        Table(
            ("finding", "trained on", "test", "AUROC, weak labels", "AUROC, given labels", "difference", "p"),
            tuple(rows),
            "Logistic regression on the same vectors; C chosen on held-back training patients; test labels are the given "
            "ones. Chance is 0.5. p is not adjusted for the number of findings.",
        )
    ]
    if probes.left_out:
        blocks.append(Note("Left out: " + "; ".join(f"{n} ({why})" for n, why in probes.left_out.items()) + "."))
    return Section(
        "A probe on either", "What a classifier of images loses when its labels were read from reports.", tuple(blocks)
    )


def _examples(weak: WeakLabels, texts: Sequence[str], count: int) -> Section:
    from PIL import Image

    swatches = {
        value: Picture(_source(Image.new("RGB", (34, 34), colour)), (), alt=word)
        for value, word, colour in ((1, "stated", COLOURS[1]), (0, "denied", COLOURS[0]), (-1, "doubted", COLOURS[4]))
    }
    rows = []
    spoken = [i for i, mentions in enumerate(weak.mentions) if mentions]
    for i in [
        spoken[k] for k in np.unique(np.linspace(0, len(spoken) - 1, min(count, len(spoken))).round().astype(int))
    ]:
        text = texts[i]
        for m in weak.mentions[i][:6]:
            said = {1: "stated", 0: "denied", -1: "doubted"}[m.value]
            cue = f" by “{text[m.cue[0] : m.cue[1]]}”" if m.cue else ""
            rows.append(
                Excerpt(swatches[m.value], f"{m.finding.replace('_', ' ')}: {said}{cue}", (), text[max(0, m.start - _CONTEXT) : m.start],
                        text[m.start : m.end], text[m.end : m.end + _CONTEXT])
            )  # fmt: skip
    return Section(
        "Examples",
        "Evenly spaced reports; the words that name the finding are marked.",
        (
            Note("These are texts of patients. Keep this page where patient data may lie.", "warning"),
            Excerpts(tuple(rows), size_px=34),
        ),
    )


def _cell(value: Interval) -> object:
    return value if np.isfinite(value.value) else "–"
