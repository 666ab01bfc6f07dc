"""Classify images with a distilled classifier: a run of `chiasm distill` or an export of it; no text is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.inputs import ColumnOption, RootOption, SplitOption, TableOption
from chiasm.cli.output import BatchOption, CodeOption, DeviceOption, JsonOption, make_progress, print_json, print_table

if TYPE_CHECKING:
    from chiasm.classifier import Predictions
    from chiasm.io.manifest import RejectLog

#: Images that are printed; ``--csv`` and ``--json`` give all.
SHOWN_IMAGES = 20
RESEARCH_ONLY = "Research use only: not a medical device."


def run(
    model: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run of `chiasm distill`, its `model/`, or a --vision-only export.")
    ],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files or folders of images.")] = None,
    table: TableOption = None,
    split: SplitOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to print for each image.")] = 3,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write every image's probabilities to this file.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Use the export's `model.onnx` (on the CPU).")] = False,
    device: DeviceOption = "cpu",
    batch_size: BatchOption = 32,
    allow_code: CodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read, classify, print."""
    from chiasm.classifier import find_classifier, load_classifier
    from chiasm.cli.inputs import read_images
    from chiasm.io.manifest import RejectLog, write_bytes_atomic

    folder = find_classifier(model)  # a wrong folder is missed before the images are looked at
    rows = read_images(images, table, columns=column, root=root, split=split)
    classifier: Any
    if onnx:
        from chiasm.deploy.onnx import load_onnx

        classifier = load_onnx(folder)
    else:
        classifier = load_classifier(folder, device=device, allow_code=allow_code)
    rejects = RejectLog(rows.rejected)
    found: Predictions = classifier.predict(
        rows.samples, batch_size=batch_size, rejects=rejects, progress=make_progress(as_json, unit="images")
    )
    if csv is not None:
        write_bytes_atomic(csv, _csv(found).encode())
    if as_json:
        print_json(_document(classifier, found, rejects, rows.name, top))
        return
    _print(classifier, found, rejects, min(top, len(found.classes)))


def _csv(found: Predictions) -> str:
    import pandas as pd

    columns = {f"probability_{name}": found.probabilities[:, i] for i, name in enumerate(found.classes)}
    return str(pd.DataFrame({"id": found.ids, "best": found.best, **columns}).to_csv(index=False))


def _ranked(found: Predictions, row: int, top: int) -> list[tuple[str, float]]:
    """The most probable classes of a row; of equal ones the first."""
    pairs = zip(found.classes, found.probabilities[row].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])[:top]


def _document(classifier: Any, found: Predictions, rejects: RejectLog, name: str, top: int) -> dict[str, Any]:
    return {
        "classifier": classifier.name,
        "label": classifier.label,
        "classes": list(found.classes),
        "facts": classifier.facts,
        "use": RESEARCH_ONLY,
        "data": name,
        "rejected": len(rejects),
        "reasons": rejects.counts(),
        "images": [
            {
                "id": image,
                "best": best,
                "top": [{"class": label, "probability": p} for label, p in _ranked(found, i, top)],
                "probabilities": found.probabilities[i].tolist(),
            }
            for i, (image, best) in enumerate(zip(found.ids, found.best, strict=True))
        ],
    }


def _print(classifier: Any, found: Predictions, rejects: RejectLog, top: int) -> None:
    from chiasm.cli.inputs import say_rejected

    shown = min(len(found), SHOWN_IMAGES)
    names = ("best", "second", "third")[:top] + tuple(f"{i}th" for i in range(4, top + 1))
    cells = [
        (Path(found.ids[i]).name, *(f"{label} {p:.2f}" for label, p in _ranked(found, i, top))) for i in range(shown)
    ]
    print_table(("image", *names), cells)
    if shown < len(found):
        print(f"  ... {len(found) - shown} more; `--csv FILE` or `--json` gives all")
    say_rejected(rejects)
    for sentence in _about(classifier):
        print(f"  {sentence}")


def _about(classifier: Any) -> list[str]:
    """What a reader must know of the classifier before believing a number."""
    facts, lines = classifier.facts, []
    data = facts.get("data")
    told = f"{classifier.name}: {classifier.label}, {len(classifier.classes)} classes"
    lines.append(told + (f", trained on {data}" if isinstance(data, str) else ""))
    score = facts.get("balanced_accuracy")
    if isinstance(score, dict) and isinstance(score.get("value"), int | float):
        lines.append(f"balanced accuracy on its test images: {_interval(score)}, chance {_chance(score, classifier)}")
    else:
        lines.append("its balanced accuracy was not recorded: the probabilities say nothing of how often it is right")
    note = facts.get("note")
    if isinstance(note, str) and note:
        lines.append(note)
    lines.append(f"Other scanners, stains and patients than its training data can mislead it. {RESEARCH_ONLY}")
    return lines


def _interval(score: dict[str, Any]) -> str:
    from chiasm.types import Interval

    def number(name: str) -> float:
        value = score.get(name)
        return float(value) if isinstance(value, int | float) else float("nan")

    n = score.get("n")
    count = n if isinstance(n, int) else 0
    return str(Interval(number("value"), number("low"), number("high"), count)) + (f" (n = {count})" if count else "")


def _chance(score: dict[str, Any], classifier: Any) -> str:
    chance = score.get("chance")
    return f"{chance if isinstance(chance, int | float) else 1 / len(classifier.classes):.3f}"
