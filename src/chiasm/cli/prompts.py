"""List, explain, choose or learn the sentences that stand for labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

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
from chiasm.cli.vectors import PageOption, StoreOption
from chiasm.errors import InputError, UnknownName

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from chiasm.encoders.base import Encoder
    from chiasm.evaluate.page import Page
    from chiasm.tasks.prompt_grid import GridVectors, PromptGrid
    from chiasm.types import Embeddings

ACTIONS = ("list", "explain", "search", "tune")

ActionArgument = Annotated[
    str, typer.Argument(help="list: shipped words. explain: what each does. search: choose. tune: learn (CoOp).")
]
LabelsOption = Annotated[str | None, typer.Option("--labels", help='Class names: "pneumonia, normal".')]
FileOption = Annotated[
    Path | None,
    typer.Option("--labels-file", help="JSON, TXT or CSV; with --template its texts are names, else whole prompts."),
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option("--template", help="A shipped set (chest, ct, fundus ...) or a template with {}; can be repeated."),
]
SynonymsOption = Annotated[
    str | None, typer.Option("--synonyms", help="Add shipped names of the labels: chest, histology ..., or any.")
]
MultiOption = Annotated[
    bool, typer.Option("--multi", help="Any number of labels can be true (positive/negative pairs).")
]
TruthOption = Annotated[
    str | None, typer.Option("--truth", help="Column of the true class; `*`: a 0/1 column a label.")
]
ChooseOption = Annotated[
    str | None, typer.Option("--choose-on", help="Split that chooses or teaches; by default half of the patients.")
]
TestOption = Annotated[str | None, typer.Option("--test-on", help="Split that scores; goes with --choose-on.")]
MetricOption = Annotated[
    str | None, typer.Option("--metric", help="auroc, auprc (--multi); balanced_accuracy, accuracy.")
]
StrategyOption = Annotated[str, typer.Option("--strategy", help="search: auto, exhaustive, greedy.")]
RedrawsOption = Annotated[
    int, typer.Option("--redraws", min=0, help="search: times that the choosing patients are drawn again.")
]
ResamplesOption = Annotated[int, typer.Option("--resamples", min=1, help="Bootstrap resamples an interval.")]
SaveOption = Annotated[
    Path | None, typer.Option("--save", help="search: JSON for --labels-file. tune: folder of the learned prompts.")
]
ShotsOption = Annotated[int | None, typer.Option("--shots", min=1, help="tune: patients a class; all by default.")]
VectorsOption = Annotated[
    int, typer.Option("--vectors", min=0, help="tune: learned vectors that start as noise; 0: as words.")
]
InitialOption = Annotated[
    list[str] | None, typer.Option("--initial", help="tune: words to start from; with --multi twice: there, absent.")
]
OwnOption = Annotated[bool, typer.Option("--class-specific", help="tune: vectors of its own for every class.")]
EpochsOption = Annotated[int, typer.Option("--epochs", min=1, help="tune: passes over the images, at most.")]
RateOption = Annotated[float, typer.Option("--learning-rate", help="tune: of AdamW.")]
AnchorOption = Annotated[
    float, typer.Option("--anchor", min=0, help="tune: hold prompts near their words (KgCoOp; 8 in the paper).")
]


def run(
    action: ActionArgument,
    model: ModelOption = "",
    table: TableOption = None,
    store: StoreOption = None,
    labels: LabelsOption = None,
    labels_file: FileOption = None,
    template: TemplateOption = None,
    synonyms: SynonymsOption = None,
    multi: MultiOption = False,
    truth: TruthOption = None,
    choose_on: ChooseOption = None,
    test_on: TestOption = None,
    split: SplitOption = None,
    metric: MetricOption = None,
    strategy: StrategyOption = "auto",
    redraws: RedrawsOption = 100,
    resamples: ResamplesOption = 1000,
    save: SaveOption = None,
    shots: ShotsOption = None,
    vectors: VectorsOption = 0,
    initial: InitialOption = None,
    class_specific: OwnOption = False,
    epochs: EpochsOption = 60,
    learning_rate: RateOption = 2e-3,
    anchor: AnchorOption = 0.0,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    out: PageOption = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    family: FamilyOption = None,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do what the action says."""
    if action not in ACTIONS:
        raise UnknownName("action", action, ACTIONS, hint=f"one of: {', '.join(ACTIONS)}")
    if action == "list":
        _list(as_json)
        return
    if action != "explain" and truth is None:
        raise InputError(
            f"`chiasm prompts {action}` needs the truth", hint="--truth COLUMN, or `*` for a column a label"
        )
    if bool(choose_on) != bool(test_on):
        raise InputError(
            "--choose-on and --test-on belong together", hint="give both, or neither: half of the patients"
        )
    grid = make_grid(labels, labels_file, template, synonyms, multi=multi)
    job = _open_job(
        grid, model, multi=multi, truth=truth, seed=seed, resamples=resamples, store=store, table=table, split=split,
        group=group, column=column, root=root, batch_size=batch_size, device=device, precision=precision, family=family,
        allow_code=allow_code, as_json=as_json,
    )  # fmt: skip
    if action == "explain":
        document, page = _explain(job, metric, as_json)
    elif action == "search":
        document, page = _search(job, metric, strategy, redraws, _parts(job, choose_on, test_on), save, as_json)
    else:
        from chiasm.train.prompt_writer import TuningConfig

        config = TuningConfig(
            mode=job.mode, vectors=vectors, initial=tuple(initial or ()), class_specific=class_specific,
            epochs=epochs, learning_rate=learning_rate, anchor=anchor, seed=seed,
        )  # fmt: skip
        document, page = _tune(job, config, shots, _parts(job, choose_on, test_on), save, as_json)
    _give(document, page, out, as_json)


def _give(document: dict[str, Any], page: Callable[[], Page], out: Path | None, as_json: bool) -> None:
    """Write the page and print the document, where they are wanted."""
    if out is not None:
        from chiasm.evaluate.page import save_page

        save_page(page(), out)
        document["page"] = str(out)
    if as_json:
        print_json(document)
    elif out is not None:
        print(f"page: {out}")


def _open_job(
    grid: PromptGrid,
    model: str,
    *,
    multi: bool,
    truth: str | None,
    seed: int,
    resamples: int,
    family: str | None,
    allow_code: bool,
    batch_size: int,
    device: str,
    precision: str,
    **rows: Any,
) -> Job:
    """Load the model, open the images (``rows`` as ``open_vectors`` takes them) and embed the wordings."""
    from chiasm.cli.inputs import load_encoder
    from chiasm.cli.vectors import open_vectors
    from chiasm.types import check_same_space

    started = time.monotonic()
    encoder = load_encoder(model, device=device, precision=precision, family=family, allow_code=allow_code)
    images = open_vectors(model=model, batch_size=batch_size, device=device, encoder=encoder, **rows)
    vectors = grid.embed(_embedder(encoder, batch_size))
    check_same_space(images, vectors.embeddings)
    mode: Literal["single", "multi"] = "multi" if multi else "single"
    known = None if truth is None else read_truth(images, truth, grid.names, mode)
    return Job(images, encoder, grid, vectors, mode, known, seed, resamples, started)


@dataclass(frozen=True)
class Job:
    """What all actions work on."""

    images: Embeddings
    encoder: Encoder
    grid: PromptGrid
    vectors: GridVectors
    mode: Literal["single", "multi"]
    truth: Any
    seed: int
    resamples: int
    started: float

    def card(self, action: str, split: Sequence[object] | None = None, **settings: Any) -> Any:
        """Return the run card."""
        from chiasm.evaluate.run_card import make_run_card

        return make_run_card(
            f"chiasm prompts {action}",
            {"images": self.images},
            seed=self.seed,
            split=split,
            prompts=self.vectors.texts,
            settings={"mode": self.mode, "resamples": self.resamples, **settings},
            seconds=time.monotonic() - self.started,
        )


def make_grid(
    labels: str | None, file: Path | None, templates: Sequence[str] | None, synonyms: str | None, *, multi: bool
) -> PromptGrid:
    """Return the wordings of ``--labels`` or ``--labels-file``.

    Raises:
        InputError: Neither or both were given.
    """
    from chiasm.cli.inputs import read_prompts
    from chiasm.tasks.prompt_grid import PromptGrid
    from chiasm.tasks.prompt_words import synonyms_of
    from chiasm.tasks.prompts import choose_templates

    prompts = read_prompts(labels, file, pairs=False, template="{}")
    plain = all(p.positive == (p.name.replace("_", " ").strip(),) and not p.negative for p in prompts.labels)
    if not (plain or templates or synonyms):
        return PromptGrid.from_prompts(prompts)
    names = {p.name: p.positive for p in prompts.labels}
    if synonyms is not None:
        shipped = synonyms_of(list(names), None if synonyms == "any" else synonyms)
        names = {n: tuple(dict.fromkeys((*given, *shipped[n]))) for n, given in names.items()}
    used = [t for word in templates or () for t in choose_templates(word)]
    return PromptGrid.from_templates(names, used or None, pairs=multi)


def read_truth(images: Embeddings, column: str, names: Sequence[str], mode: str) -> Any:
    """Return the truth of a label column: label -> 0/1/None a row (``multi``), or a class name or None a row."""
    from chiasm.evaluate.truth import truth_columns
    from chiasm.types import Sample

    rows = [Sample(id=i, labels={k: v[r] for k, v in images.labels.items()}) for r, i in enumerate(images.ids)]
    columns = truth_columns(rows, column, names)
    if mode == "multi":
        return columns

    def name_of(row: int) -> str | None:
        stated = [n for n in names if columns[n][row] in (1, 1.0, True, "1")]
        return stated[0] if len(stated) == 1 else None

    return [name_of(row) for row in range(len(images))]


def _embedder(encoder: Encoder, batch_size: int) -> Callable[[list[str]], Embeddings]:
    from chiasm.embed import embed_texts

    return lambda texts: embed_texts(encoder, texts, batch_size=batch_size)


def _parts(job: Job, choose_on: str | None, test_on: str | None) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows that choose and those that score."""
    import numpy as np

    from chiasm.cli.vectors import label_column
    from chiasm.tasks.prompt_search import split_patients

    if choose_on is None:
        return split_patients(job.images, seed=job.seed)
    column = np.asarray([str(v) for v in label_column(job.images, "split")])
    found = []
    for name in (choose_on, test_on):
        rows = np.flatnonzero(column == name)
        if not len(rows):
            raise InputError(f"no row has split `{name}`", hint=f"splits: {', '.join(sorted(set(column)))}")
        found.append(rows)
    return found[0], found[1]


def _split_names(job: Job, choose: NDArray[np.intp], test: NDArray[np.intp]) -> list[str]:
    names = ["unused"] * len(job.images)
    for part, rows in (("choose", choose), ("test", test)):
        for row in rows.tolist():
            names[row] = part
    return names


def _explain(job: Job, metric: str | None, as_json: bool) -> tuple[dict[str, Any], Callable[[], Page]]:
    from chiasm.evaluate.prompts_page import effects_page
    from chiasm.tasks.prompt_effects import explain_prompts

    found = explain_prompts(
        job.images,
        job.vectors,
        job.truth,
        mode=job.mode,
        metric=cast(Any, metric),
        n_resamples=job.resamples,
        seed=job.seed,
    )
    card = job.card("explain", metric=found.metric or "none")
    if not as_json:
        for fault in found.faults:
            print(f"{fault.kind}: `{fault.text}` of `{fault.label}`; {fault.advice}")
        for name, score in found.ensemble.items():
            print(f"{name}, all together: {found.metric} {score}, chance {score.chance:.3f}")
        print_table(
            ("label", "option", "alone", "loss without it", "answers changed"),
            [
                (e.problem, e.option, e.alone or "-", e.leave_one_out or "-", f"{100 * e.changed:.0f} %")
                for e in found.effects
            ],
        )
        if found.inverted:
            print(f"inverted, all prompts together (whole interval below chance): {', '.join(found.inverted)}")
        for e in found.inverted_options:
            print(f"inverted alone: {e.kind} `{e.option}` of `{e.problem}`, {e.alone}")
    return {**found.to_dict(), "run_card": card.to_dict()}, lambda: effects_page(found, card)


def _search(
    job: Job,
    metric: str | None,
    strategy: str,
    redraws: int,
    parts: tuple[NDArray[np.intp], NDArray[np.intp]],
    save: Path | None,
    as_json: bool,
) -> tuple[dict[str, Any], Callable[[], Page]]:
    from chiasm.evaluate.prompts_page import search_page
    from chiasm.io.manifest import write_json_atomic
    from chiasm.tasks.prompt_search import search_prompts

    found = search_prompts(
        job.images, job.vectors, job.truth, choose=parts[0], test=parts[1], mode=job.mode, metric=cast(Any, metric),
        strategy=cast(Any, strategy), redraws=redraws, n_resamples=job.resamples, seed=job.seed,
    )  # fmt: skip
    settings = {"metric": found.metric, "strategy": strategy, "redraws": redraws}
    card = job.card("search", _split_names(job, *parts), **settings)
    if save is not None:
        write_json_atomic(save, found.prompts.to_dict())
    if not as_json:
        rows = [
            (p.name, " | ".join(p.templates), p.validation, p.test, p.test_plain, f"{100 * p.winner_share:.0f} %")
            for p in found.problems
        ]
        print_table(("label", "templates", "where chosen", "on others", "all prompts", "same winner"), rows)
        print(f"chosen prompts, on {found.test_patients} other patients: {found.metric} {found.test}")
        print(f"all prompts, same patients: {found.test_plain}")
        print(f"gain {found.difference}, p = {found.p_value:.3f}; optimism {found.optimism:+.3f}")
        if save is not None:
            print(f"prompts: {save}")
    return {**found.to_dict(), "run_card": card.to_dict()}, lambda: search_page(found, card)


def _tune(
    job: Job,
    config: Any,
    shots: int | None,
    parts: tuple[NDArray[np.intp], NDArray[np.intp]],
    save: Path | None,
    as_json: bool,
) -> tuple[dict[str, Any], Callable[[], Page]]:
    from chiasm.config import to_mapping
    from chiasm.evaluate.prompts_page import tuning_page
    from chiasm.evaluate.tuning_scores import score_tuning, take_shots, tuned_classifier
    from chiasm.train.prompt_tuning import nearest_words, save_prompts, tune_prompts

    _check_folder(save)
    train, test = parts
    groups = list(job.images.groups)
    if shots is not None:
        train = take_shots(job.truth, groups, train, shots, seed=job.seed)
    several = isinstance(job.truth, dict)
    taught = {n: [v[k] for k in train] for n, v in job.truth.items()} if several else [job.truth[k] for k in train]
    spoken = {label.name: label.synonyms[0] for label in job.grid.labels}
    tuned = tune_prompts(
        job.encoder, job.images.select(train), spoken, taught, config=config,
        progress=make_progress(as_json, unit="epochs"),
    )  # fmt: skip
    words = _starting_words(job, spoken, config)
    arms = {"learned": tuned_classifier(tuned), "all prompts": job.vectors.classifier()} | words
    scores = score_tuning(job.images, arms, job.truth, train=train, test=test, n_resamples=job.resamples, seed=job.seed)
    near = nearest_words(job.encoder, tuned)
    settings = {**to_mapping(config), "shots": shots or "all", "initial": list(config.starts)}
    settings.pop("mode")
    card = job.card("tune", _split_names(job, train, test), **{k: v for k, v in settings.items() if k != "seed"})
    if save is not None:
        save_prompts(save, tuned)
    if not as_json:
        rows = [
            (arm.name, arm.whole, "-" if arm.name == "learned" else str(scores.differences[arm.name]))
            for arm in scores.arms
        ]
        print_table(("prompts", scores.metric, "learned less these"), rows)
        print(
            f"{tuned.rows[0]} images taught, {tuned.rows[1]} chose epoch {tuned.best_epoch}; {scores.patients} other patients scored"
        )
        if save is not None:
            print(f"prompts: {save}")
    document = {**scores.to_dict(), "prompts": tuned.described(), "history": list(tuned.history), "nearest_words": near}
    return {**document, "run_card": card.to_dict()}, lambda: tuning_page(tuned, scores, near, card)


def _starting_words(job: Job, spoken: dict[str, str], config: Any) -> dict[str, Any]:
    """Return the classifier of the sentences that the vectors start from; none where they start from noise."""
    from chiasm.tasks.prompts import LabelPrompts, PromptSet
    from chiasm.tasks.zero_shot import build_classifier

    if config.vectors:
        return {}

    def said(start: str, name: str) -> tuple[str, ...]:
        return (f"{start} {name}{config.suffix}",)

    starts = config.starts
    made = PromptSet(
        tuple(
            LabelPrompts(n, said(starts[0], name), said(starts[1], name) if len(starts) > 1 else ())
            for n, name in spoken.items()
        )
    )
    return {"starting words": build_classifier(made, _embedder(job.encoder, 64))}


def _list(as_json: bool) -> None:
    from chiasm.tasks.prompt_words import synonym_kinds, template_sets
    from chiasm.tasks.prompts import negate

    if as_json:
        templates = {
            s.name: {"about": s.about, "templates": list(s.templates), "negated": [negate(t) for t in s.templates]}
            for s in template_sets().values()
        }
        synonyms = {kind: {label: list(n) for label, n in entry.items()} for kind, entry in synonym_kinds().items()}
        print_json({"templates": templates, "synonyms": synonyms})
        return
    for entry in template_sets().values():
        rows = [(t, negate(t)) for t in entry.templates]
        print_table(("template", "in the negative"), rows, title=f"{entry.name} ({entry.about})")
        print()
    for kind, labels in synonym_kinds().items():
        print_table(
            ("label", "names"), [(label, ", ".join(n)) for label, n in labels.items()], title=f"synonyms: {kind}"
        )
        print()


def _check_folder(save: Path | None) -> None:
    """Refuse to write learned prompts over a file, or among other things."""
    from chiasm.checkpoints.native import is_model_dir
    from chiasm.train.prompt_tuning import FORM

    if save is None or not save.exists():
        return
    if not save.is_dir():
        raise InputError(f"--save `{save.name}` is a file; learned prompts are a folder", hint="name another")
    if any(save.iterdir()) and not is_model_dir(save, form=FORM):
        raise InputError(f"--save `{save.name}` holds other things", hint="name a new or empty folder")
