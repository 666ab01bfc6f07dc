"""The main job, end to end, on data that everybody has: draw phantoms, pretrain a CLIP, classify, search, explain, map.

Comes in: a folder and a seed. Goes out, in the folder: ``model/`` (for ``chiasm.load``), ``data/`` (held-out images
with reports, boxes and prompts), ``results.json``, ``predictions.csv``, ``index.html``. The images are synthetic; a
model trained on them knows nothing about patients. Patients of the test set are drawn after those of training and
appear nowhere in it; the weights are chosen on validation patients, so nothing is selected on what is reported.
"""

from __future__ import annotations

import csv
import io
import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm import __version__
from chiasm.errors import InputError
from chiasm.evaluate.map_scores import PointingScores
from chiasm.evaluate.scores import ZeroShotScores
from chiasm.evaluate.search_scores import RetrievalScores
from chiasm.io.manifest import write_bytes_atomic, write_json_atomic
from chiasm.progress import Progress, SilentProgress
from chiasm.tasks.zero_shot import ZeroShotResult
from chiasm.types import Embeddings, LabelValue

if TYPE_CHECKING:
    from chiasm.data.phantoms import PhantomSet
    from chiasm.encoders.base import Encoder
    from chiasm.explain.heatmap import HeatMap
    from chiasm.train.recipe import Recipe
    from chiasm.train.run import TrainResult

RECIPE = Path(__file__).parent / "demo.toml"
#: What a run replaces, and the file that says that a folder is a demo's.
OWN_FILES = ("model", "data", "run", "results.json", "predictions.csv", "index.html")
MARK = ".chiasm-demo"

#: Findings whose place a heat map can be scored on, and how many images of each are explained.
EXPLAINED = ("effusion", "pneumothorax", "consolidation", "nodule", "cardiomegaly", "device")
MAPS_PER_FINDING = 40


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is; the defaults are what ``make demo`` runs.

    Attributes:
        test_patients: Patients that only the scores see.
        overrides: Changes to the embedded recipe, as after ``--set``.
        n_resamples: Of the bootstrap.
    """

    test_patients: int = 300
    overrides: tuple[str, ...] = ()
    n_resamples: int = 1000


@dataclass(frozen=True)
class Trained:
    """The pretrained model: its recipe, how training went, and the lines of its log."""

    recipe: Recipe
    result: TrainResult
    log: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class DemoParts:
    """Everything that the page shows."""

    encoder: Encoder
    trained: Trained
    test: PhantomSet
    images: Embeddings
    reports: Embeddings
    zero_shot: ZeroShotResult
    scores: ZeroShotScores
    laterality: ZeroShotScores
    retrieval: RetrievalScores
    pointing: PointingScores
    maps: Sequence[tuple[int, str, HeatMap]]
    results: dict[str, Any]


def run_demo(
    out: str | Path, *, seed: int = 0, settings: DemoSettings | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo and return what ``results.json`` holds.

    Args:
        out: Folder; made when absent. Earlier results in it are replaced.
        seed: Of phantoms, initial weights, order of batches and bootstrap.
        settings: Sizes.
        progress: Told about every stage.

    Returns:
        Intervals under ``zero_shot``, ``retrieval``, ``explain``; beside them ``seconds``, ``seed``, ``versions``,
        ``data``, ``training``.

    Raises:
        InputError: The folder holds files that a run would replace and that no demo made.
    """
    from chiasm.evaluate.demo_page import make_demo_page
    from chiasm.evaluate.page import save_page

    settings = settings or DemoSettings()
    progress = progress or SilentProgress()
    folder = Path(out)
    _claim(folder)
    began = time.perf_counter()
    trained = _train(folder, seed, settings, progress)
    test = _draw_test_set(folder, seed, settings, trained.recipe)
    parts = _evaluate(folder, seed, settings, trained, test, progress)
    parts.results["seconds"] = round(time.perf_counter() - began, 1)
    write_json_atomic(folder / "results.json", parts.results)
    save_page(make_demo_page(parts), folder / "index.html")
    return parts.results


def _claim(folder: Path) -> None:
    """Make the folder and mark it as the demo's, whose files a later demo may replace.

    Raises:
        InputError: The folder holds files of somebody else that a run would replace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    foreign = [] if _is_demo(folder) else [name for name in OWN_FILES if (folder / name).exists()]
    if foreign:
        raise InputError(
            f"folder `{folder.name}` holds `{foreign[0]}`, which no demo made and this one would replace",
            hint="choose another folder with `--out`",
        )
    write_bytes_atomic(folder / MARK, b"`chiasm demo` made this folder and may replace what it made.\n")


def _is_demo(folder: Path) -> bool:
    if (folder / MARK).exists():
        return True
    try:  # from before demos left a mark
        return json.loads((folder / "results.json").read_bytes()).get("synthetic") is True
    except (OSError, ValueError, AttributeError):
        return False


def _train(folder: Path, seed: int, settings: DemoSettings, progress: Progress) -> Trained:
    """Pretrain from scratch and move the model to ``folder/model``."""
    from chiasm.io.manifest import read_jsonl
    from chiasm.train.recipe import load_recipe
    from chiasm.train.run import train

    overrides = [f"seed={seed}", f"data.phantom_seed={seed}", f"data.split_seed={seed}", *settings.overrides]
    recipe = load_recipe(RECIPE, overrides)
    result = train(recipe, out=folder / "run", overwrite=True, progress=progress)
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.move(result.best_dir, folder / "model")
    return Trained(
        recipe, replace(result, best_dir=folder / "model"), tuple(read_jsonl(folder / "run" / "results.jsonl"))
    )


def _draw_test_set(folder: Path, seed: int, settings: DemoSettings, recipe: Recipe) -> PhantomSet:
    """Draw patients that follow those of training, and keep them as files for the commands of the page."""
    from chiasm.data.phantoms import make_chest_phantoms

    test = make_chest_phantoms(
        settings.test_patients,
        seed=seed,
        size_px=recipe.encoder_config().preprocess.size,
        first_patient=recipe.data.patients,
    )
    shutil.rmtree(folder / "data", ignore_errors=True)
    test.save(folder / "data")
    write_json_atomic(folder / "data" / "prompts.json", {"labels": _finding_prompts(test)})
    return test


def _evaluate(
    folder: Path, seed: int, settings: DemoSettings, trained: Trained, test: PhantomSet, progress: Progress
) -> DemoParts:
    """Do on held-out patients what a user would do, with the functions that a user would call."""
    from chiasm.datasets.table import load_table
    from chiasm.embed import embed_images, embed_texts
    from chiasm.evaluate.map_scores import score_pointing
    from chiasm.evaluate.scores import score_zero_shot
    from chiasm.evaluate.search_scores import score_retrieval
    from chiasm.load import load
    from chiasm.tasks.prompt_files import parse_prompts
    from chiasm.tasks.zero_shot import build_classifier, classify

    encoder = load(folder / "model")
    samples = load_table(folder / "data" / "table.csv").samples
    images = embed_images(encoder, samples, progress=progress)
    reports = embed_texts(encoder, samples, progress=progress)
    embed = partial(embed_texts, encoder)
    n_resamples = settings.n_resamples

    findings = parse_prompts({"labels": _finding_prompts(test)})
    result = classify(images, build_classifier(findings, embed), mode="multi")
    truth = {n: tuple(s.labels[n] for s in test.samples) for n in test.findings}
    scores = score_zero_shot(result, truth, n_resamples=n_resamples, seed=seed)
    sides = parse_prompts({"labels": {n: test.prompts[n] for n in test.laterality}})
    sided = classify(images, build_classifier(sides, embed), mode="multi")
    laterality = score_zero_shot(sided, _side_truth(test), n_resamples=n_resamples, seed=seed)
    retrieval = score_retrieval(images, reports, n_resamples=n_resamples, seed=seed)
    maps = _explain(encoder, test, progress)
    pointing = score_pointing(
        [m for _, _, m in maps],
        [tuple(b for b in test.samples[i].boxes if b.label == name) for i, name, _ in maps],
        groups=[test.samples[i].group for i, _, _ in maps],
        n_resamples=n_resamples,
        seed=seed,
    )
    _write_predictions(folder / "predictions.csv", result, truth)
    results = {
        "synthetic": True,
        "zero_shot": scores.to_dict(),
        "laterality": laterality.to_dict(),
        "retrieval": retrieval.to_dict(),
        "explain": pointing.to_dict(),
        **_circumstances(seed, trained, test),
    }
    return DemoParts(
        encoder, trained, test, images, reports, result, scores, laterality, retrieval, pointing, maps, results
    )  # fmt: skip


def _finding_prompts(test: PhantomSet) -> dict[str, dict[str, Any]]:
    """Return the prompts of each finding; one that has a side is true on the left, on the right or on both sides."""
    prompts: dict[str, dict[str, Any]] = {}
    for name in test.findings:
        positive, negative = list(test.prompts[name]["positive"]), list(test.prompts[name]["negative"])
        sides = [[t for t in positive if side in t.lower()] for side in ("left", "right", "bilateral")]
        ways = [way for way in sides if way]
        is_sided = f"{name}_left" in test.laterality and sum(map(len, ways)) == len(positive)
        prompts[name] = (
            {"any_of": ways, "negative": negative} if is_sided else {"positive": positive, "negative": negative}
        )
    return prompts


def _side_truth(test: PhantomSet) -> dict[str, tuple[LabelValue, ...]]:
    """Return the truth of "left" and "right" where a finding is on one side only; elsewhere it has no side to name."""
    truth = {}
    for name in test.laterality:
        finding = name.rsplit("_", 1)[0]
        truth[name] = tuple(
            s.labels[name] if s.labels[f"{finding}_side"] in ("left", "right") else None for s in test.samples
        )
    return truth


def _explain(encoder: Encoder, test: PhantomSet, progress: Progress) -> list[tuple[int, str, HeatMap]]:
    """Return heat maps of findings that are there, each for the finding's own positive prompts."""
    from chiasm.explain.methods import explain_batch

    rows: list[tuple[int, str]] = []
    for name in EXPLAINED:
        present = [
            i for i, s in enumerate(test.samples) if s.labels[name] == 1 and any(b.label == name for b in s.boxes)
        ]
        rows.extend((i, name) for i in present[:MAPS_PER_FINDING])
    maps = explain_batch(
        encoder,
        [test.image(i) for i, _ in rows],
        [tuple(test.prompts[name]["positive"]) for _, name in rows],
        against=[tuple(test.prompts[name]["negative"]) for _, name in rows],
        progress=progress,
    )
    return [(i, name, heat) for (i, name), heat in zip(rows, maps, strict=True)]


def _write_predictions(path: Path, result: ZeroShotResult, truth: dict[str, tuple[LabelValue, ...]]) -> None:
    """Write one line per image and label, so that anyone can compute the scores again."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["patient", "label", "truth", "score"])
    for label in result.labels:
        column = result.scores[:, result.column(label)]
        for group, right, score in zip(result.groups, truth[label], column, strict=True):
            writer.writerow([group, label, right, repr(float(score))])
    write_bytes_atomic(path, text.getvalue().encode())


def _circumstances(seed: int, trained: Trained, test: PhantomSet) -> dict[str, Any]:
    """Return what the numbers were computed from."""
    import torch

    result = trained.result
    return {
        "training": {
            "seconds": round(result.seconds, 1),
            "steps": result.steps,
            "batch_size": trained.recipe.optim.batch_size,
            "best_step": result.best_step,
            "validation": dict(result.metrics),
        },
        "data": {
            "name": test.name,
            "training": json.loads(json.dumps(dict(result.data), default=str)),
            "test_images": len(test),
            "test_patients": len({s.patient for s in test.samples}),
            "prevalence": {n: float(np.mean([s.labels[n] == 1 for s in test.samples])) for n in test.findings},
        },
        "seed": seed,
        "versions": {
            "chiasm": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def summary_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return the rows of the short table: measure, value with interval, n, chance, majority."""

    def row(name: str, number: dict[str, Any], majority: str = "-") -> tuple[str, str, str, str, str]:
        value, low, high, chance = (number[k] for k in ("value", "low", "high", "chance"))
        shown = "-" if value is None else f"{value:.3f}"  # a finding that no test patient has, say
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        return name, shown + interval, str(number["n"]), "-" if chance is None else f"{chance:.3f}", majority

    rows = [row("zero-shot macro AUROC", results["zero_shot"]["macro_auroc"], "0.500")]
    rows += [row(f"  {name}", v["auroc"], "0.500") for name, v in results["zero_shot"]["per_label"].items()]
    rows.append(row("left or right, macro AUROC", results["laterality"]["macro_auroc"], "0.500"))
    for direction in ("text_to_image", "image_to_text"):
        found = results["retrieval"][direction]
        same_ten = f"{found['majority']['recall_at_10']:.3f}"
        rows.append(row(f"{direction.replace('_', ' ')} R@10", found["recall_at_10"], same_ten))
    found = results["explain"]
    rows.append(row("heat maps, pointing game", found["pointing_game"], f"{found['majority']:.3f}"))
    return rows
