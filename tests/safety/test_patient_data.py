"""The canary: a patient's name in folders, files, ids, texts and labels reaches no message, log, file name or model.

Results that were asked for (printed rows, the store, ``rejected.jsonl`` beside the data) do name rows; nothing else may.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from chiasm.cli.main import app
from chiasm.load import save_encoder
from chiasm.testing import TinyEncoder

CANARY = "Qwertzinger"
RECIPE = """
name = "canary"
[data]
source = "{source}"
leakage = "{leakage}"
validation_splits = ["val"]
on_bad_row = "{on_bad_row}"
[image]
image_size = 32
patch_size = 8
width = 32
layers = 1
heads = 2
[text]
width = 32
layers = 1
heads = 2
context_length = 32
[projection]
dim = 16
[preprocess]
size = 32
[tokenizer]
compact = true
[optim]
epochs = 2
batch_size = 4
[run]
log_every = 1
"""
Say = Callable[..., str]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve films of patients with one name, of which two are damaged, one is missing and one has no text."""
    folder = tmp_path / f"{CANARY}_Jane"
    folder.mkdir()
    rows = ["filepath,report,patient_id,split,referrer,finding"]
    for k in range(12):
        name = f"{CANARY}-{k}.png"
        Image.new("L", (40, 40), 15 * k).save(folder / name)
        text = "" if k == 9 else f"{CANARY} {k}: effusion number {k}"
        split = "val" if k in (3, 7, 11) else "train"
        rows.append(f"{name},{text},{CANARY}^{k},{split},Dr {CANARY} {k % 6},{'effusion' if k % 2 else 'normal'}")
    (folder / f"{CANARY}-4.png").write_bytes(b"")
    (folder / f"{CANARY}-5.png").write_bytes((folder / f"{CANARY}-6.png").read_bytes()[:-30])
    (folder / f"{CANARY}-8.png").unlink()
    path = tmp_path / "table.csv"
    path.write_text("\n".join(rows).replace(f"\n{CANARY}-", f"\n{folder.name}/{CANARY}-") + "\n")
    return path


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Say:
    """Run a command; return all that it said beside its result: errors, warnings, log records."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, logger="chiasm")

    def run(*words: object, code: int = 0) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = CliRunner().invoke(app, [str(w) for w in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return "\n".join([result.stderr, caplog.text, *(str(w.message) for w in caught)])

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_encoder(TinyEncoder(0), tmp_path / "model")


def check_files(folder: Path, *allowed: str) -> None:
    """Assert that no file below a folder has the name in its path or, unless allowed, in its bytes."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        assert CANARY not in relative
        if path.is_file() and not any(relative.startswith(a) for a in allowed):
            content = path.read_bytes()
            assert CANARY.encode() not in content, relative
            assert CANARY.lower().encode() not in content, relative


POLICY = Path(__file__).parents[2] / "recipes" / "moderation_chest_intake.toml"


def test_commands_say_no_names(said: Say, model: Path, table: Path, tmp_path: Path) -> None:
    with_table = ("--table", table, "--model", model)
    messages = [
        said("zero-shot", *with_table, "--labels", "normal, effusion", "--truth", "finding"),
        said("retrieval", *with_table),
        said("retrieval", "effusion", *with_table),
        said("embed", table, "--out", tmp_path / "store", "--model", model),
    ]
    assert "2 image file" in messages[0] or "image file is empty" in messages[0]
    for words in (
        ("zero-shot", *with_table, "--labels", "normal, nodule", "--truth", "referrer"),
        ("zero-shot", *with_table, "--labels", "normal, nodule", "--truth", "patient"),
        ("zero-shot", *with_table, "--labels", "normal, nodule", "--split", "test"),
        ("retrieval", *with_table, "--drop-text", "effusion"),
        ("embed", table, "--out", tmp_path / "b", "--model", model, "--on-bad", "fail"),
        ("retrieval", "--store", tmp_path / f"{CANARY}" / "store", "--model", model),
        ("inspect", tmp_path / f"{CANARY}" / "film.png", "a", "--model", model),
        ("inspect", table, "a", "--model", tmp_path / f"{CANARY}" / "model"),
        ("explain", table, "a", "--model", model, "--out", tmp_path / "heat.png"),
        ("calibrate", *with_table, "--labels", "normal, effusion", "--truth", "finding"),
        ("calibrate", *with_table, "--labels", "normal, effusion", "--truth", "referrer"),
        ("calibrate", "--scores", table, "--truth", "finding"),
        ("calibrate", "--scores", table, "--labels", "normal, effusion", "--truth", "*"),
        ("moderate", *with_table, "--policy", POLICY, "--truth", "referrer"),
        ("moderate", *with_table, "--policy", tmp_path / f"{CANARY}" / "policy.toml"),
    ):
        messages.append(said(*words, code=1))
    for message in messages:
        assert CANARY.lower() not in message.lower(), message
    check_files(tmp_path / "store", "embeddings.lance", "rejected.jsonl")


@pytest.mark.parametrize(
    ("leakage", "on_bad_row", "code"), [("refuse", "skip", 0), ("refuse", "fail", 1), ("refuse", "leak", 1)]
)
def test_training_writes_no_names(
    said: Say, table: Path, tmp_path: Path, leakage: str, on_bad_row: str, code: int
) -> None:
    if on_bad_row == "leak":
        on_bad_row = "skip"
        table.write_text(table.read_text().replace(f"{CANARY}^3", f"{CANARY}^2"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(source=table, leakage=leakage, on_bad_row=on_bad_row))
    message = said("train", recipe, "--out", tmp_path / "run", code=code)
    assert CANARY.lower() not in message.lower(), message
    if code == 0:
        assert (tmp_path / "run" / "rejected.jsonl").read_text().count("\n") == 4
        check_files(tmp_path / "run", "rejected.jsonl")


DISTILL = """
name = "canary"
[data]
source = "{source}"
label = "finding"
validation_splits = ["val"]
test_splits = ["test"]
leakage = "{leakage}"
[pairing]
{pairs}
encoder = "{model}"
[backbone]
encoder = "{model}"
[unimodal]
steps = 2
[text]
steps = 2
[fuse]
steps = 2
"""


def test_pairing_and_distillation_write_no_names(said: Say, model: Path, table: Path, tmp_path: Path) -> None:
    lines = table.read_text().splitlines()
    for row in (1, 2, 3, 11):
        lines[row] = lines[row].replace(",train,", ",test,").replace(",val,", ",test,")
    table.write_text("\n".join(lines) + "\n")
    corpus = tmp_path / f"{CANARY}.csv"
    corpus.write_text(
        "report_id,words\n"
        + "".join(f"{CANARY}-{i},Seen by {CANARY}: effusion {i}\n" for i in range(5))
        + f"{CANARY},\n"
    )
    words = ("pairing", "--images", table, "--encoder", model, "--examples", 0, "--reports")
    named = (tmp_path / "reports.csv", "--report-column", "text=words")
    named[0].write_bytes(corpus.read_bytes())
    messages = [
        said(*words, *named, "--out", tmp_path / "pairs", "--audit-label", "finding"),
        said(*words, named[0], "--out", tmp_path / "b", code=1),
        said(*words, *named, "--out", tmp_path / "b", "--tissue", "colon", code=1),
        said(*words, *named, "--out", tmp_path / "b", "--audit-label", "grade", code=1),
    ]
    assert "reports: 1 row rejected" in messages[0]
    headless = tmp_path / "headless.csv"
    headless.write_text(
        "\n".join(corpus.read_text().splitlines()[1:]) + f"\n{CANARY},a long report about nothing at all\n"
    )
    messages.append(said(*words, headless, "--out", tmp_path / "b", "--report-column", "text=words", code=1))
    check_files(tmp_path / "pairs", "pairs.parquet", "texts.json", "rejected")  # what was asked for names rows
    recipe = tmp_path / "recipe.toml"

    def plan(pairs: str, leakage: str = "refuse") -> Path:
        recipe.write_text(DISTILL.format(source=table, model=model, pairs=pairs, leakage=leakage))
        return recipe

    ready = f'pairs = "{tmp_path / "pairs"}"'
    made = f'reports = "{named[0]}"\ncolumns = {{ text = "words" }}'
    messages += [
        said("distill", plan(ready), "--out", tmp_path / "run"),
        said("distill", plan(made), "--out", tmp_path / "all", "--controls", "--seeds", 1),
        said("distill", plan(ready), "--out", tmp_path / "c", "--set", "data.label=referrer", code=1),
    ]
    for run in ("run", "all"):
        check_files(tmp_path / run, "rejected.jsonl")
    table.write_text(table.read_text().replace(f"{CANARY}^3", f"{CANARY}^2"))
    messages.append(said("distill", plan(made), "--out", tmp_path / "d", code=1))
    film = tmp_path / f"{CANARY}_Jane" / f"{CANARY}-6.png"
    film.write_bytes((film.parent / f"{CANARY}-7.png").read_bytes())
    messages.append(said("distill", plan(ready, "off"), "--out", tmp_path / "e", code=1))
    assert "not the files that were paired" in messages[-1]
    for message in messages:
        assert CANARY.lower() not in message.lower(), message


def test_the_canary_would_be_heard(said: Say, table: Path, tmp_path: Path) -> None:
    """A file that the user names on the command line is named back: the one exception, and proof that we listen."""
    image = tmp_path / f"{CANARY}.png"
    assert CANARY in said("inspect", image, "a", "--model", save_encoder(TinyEncoder(0), tmp_path / "m"), code=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text(CANARY)
    with pytest.raises(AssertionError):
        check_files(tmp_path / "run")
