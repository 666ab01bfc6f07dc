"""What every command says to bad input: `error:` and `hint:`, exit code 1 or 130, no traceback, nothing lost."""

from __future__ import annotations

import io
import os
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("default::chiasm.data.tokens.TruncationWarning"),
    pytest.mark.filterwarnings("default::UserWarning"),
]
#: Folders are named after patients, so no message may name one.
FOLDER = "patient-4711"

RECIPE = """
name = "tiny"
[data]
phantoms = "tissue"
patients = 16
validation = 0.25
[image]
kind = "resnet"
image_size = 32
width = 8
layers = [1, 1]
heads = 2
[text]
width = 32
layers = 1
heads = 2
[projection]
dim = 16
[preprocess]
size = 32
[tokenizer]
compact = true
[optim]
epochs = 2
batch_size = 8
[run]
save_every = 1
"""


def packed(kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 10^10 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("L", (32, 32), 80 * k) for k in range(3)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


BAD = {
    "zero-byte": (b"", "is empty"),
    "truncated": (packed("JPEG")[:-400], "is damaged"),
    "text": (b"<html>not an image</html>", "is not an image"),
    "animated": (animation(), "has 3 frames"),
    "bomb": (bomb(), "is too large"),
}
UNUSUAL = {
    "cmyk": packed("JPEG", "CMYK"),
    "16-bit": packed("PNG", "I;16"),
    "palette": packed("PNG", "P", transparency=3),
    "1-bit": packed("PNG", "1"),
}


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """A real full disk for this process: no file may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_message(text: str, *parts: str, hint: bool = True) -> None:
    assert text.count("error: ") == 1, text
    assert "Traceback" not in text
    assert FOLDER not in text
    assert "hint: " in text or not hint, text
    for part in parts:
        assert part in text, text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / FOLDER
    path.mkdir()
    return path


@pytest.fixture
def image(folder: Path) -> Path:
    path = folder / "good.png"
    path.write_bytes(packed("PNG"))
    return path


@pytest.fixture
def ten_rows(folder: Path) -> Path:
    rows = ["filepath,title,patient_id,finding"]
    for k in range(10):
        Image.new("L", (40, 40), 20 * k).save(folder / f"{k}.png")
        rows.append(f"{k}.png,film number {k},p{k // 2},{'effusion' if k % 2 else 'normal'}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder / "table.csv"


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_refused_by_name(chiasm: Run, model_dir: Path, folder: Path, kind: str) -> None:
    content, message = BAD[kind]
    path = folder / "film.png"
    path.write_bytes(content)
    model = ("--model", model_dir)
    for words in (("inspect", path, "a", "b"), ("explain", path, "a", "--out", folder / "o.png")):
        check_message(chiasm(*words, *model, code=1), "image `film.png`", message, hint=False)
    check_message(chiasm("zero-shot", path, "--labels", "a, b", *model, code=1), "none of 1 rows", message, hint=False)
    assert not (folder / "o.png").exists()


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_images_are_read(chiasm: Run, model_dir: Path, folder: Path, kind: str) -> None:
    path = folder / "film.png"
    path.write_bytes(UNUSUAL[kind])
    out = folder / "heat.png"
    record = chiasm("explain", path, "effusion", "--model", model_dir, "--out", out, "--json")
    assert (record["width_px"], record["height_px"]) == (64, 48)
    with Image.open(out) as drawn:
        assert (drawn.mode, drawn.size) == ("RGB", (64, 48))


def test_bad_rows_are_counted_skipped_or_fatal(chiasm: Run, model_dir: Path, ten_rows: Path, tmp_path: Path) -> None:
    (ten_rows.parent / "3.png").write_bytes(b"")
    (ten_rows.parent / "4.png").unlink()
    ten_rows.write_text(ten_rows.read_text().replace("film number 7", " "))
    words = ("--table", ten_rows, "--labels", "normal, effusion", "--model", model_dir)
    record = chiasm("zero-shot", *words, "--truth", "finding", "--json")
    assert record["scores"]["n"] == len(record["images"]) == 8, "a row without a caption has an image all the same"
    assert record["reasons"] == {"image file is missing": 1, "image file is empty": 1}
    assert "2 rows rejected: " in chiasm("zero-shot", *words)
    record = chiasm("retrieval", "--table", ten_rows, "--model", model_dir, "--json")
    assert record["rejected"] == 3
    store = tmp_path / "store"
    record = chiasm("embed", ten_rows, "--out", store, "--model", model_dir, "--json")
    assert record["added"] == {"image": 7, "text": 8}
    assert len((store / "rejected.jsonl").read_text().splitlines()) == 3
    for mistake, message in (("fail", "cannot be used"), ("explode", "--on-bad must be skip or fail")):
        text = chiasm("embed", ten_rows, "--out", tmp_path / "b", "--model", model_dir, "--on-bad", mistake, code=1)
        check_message(text, message, hint=False)


def test_empty_texts_are_refused(chiasm: Run, model_dir: Path, image: Path, ten_rows: Path) -> None:
    model = ("--model", model_dir)
    check_message(chiasm("inspect", image, "a film", " ", *model, code=1), "a text is empty")
    check_message(chiasm("explain", image, "", *model, "--out", image.parent / "o.png", code=1), "empty", hint=False)
    check_message(chiasm("retrieval", "", "--table", ten_rows, *model, code=1), "a query is empty")
    check_message(chiasm("zero-shot", image, "--labels", ", ,", *model, code=1), "no labels were given")
    ten_rows.write_text("filepath,title\n0.png,\n1.png, \n")
    check_message(chiasm("retrieval", "--table", ten_rows, *model, code=1), "2 text is empty", hint=False)


def test_labels_and_truth_that_cannot_be_used(chiasm: Run, model_dir: Path, image: Path, ten_rows: Path) -> None:
    model = ("--model", model_dir)
    check_message(chiasm("zero-shot", image, "--labels", "effusion", *model, code=1), "always get probability 1")
    check_message(
        chiasm("zero-shot", image, "--labels", "a, b", "--truth", "finding", *model, code=1), "no table was given"
    )
    words = ("zero-shot", "--table", ten_rows, "--truth", "finding", *model)
    text = chiasm(*words, "--labels", "normal, nodule", code=1)
    check_message(text, "label `nodule` does not occur in column `finding`, which holds 2 different values")
    check_message(chiasm(*words, "--labels", "normal, efusion", code=1), "did you mean `effusion`?")
    labels = image.parent / "labels.json"
    for content, message in (
        ("{", "is not valid JSON"), ('{"a": []}', "label `a`"), ("[]", "no labels"), ("7", "must hold"),
    ):  # fmt: skip
        labels.write_text(content)
        check_message(chiasm(*words, "--labels-file", labels, code=1), message, hint=False)
    check_message(chiasm(*words, "--labels-file", image.parent / "no.json", code=1), "does not exist", hint=False)


def test_probabilities_outlive_a_truth_that_cannot_be_used(
    chiasm: Run, model_dir: Path, ten_rows: Path, tmp_path: Path
) -> None:
    ten_rows.write_text(ten_rows.read_text().replace(",effusion", ",1").replace(",normal", ",-1"))
    words = ("--table", ten_rows, "--labels", "finding", "--multi", "--truth", "*", "--model", model_dir)
    text = chiasm("zero-shot", *words, "--out", tmp_path / "p.csv", code=1)
    check_message(text, "the truth of label `finding` must be 0, 1 or blank")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 11


def test_columns_can_be_named(chiasm: Run, model_dir: Path, ten_rows: Path, tmp_path: Path) -> None:
    table = tmp_path / "odd.csv"
    table.write_text(ten_rows.read_text().replace("filepath,title", "where,words"))
    found = ("--column", "image=where", "--column", "text=words", "--root", ten_rows.parent, "--model", model_dir)
    record = chiasm("retrieval", "--table", table, *found, "--json")
    assert record["text_to_image"]["n_queries"] == 10
    record = chiasm("embed", table, "--out", tmp_path / "s", *found, "--json")
    assert record["added"] == {"image": 10, "text": 10}
    text = chiasm("retrieval", "film", "--table", table, *found, "--answers", "text", "-k", 1)
    assert "film number" in text
    for words, message in (
        ((), "`odd.csv` has no image column"),
        (("--column", "picture=where"), "ROLE=NAME"),
        (("--column", "image=wher"), "did you mean `where`"),
        (("--column", "image=where", "--column", "image=words"), "named twice"),
    ):
        text = chiasm("retrieval", "film", "--table", table, "--model", model_dir, *words, code=1)
        check_message(text, message)


def test_a_folder_of_classes_is_a_table(chiasm: Run, model_dir: Path, tmp_path: Path) -> None:
    for k, name in enumerate(("benign", "tumour", "benign", "tumour")):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40), 40 * k).save(tmp_path / "set" / name / f"{k}.png")
    words = ("--table", tmp_path / "set", "--truth", "label", "--labels", "benign, tumour", "--model", model_dir)
    assert chiasm("zero-shot", *words, "--json")["scores"]["n"] == 4
    (tmp_path / "none").mkdir()
    text = chiasm("zero-shot", tmp_path / "none", "--labels", "a, b", "--model", model_dir, code=1)
    check_message(text, "folder `none` holds no image")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("film.pt", packed("PNG"), "is a PNG image"),
        ("page.pt", b"<!DOCTYPE html><html>", "is an HTML page"),
        ("empty.safetensors", b"", "is empty"),
        ("cut.safetensors", (10**6).to_bytes(8, "little") + b'{"a": 1}', "truncated safetensors"),
        ("noise.bin", b"\x01\x02" * 400, "no weight file that chiasm knows"),
        ("", None, "holds no model"),
        ("absent.pt", None, "does not exist"),
    ],
)
def test_foreign_checkpoints(
    chiasm: Run, folder: Path, image: Path, name: str, content: bytes | None, message: str
) -> None:
    path = folder / "weights" / name
    (folder / "weights").mkdir()
    if content is not None:
        path.write_bytes(content)
    check_message(chiasm("inspect", image, "a", "b", "--model", path, code=1), message)
    check_message(chiasm("doctor", "--model", path, code=1), message)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "x" * 5000, "a\0b", ".", "demo/model"])
def test_names_that_are_neither_models_nor_paths(
    chiasm: Run, image: Path, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # where the demo was run, `demo/model` is a model
    check_message(chiasm("inspect", image, "a", "--model", name, code=1))


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "unknown device `gpu`"), ("cuda:99", "device `cuda:99` is not here")]
)
def test_devices_that_are_not_here(chiasm: Run, model_dir: Path, image: Path, device: str, message: str) -> None:
    check_message(chiasm("inspect", image, "a", "--model", model_dir, "--device", device, code=1), message)


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (RECIPE.replace("epochs", "epoch"), (), "did you mean `optim.epochs`"),
        (RECIPE.replace('"resnet"', '"resnt"'), (), "did you mean `resnet`"),
        (RECIPE.replace("epochs = 2", 'epochs = "two"'), (), "`optim.epochs` must be"),
        ("name = ", (), "TOML"),
        (RECIPE, ("--set", "optim.lrr=1"), "did you mean `optim.lr`"),
        (RECIPE, ("--set", "optim"), "optim"),
        (None, (), "does not exist"),
    ],
)
def test_recipes_with_a_typo(
    chiasm: Run, folder: Path, content: str | None, words: tuple[str, ...], message: str
) -> None:
    recipe = folder / "r.toml"
    if content is not None:
        recipe.write_text(content)
    check_message(chiasm("train", recipe, "--out", folder / "run", *words, code=1), message, hint=False)
    assert not (folder / "run").exists()


def test_a_long_query_is_a_text_not_a_file_name(chiasm: Run, model_dir: Path, ten_rows: Path) -> None:
    text = chiasm("retrieval", "small left effusion " * 40, "--table", ten_rows, "--model", model_dir, "-k", 1)
    assert "rank" in text


def test_stores_that_do_not_fit_the_question(chiasm: Run, model_dir: Path, ten_rows: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    chiasm("embed", ten_rows, "--out", store, "--model", model_dir, "--modality", "image")
    words = ("retrieval", "a film", "--store", store, "--model", model_dir)
    check_message(chiasm(*words, "--answers", "text", code=1), "store `store` holds no texts")
    check_message(chiasm(*words, "--drop-text", "x", code=1), "is for tables", hint=False)
    check_message(chiasm("retrieval", "a", "--store", tmp_path / "no", "--model", model_dir, code=1), "`no`")
    chiasm("embed", ten_rows, "--out", store, "--model", model_dir)
    assert chiasm("retrieval", "--store", store, "--json")["text_to_image"]["n_queries"] == 10, "needs no model"


def test_a_full_disk_is_told_and_loses_nothing(
    chiasm: Run, model_dir: Path, image: Path, ten_rows: Path, tmp_path: Path
) -> None:
    recipe, store, heat, csv = (tmp_path / name for name in ("r.toml", "store", "heat.png", "p.csv"))
    recipe.write_text(RECIPE)
    heat.write_bytes(b"old")
    csv.write_bytes(b"old")
    commands = (
        ("embed", ten_rows, "--out", store, "--model", model_dir),
        ("explain", image, "a", "--model", model_dir, "--out", heat),
        ("zero-shot", "--table", ten_rows, "--labels", "a, b", "--model", model_dir, "--out", csv),
        ("train", recipe, "--out", tmp_path / "run"),
        ("demo", "--out", tmp_path / "demo"),
    )
    for words in commands:
        with file_limit(10):
            text = chiasm(*words, code=1)
        check_message(text, "disk is full")
        assert str(tmp_path) not in text
    assert heat.read_bytes() == csv.read_bytes() == b"old"
    assert chiasm(*commands[0], "--json")["added"] == {"image": 10, "text": 10}


def test_places_that_cannot_be_written(chiasm: Run, model_dir: Path, image: Path, ten_rows: Path) -> None:
    inside = image / "x.csv"  # a file is no folder
    model = ("--model", model_dir)
    for words in (
        ("zero-shot", image, "--labels", "a, b", *model, "--out", inside),
        ("explain", image, "a", *model, "--out", inside.with_suffix(".png")),
        ("embed", ten_rows, *model, "--out", inside),
        ("demo", "--out", inside),
    ):
        check_message(chiasm(*words, code=1))
    text = chiasm("explain", image, "a", *model, "--out", image.parent / "heat.doc", code=1)
    check_message(text, "`--out heat.doc` is no picture")


def test_the_demo_replaces_nothing_that_is_not_its_own(chiasm: Run, folder: Path) -> None:
    (folder / "out" / "data").mkdir(parents=True)
    (folder / "out" / "data" / "mine.csv").write_text("a year of work")
    check_message(chiasm("demo", "--out", folder / "out", code=1), "holds `data`, which no demo made")
    assert (folder / "out" / "data" / "mine.csv").read_text() == "a year of work"


class Interrupts:
    """Progress that presses Ctrl-C after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def start(self, total: int | None, description: str) -> None: ...

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.steps -= n > 0
        if self.steps < 0:
            raise KeyboardInterrupt

    def finish(self) -> None: ...


def test_ctrl_c_in_embed_keeps_what_is_done(
    chiasm: Run, model_dir: Path, ten_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("embed", ten_rows, "--out", tmp_path / "store", "--model", model_dir, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr("chiasm.cli.embed.make_progress", lambda *a, **k: Interrupts(2))
        text = chiasm(*words, code=130)
    check_message(text, "interrupted: 6 of 20 rows are stored; the same command goes on from there", hint=False)
    record = chiasm(*words, "--json")
    assert record["present"]["image"] + record["added"]["image"] == 10
    assert record["present"]["image"] == 6


def test_ctrl_c_in_train_says_how_to_go_on(chiasm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    whole = chiasm("train", recipe, "--out", tmp_path / "whole", "--json")
    with monkeypatch.context() as patch:
        patch.setattr("chiasm.cli.train.make_progress", lambda *a, **k: Interrupts(whole["steps"] - 1))
        text = chiasm("train", recipe, "--out", tmp_path / "run", code=130)
    check_message(text, "interrupted; the same command with `--resume` goes on", hint=False)
    again = chiasm("train", recipe, "--out", tmp_path / "run", "--resume", "--json")
    assert again["steps"] == whole["steps"]
    ours, theirs = (tmp_path / name / "model" / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_usage_mistakes_exit_with_2_and_debug_shows_the_traceback(
    chiasm: Run, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chiasm("inspect", code=2)
    chiasm("zero-shot", "--lables", "a", code=2)
    chiasm("nonsense", code=2)
    chiasm("embed", "x", "--out", "y", "--batch-size", 0, code=2)
    monkeypatch.setenv("CHIASM_DEBUG", "1")
    with pytest.raises(LookupError, match="unknown model `biomedclp`"):
        chiasm("inspect", image, "a", "b", "--model", "biomedclp")
    with pytest.raises(OSError, match=os.strerror(20)):
        chiasm("demo", "--out", image / "x")
