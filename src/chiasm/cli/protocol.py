"""What ``chiasm zero-shot`` does with ``--protocol``: list them, make their prompts, run them, pool tiles into slides."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.cli.output import print_json, print_table
from chiasm.errors import InputError, LeakageError
from chiasm.types import Sample

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder
    from chiasm.evaluate.scores import ZeroShotScores
    from chiasm.tasks.prompts import PromptSet
    from chiasm.tasks.protocol import Protocol
    from chiasm.tasks.protocol_prompts import ProtocolPrompts
    from chiasm.tasks.zero_shot import Mode, TextClassifier, ZeroShotResult
    from chiasm.types import Embeddings

#: Asks for the table of protocols instead of a run.
LIST = "list"


@dataclass(frozen=True)
class Question:
    """What is asked of the images, read and checked before a model is loaded.

    Attributes:
        prompts: Labels with their prompts.
        mode: ``single`` or ``multi``.
        protocol: The published protocol that is followed, or None.
        variant: Of the protocol.
        made: The protocol's prompts with their notes.
        learned: Directions of learned prompts in place of embedded ones, or None.
    """

    prompts: PromptSet
    mode: Mode
    protocol: Protocol | None = None
    variant: str = "published"
    made: ProtocolPrompts | None = None
    learned: TextClassifier | None = None

    @property
    def pools(self) -> bool:
        """Whether images are tiles, whose slides are classified."""
        return self.protocol is not None and bool(self.protocol.top_j)


def print_protocols(as_json: bool) -> None:
    """Print the protocols: a table, or everything about them."""
    from chiasm.tasks.protocol import protocols

    found = protocols().values()
    if as_json:
        print_json([p.to_dict() for p in found])
        return
    rows = [
        (p.name, p.title, ", ".join(p.variants), "file" if p.needs else "own" if p.labels or p.prompts else "labels")
        for p in found
    ]
    print_table(("protocol", "what it does", "variants", "prompts"), rows)
    print(
        "  prompts: own = published with it; labels = yours, in its templates; file = yours; `--json` says which and why"
    )


def read_question(
    name: str | None,
    variant: str,
    labels: str | None,
    labels_file: Path | None,
    *,
    multi: bool,
    template: str | None,
    seed: int,
) -> Question:
    """Return prompts and mode of the command line.

    Raises:
        InputError: Labels are missing, are given twice, or are too few.
    """
    from chiasm.cli.inputs import read_prompts

    if name is None:
        if variant != "published":
            raise InputError("`--variant` belongs to `--protocol`", hint="`--protocol list` lists them")
        if labels is None and labels_file is not None and labels_file.is_dir():
            question = _learned_question(labels_file, multi=multi, template=template)
        else:
            prompts = read_prompts(labels, labels_file, pairs=multi, template=template)
            question = Question(prompts, "multi" if multi else "single")
    else:
        question = _protocol_question(name, variant, labels, labels_file, multi=multi, template=template, seed=seed)
    if len(question.prompts.labels) < 2 and question.mode == "single":
        raise InputError(
            f"`{question.prompts.names[0]}` is the only label, so it would always get probability 1",
            hint="name two labels or more, or ask for yes and no with `--multi`",
        )
    return question


def _learned_question(folder: Path, *, multi: bool, template: str | None) -> Question:
    """Return the question of a folder that ``chiasm prompts tune`` wrote; its mode is that of the learning."""
    from chiasm.evaluate.tuning_scores import tuned_classifier
    from chiasm.train.prompt_tuning import load_prompts

    if template is not None:
        raise InputError("learned prompts have no template", hint="leave --template out")
    tuned = load_prompts(folder)
    if multi and tuned.config.mode != "multi":
        raise InputError(
            "these prompts were learned for labels that exclude each other",
            hint="leave --multi out, or learn them with it",
        )
    classifier = tuned_classifier(tuned)
    return Question(classifier.prompts, tuned.config.mode, learned=classifier)


def _protocol_question(
    name: str,
    variant: str,
    labels: str | None,
    labels_file: Path | None,
    *,
    multi: bool,
    template: str | None,
    seed: int,
) -> Question:
    from chiasm.tasks.protocol import get_protocol
    from chiasm.tasks.protocol_prompts import make_prompts, read_prompt_file

    protocol = get_protocol(name)
    protocol.variant(variant)
    if labels is not None and labels_file is not None:
        raise InputError("give --labels or --labels-file, one of the two")
    if labels_file is not None:
        made = read_prompt_file(protocol, labels_file, variant=variant, templates=template, seed=seed)
    else:
        names = [part.strip() for part in labels.split(",") if part.strip()] if labels is not None else None
        made = make_prompts(protocol, names, variant=variant, templates=template, seed=seed)
    return Question(made.prompts, "multi" if multi else protocol.mode, protocol, variant, made)


def answer(
    question: Question,
    encoder: Encoder,
    images: Embeddings,
    samples: Sequence[Sample],
    *,
    names: Sequence[str | None] = (),
    batch_size: int = 32,
) -> dict[int, ZeroShotResult]:
    """Return the result, under 0; or, for slides, one for every number of tiles.

    Args:
        question: From :func:`read_question`.
        encoder: The model.
        images: Its embeddings of the images.
        samples: Where ``images`` come from; rows that could not be read may be among them.
        names: Names of the model and its family, to tell whether the protocol was made for it.
        batch_size: Images or texts per forward pass.
    """
    from chiasm.embed import embed_texts
    from chiasm.tasks.protocol_run import run_protocol, run_protocol_on_slides
    from chiasm.tasks.zero_shot import build_classifier, classify

    protocol = question.protocol
    if protocol is None:
        classifier = question.learned or build_classifier(question.prompts, partial(embed_texts, encoder))
        return {0: classify(images, classifier, mode=question.mode)}
    fitting = protocol.warn_unless_fits(encoder.name, *names)
    raw = protocol.needs_raw_texts(question.variant)
    if protocol.per_class:  # one batch a class, or its prompts would be padded to different lengths
        batch_size = max(batch_size, len(question.prompts.texts()))
    embed = partial(embed_texts, encoder, batch_size=batch_size, normalize=not raw)
    options: dict[str, Any] = {"prompts": question.made, "variant": question.variant}
    if question.pools:
        by_id = {s.id: s for s in samples}
        slides = [slide_of(by_id[i]) for i in images.ids]
        results = run_protocol_on_slides(protocol, images, embed, slides, **options)
    else:
        local = _local(question, encoder, images, samples, batch_size) if protocol.local else None
        results = {0: run_protocol(protocol, images, embed, mode=question.mode, local=local, **options)}
    if fitting:
        return results
    foreign = f"the model is of another family than the protocol's: {', '.join(protocol.families)}"
    return {j: replace(result, notes=(*result.notes, foreign)) for j, result in results.items()}


def _local(question: Question, encoder: Encoder, images: Embeddings, samples: Sequence[Sample], batch_size: int) -> Any:
    """Return GLoRIA's comparison of regions with words for these images, or None where the model has neither."""
    from chiasm.evaluate.local_similarity import has_local_features, local_similarities

    assert question.protocol is not None
    if not has_local_features(encoder):
        return None
    by_id = {s.id: s for s in samples}
    texts = question.prompts.texts()
    words = question.protocol.variant(question.variant).words
    found = local_similarities(encoder, [by_id[i] for i in images.ids], texts, words=words, batch_size=batch_size)
    return lambda wanted, _: found[:, [texts.index(t) for t in wanted]]


def slide_of(sample: Sample) -> str:
    """Return the slide of a tile; a tile without one raises ``InputError``."""
    if not sample.slide:
        raise InputError(
            "this protocol pools the tiles of a slide, but a row has none",
            hint="give a table with a column `slide`, or name it with `--column slide=NAME`",
        )
    return sample.slide


def slide_samples(samples: Sequence[Sample], column: str) -> list[Sample]:
    """Return one sample a slide with the labels that its tiles share.

    Args:
        samples: Tiles.
        column: Column of the truth, or ``*``.

    Raises:
        InputError: Two tiles of one slide differ in the truth: it is not the slide's.
    """
    slides: dict[str, Sample] = {}
    for sample in samples:
        slide = slide_of(sample)
        first = slides.setdefault(slide, Sample(id=slide, patient=sample.patient, slide=slide, labels=sample.labels))
        keys = sample.labels if column == "*" else [column]
        if any(first.labels.get(k) != sample.labels.get(k) for k in keys):
            raise InputError(
                f"tiles of one slide differ in column `{column}`, so it is no truth of slides",
                hint="name a column that is constant within a slide",
            )
    return list(slides.values())


def score_all(
    results: Mapping[int, ZeroShotResult], samples: Sequence[Sample], column: str, seed: int
) -> dict[int, ZeroShotScores]:
    """Return the scores of every result against a column of the samples (of slides, where slides are classified)."""
    from chiasm.cli.inputs import truth_columns
    from chiasm.evaluate.scores import score_zero_shot

    kept = {s.id: s for s in samples}
    scores = {}
    for j, result in results.items():
        columns = truth_columns([kept[i] for i in result.ids], column, result.labels)
        scores[j] = score_zero_shot(result, columns, seed=seed)
    return scores


def check_choice(question: Question, held: Sequence[Sample], rows: Sequence[Sample], truth: str | None) -> None:
    """Raise unless the slides of one split can choose the number of tiles for those of another.

    Raises:
        InputError: No slides are classified, or no truth is named.
        LeakageError: A patient or a slide lies in both splits.
    """
    if not question.pools or truth is None:
        raise InputError(
            "`--choose-on` chooses how many tiles stand for a slide, by the truth of a validation split",
            hint="use a protocol for slides, and name `--truth`",
        )
    shared = {s.group for s in held} & {s.group for s in rows}
    shared |= {slide_of(s) for s in held} & {slide_of(s) for s in rows}
    if shared:
        raise LeakageError(
            f"{len(shared)} patients or slides lie in both splits, so the choice would know what it is judged by",
            hint="name two splits with `--split` and `--choose-on`",
        )


def choose_tiles(
    question: Question,
    encoder: Encoder,
    results: Mapping[int, ZeroShotResult],
    held: Sequence[Sample],
    split: str,
    *,
    truth: str,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[int, ZeroShotResult]:
    """Return the result for the number of tiles with the best balanced accuracy on validation slides.

    Args:
        question: From :func:`read_question`.
        encoder: The model.
        results: One for every number of tiles, of other slides.
        held: Tiles of the validation slides; see :func:`check_choice`.
        split: Their split, for the record.
        truth: Column of the class.
        batch_size: Images or texts per forward pass.
        seed: Of the bootstrap.
    """
    from chiasm.embed import embed_images
    from chiasm.tasks.protocol import ProtocolWarning
    from chiasm.tasks.protocol_run import choose_j

    images = embed_images(encoder, held, batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProtocolWarning)  # it was said for the slides that are reported
        validation = answer(question, encoder, images, held, names=(encoder.name,), batch_size=batch_size)
    found = {}
    for j, scores in score_all(validation, slide_samples(held, truth), truth, seed).items():
        if scores.balanced_accuracy is not None:
            found[j] = scores.balanced_accuracy.value
    best = choose_j(found)
    note = f"{best} tiles were chosen on the slides of split `{split}`, by balanced accuracy ({found[best]:.3f} there)"
    return {best: replace(results[best], notes=(*results[best].notes, note))}
