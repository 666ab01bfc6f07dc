"""Learn from a few labelled images a class: learning curves of probes and adapters, with intervals and baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, RootOption, TableOption
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
from chiasm.cli.vectors import LabelOption, PageOption, StoreOption
from chiasm.errors import InputError, UnknownName

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder
    from chiasm.evaluate.few_shot_scores import FewShotScores
    from chiasm.tasks.k_shot import Draws, Method
    from chiasm.tasks.zero_shot import TextClassifier
    from chiasm.types import Embeddings

#: Learned prompts, which run only where they are named: each fit is a small training.
COOP = "coop"

LabelsFileOption = Annotated[
    Path | None,
    typer.Option("--labels-file", help="Prompts of the classes (JSON, TXT, CSV): adds the methods that use texts."),
]


def run(
    store: StoreOption = None,
    table: TableOption = None,
    label: LabelOption = "",
    model: ModelOption = "",
    labels_file: LabelsFileOption = None,
    shots: Annotated[str, typer.Option("--shots", help="Images a class, and `all`.")] = "1,2,4,8,16,all",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Draws of the shots.")] = 10,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Names with commas; by default all that the input allows but coop.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Method that the others are compared with.")
    ] = None,
    test_split: Annotated[
        str | None, typer.Option("--test-split", help="Value of the split column that is the test set.")
    ] = None,
    test_share: Annotated[
        float, typer.Option("--test-share", help="Share of the patients that is the test set, without --test-split.")
    ] = 0.3,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Add a small CNN without pretraining, trained on the images.")
    ] = False,
    scratch_seeds: Annotated[int, typer.Option("--scratch-seeds", min=1, help="Draws that it learns from.")] = 3,
    scratch_size: Annotated[int, typer.Option("--scratch-size", help="Side of its images in pixels.")] = 64,
    scratch_epochs: Annotated[int, typer.Option("--scratch-epochs", min=1, help="Its epochs, at most.")] = 30,
    floor: Annotated[
        bool, typer.Option("--floor", help="Add the floor: six colour numbers and the nearest centroid.")
    ] = False,
    resamples: Annotated[int, typer.Option("--resamples", min=50, help="Of patients and seeds.")] = 1000,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    out: PageOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw, fit, score, print."""
    began = time.perf_counter()
    if not label:
        raise InputError("no column of labels was named", hint="--label COLUMN")
    ks = _shots(shots)
    wanted = None if methods is None else [m.strip() for m in methods.split(",") if m.strip()]
    _check_methods(wanted, labels_file, model, from_scratch, floor)
    from chiasm.cli.inputs import load_encoder
    from chiasm.cli.vectors import labelled_rows, open_vectors
    from chiasm.evaluate.few_shot_scores import score_few_shot
    from chiasm.tasks.k_shot import draw_episodes, run_episodes

    encoder = None
    if table is not None or (labels_file is not None and model):
        encoder = load_encoder(model, device=device, precision=precision, family=family, allow_code=allow_code)
    images = open_vectors(
        store=store, table=table, model=model, group=group, column=column, root=root, batch_size=batch_size,
        device=device, precision=precision, family=family, allow_code=allow_code, as_json=as_json, encoder=encoder,
    )  # fmt: skip
    images = labelled_rows(images, label)
    parts = _parts(images, label, test_split, test_share, seed)
    is_test = [part == "test" for part in parts]
    numbers = range(seed, seed + seeds)
    draws = draw_episodes(images.labels[label], images.groups, is_test, shots=ks, seeds=numbers)
    texts = None if encoder is None or labels_file is None else _texts(encoder, labels_file, label, draws, batch_size)
    scratch = {"image_size": scratch_size, "epochs": scratch_epochs} if from_scratch else None
    chosen = _methods(images, draws, wanted, texts, scratch, floor, encoder)
    only = {"from-scratch": numbers[:scratch_seeds]}
    answers = run_episodes(draws, chosen, only=only, progress=make_progress(as_json, unit="fits"))
    scores = score_few_shot(draws, answers, reference=reference, n_resamples=resamples, seed=seed)
    settings = {
        "label": label, "shots": shots, "seeds": seeds, "methods": ", ".join(chosen),
        "test": f"split {test_split}" if test_split else f"share {test_share} of the patients",
        "resamples": resamples,
        "from scratch": scratch and f"{scratch}, {scratch_seeds} seeds",
    }  # fmt: skip
    _finish(scores, images, label, settings, parts, texts, seed, time.perf_counter() - began, out, as_json)


def _finish(
    scores: FewShotScores,
    images: Embeddings,
    label: str,
    settings: dict[str, Any],
    parts: Sequence[str],
    texts: TextClassifier | None,
    seed: int,
    seconds: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Make the run card, write the page, and print."""
    from chiasm.evaluate.few_shot_page import few_shot_page
    from chiasm.evaluate.page import save_page
    from chiasm.evaluate.run_card import make_run_card

    card = make_run_card(
        f"chiasm few-shot --label {label}",
        {"images": images},
        seed=seed,
        split=list(parts),
        prompts=None if texts is None else texts.prompts.texts(),
        settings=settings,
        seconds=seconds,
    )
    page = None if out is None else save_page(few_shot_page(scores, card, label=label), out)
    if as_json:
        print_json({**scores.to_dict(), "page": None if page is None else str(page), "run_card": card.to_dict()})
        return
    _say(scores)
    if page is not None:
        print(f"page: {page}")


def _say(scores: FewShotScores) -> None:
    from chiasm.evaluate.few_shot_scores import shots_name

    rows = []
    for method in scores.methods:
        own = {p.shots: str(p.balanced_accuracy) for p in scores.points if p.method == method}
        rows.append((method, *[own.get(k, "-") for k in scores.shots]))
    print_table(
        ("method", *[str(shots_name(k)) for k in scores.shots]),
        rows,
        title=f"balanced accuracy by images a class, mean of seeds [95 %, {scores.test_patients} test patients and seeds]",
    )
    print(f"  chance {scores.chance:.3f}; majority: accuracy {scores.majority:.3f}")
    told = [c for c in scores.contrasts if c.verdict != "not told apart"]
    for c in told:
        print(
            f"  {c.method} is {c.verdict} than {scores.reference} at {shots_name(c.shots)}: {c.difference.value:+.3f}"
        )
    if scores.contrasts and not told:
        print(f"  no method is told apart from {scores.reference}")
    for k, why in scores.left_out.items():
        print(f"  {k} shots were left out: {why}")


def _shots(text: str) -> tuple[int | None, ...]:
    """Return the values of ``--shots``; ``all`` is None."""
    found: list[int | None] = []
    for word in (w.strip() for w in text.split(",")):
        if word == "all":
            found.append(None)
        elif word.isdecimal() and len(word) < 10 and int(word) > 0:
            found.append(int(word))
        else:
            raise InputError(
                f"--shots must be numbers from 1 and `all`, got `{word[:20]}`", hint="--shots 1,2,4,8,16,all"
            )
    return tuple(dict.fromkeys(found))


def _check_methods(
    wanted: Sequence[str] | None, labels_file: Path | None, model: str, from_scratch: bool, floor: bool
) -> None:
    """Miss what cannot be run before images are embedded, not after."""
    from chiasm.evaluate.few_shot_images import IMAGE_FILE_METHODS
    from chiasm.tasks.k_shot import IMAGE_METHODS, TEXT_METHODS

    if labels_file is not None and not model:
        raise InputError("--labels-file needs the model that embeds the texts", hint="add --model, that of the store")
    if wanted is not None and not wanted and not from_scratch and not floor:
        raise InputError("--methods names none")
    for name in wanted or ():
        if name in IMAGE_FILE_METHODS:
            raise InputError(f"`{name}` has an option of its own", hint="--from-scratch, --floor")
        known = (*IMAGE_METHODS, *TEXT_METHODS, COOP)
        if name not in known:
            raise UnknownName("few-shot method", name, known, hint=f"methods: {', '.join(known)}")
        if name in (*TEXT_METHODS, COOP) and labels_file is None:
            raise InputError(f"`{name}` needs the texts of the classes", hint="--labels-file PROMPTS with --model")


def _parts(images: Embeddings, label: str, test_split: str | None, share: float, seed: int) -> list[str]:
    """Return ``test`` or ``pool`` for each row."""
    from chiasm.cli.vectors import label_column
    from chiasm.data.splits import split_by_group

    if test_split is not None:
        column = label_column(images, "split")
        if test_split not in column:
            known = ", ".join(sorted({str(p) for p in column if p is not None}))
            raise InputError(f"no row has split `{test_split}`", hint=f"splits: {known or 'none'}")
        return ["test" if part == test_split else "pool" for part in column]
    if not 0 < share < 1:
        raise InputError(f"--test-share must lie between 0 and 1, got {share}")
    return split_by_group(
        list(images.groups), {"pool": 1 - share, "test": share}, seed=seed, stratify=list(images.labels[label])
    )


def _texts(encoder: Encoder, file: Path, label: str, draws: Draws, batch_size: int) -> TextClassifier:
    """Embed the prompts of the classes."""
    from chiasm.embed import embed_texts
    from chiasm.tasks.k_shot import class_prompts
    from chiasm.tasks.prompt_files import load_prompts
    from chiasm.tasks.zero_shot import build_classifier

    prompts = class_prompts(load_prompts(file), label, draws.classes)
    return build_classifier(prompts, lambda texts: embed_texts(encoder, texts, batch_size=batch_size))


def _learned(encoder: Encoder | None, images: Embeddings, draws: Draws, texts: TextClassifier | None) -> Method:
    """Return learned prompts as a method; what stands in them for a class is the shortest of its prompts."""
    from chiasm.evaluate.tuning_scores import coop_method

    assert encoder is not None
    assert texts is not None
    spoken = [min(label.positive, key=len).strip().rstrip(".") for label in texts.prompts.labels]
    return coop_method(encoder, images, draws, spoken=spoken)


def _methods(
    images: Embeddings,
    draws: Draws,
    wanted: Sequence[str] | None,
    texts: TextClassifier | None,
    scratch: dict[str, Any] | None,
    floor: bool,
    encoder: Encoder | None,
) -> dict[str, Method]:
    """Return name -> method, in the order of the page."""
    from chiasm.evaluate.few_shot_images import COLOUR, FROM_SCRATCH, colour_method, from_scratch_method, samples_of
    from chiasm.tasks.k_shot import IMAGE_METHODS, TEXT_METHODS, embedding_method

    names = wanted if wanted is not None else [*IMAGE_METHODS, *(TEXT_METHODS if texts is not None else ())]
    found: dict[str, Method] = {
        name: _learned(encoder, images, draws, texts)
        if name == COOP
        else embedding_method(name, images, draws, texts=texts)
        for name in names
    }
    samples = samples_of(images) if scratch is not None or floor else ()
    if scratch is not None:
        found[FROM_SCRATCH] = from_scratch_method(samples, draws, **scratch)
    if floor:
        found[COLOUR] = colour_method(samples, draws)
    return found
