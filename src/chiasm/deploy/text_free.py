"""The proof that an exported classifier needs no text: every text package is blocked, then it is loaded and predicts.

    python -m chiasm.deploy.text_free FOLDER [--batch N] [--seed S] [--forms torch,onnx] [--allow-code]

runs in a process of its own and prints one JSON document: logits on random input, what was blocked, and what of it was
asked for. Whoever does not trust chiasm's word can run it on another machine. No file but the export is read.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import CheckpointError

#: Packages that handle text, and the parts of chiasm that do. (``chiasm.encoders.bert`` holds nothing without
#: transformers; GLoRIA's and BioViL's image towers live beside text towers that stand on it.)
BLOCKED = (
    "transformers", "tokenizers", "sentence_transformers", "sentencepiece", "tiktoken", "instant_clip_tokenizer",
    "ftfy", "regex", "nltk", "spacy", "open_clip", "clip", "peft", "lancedb",
    "chiasm.load", "chiasm.fetch", "chiasm.embed", "chiasm.distill", "chiasm.pairing", "chiasm.tasks", "chiasm.losses",
    "chiasm.train", "chiasm.io.report", "chiasm.io.pairs", "chiasm.datasets.reports",
    "chiasm.data.byte_pairs", "chiasm.data.chunks", "chiasm.data.huggingface_tokenizer", "chiasm.data.report_text",
    "chiasm.data.tokenizers", "chiasm.data.tokens", "chiasm.data.wordpiece",
    "chiasm.encoders.build", "chiasm.encoders.dual", "chiasm.encoders.medclip",
    "chiasm.encoders.text",
)  # fmt: skip
SECONDS = 600
Form = Literal["torch", "onnx"]


@dataclass(frozen=True)
class TextFree:
    """What a process without text packages found.

    Attributes:
        passed: Whether the export loaded and predicted.
        blocked: Packages and modules that could not be imported.
        asked_for: Those of them that something tried to import; guarded attempts do not harm.
        logits: (batch, classes), of the same random input as in this process.
        problem: Why it did not pass, one line.
    """

    passed: bool
    blocked: tuple[str, ...]
    asked_for: tuple[str, ...]
    logits: NDArray[np.float64] | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without the logits."""
        return {
            "passed": self.passed,
            "problem": self.problem,
            "asked_for": list(self.asked_for),
            "blocked": list(self.blocked),
        }


class TextBlocker(importlib.abc.MetaPathFinder):
    """Refuses to import what handles text, and remembers what was asked for.

    Args:
        names: Modules; what lies inside them is refused, too.
    """

    def __init__(self, names: Sequence[str] = BLOCKED) -> None:
        self.names = tuple(names)
        self.asked_for: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Raise ``ImportError`` for a blocked name; leave any other to the usual finders."""
        for name in self.names:
            if fullname == name or fullname.startswith(f"{name}."):
                self.asked_for.add(name)
                raise ModuleNotFoundError(f"`{fullname}` is blocked: a vision classifier needs no text", name=fullname)
        return None

    def install(self) -> None:
        """Block from now on in this process.

        Raises:
            RuntimeError: Something of it is imported already.
        """
        present = [m for m in sys.modules if any(m == n or m.startswith(f"{n}.") for n in self.names)]
        if present:
            raise RuntimeError(f"imported already: {', '.join(present)}")
        sys.meta_path.insert(0, self)


def prove_text_free(
    folder: str | Path, *, batch: int, seed: int, forms: Sequence[Form] = ("torch",), allow_code: bool = False
) -> dict[Form, TextFree]:
    """Load an export in a process in which no text package can be imported, and let it predict.

    Args:
        folder: The export.
        batch: Rows of random input; see :func:`chiasm.deploy.cost.example_input`.
        seed: Of the input.
        forms: Which of its forms to load, one after the other.
        allow_code: See :func:`chiasm.classifier.load_classifier`.

    Raises:
        CheckpointError: The process could not be run at all.
    """
    command = [sys.executable, "-m", "chiasm.deploy.text_free", str(Path(folder).resolve()), "--batch", str(batch)]
    command += ["--seed", str(seed), "--forms", ",".join(forms), *(["--allow-code"] if allow_code else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        values = json.loads(done.stdout.strip().splitlines()[-1])
        return {form: _answer(values[form]) for form in forms}
    except (OSError, subprocess.SubprocessError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError("the process that proves the freedom from text could not be run") from error


def _answer(value: dict[str, Any]) -> TextFree:
    logits = None if value["logits"] is None else np.array(value["logits"])
    return TextFree(value["passed"], BLOCKED, tuple(value["asked_for"]), logits, value["problem"])


def main(arguments: Sequence[str]) -> None:
    """Block, load, predict, print."""
    import argparse

    parser = argparse.ArgumentParser(prog="chiasm.deploy.text_free")
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", default="torch", help="torch, onnx or torch,onnx")
    parser.add_argument("--allow-code", action="store_true")
    given = parser.parse_args(arguments)
    blocker = TextBlocker()
    blocker.install()
    results: dict[str, dict[str, Any]] = {}
    for form in given.forms.split(","):
        blocker.asked_for.clear()
        result: dict[str, Any] = {"passed": False, "problem": "", "logits": None}
        try:
            result["logits"] = _logits(form, given.folder, given.batch, given.seed, given.allow_code)
            result["passed"] = True
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            result["problem"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        results[form] = {**result, "asked_for": sorted(blocker.asked_for)}
    sys.stdout.write(json.dumps(results) + "\n")


def _logits(form: str, folder: str, batch: int, seed: int, allow_code: bool) -> list[list[float]]:
    """Predict on random input; then on an image, all the way: decoded, prepared, classified."""
    model: Any
    logits: NDArray[Any]
    if form == "onnx":
        from chiasm.deploy.onnx import load_onnx

        model = load_onnx(folder)
        logits = model.logits(model.example(batch, seed=seed))
    else:
        from chiasm.classifier import load_classifier
        from chiasm.deploy.cost import example_input

        model = load_classifier(folder, allow_code=allow_code)
        logits = model.logits(example_input(model, batch, seed=seed)).double().numpy()
    if model.preprocess is not None:
        from PIL import Image

        ramp = np.add.outer(np.arange(97), np.arange(131)).astype(np.uint8)
        model.predict([Image.fromarray(ramp)], workers=0)
    found: list[list[float]] = logits.tolist()
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
