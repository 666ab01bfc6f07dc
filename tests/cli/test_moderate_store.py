"""``chiasm moderate`` on a made store: truth in two forms, fitted policies, what the document holds, refusals with a way out."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from chiasm.cli.moderate import _truth
from chiasm.errors import ChiasmError
from chiasm.io.store import save_embeddings
from chiasm.load import load
from chiasm.metrics.classification import auroc
from chiasm.tasks.moderation import Category, Policy, policy_text, read_policy
from chiasm.types import Embeddings

Run = Callable[..., Any]
HOSTILE = "<b>slide</b> & $x"


@pytest.fixture(scope="module")
def images(model_dir: Path) -> Embeddings:
    """Vectors in the model's space that lean to one of its texts: half photo, half slide; two images a patient."""
    from chiasm.embed import embed_texts

    encoder = load(str(model_dir))
    texts = embed_texts(encoder, ["a photo", "a slide"]).normalize().vectors
    random = np.random.default_rng(0)
    kind = np.repeat(np.arange(60) % 2, 2)
    vectors = texts[kind] + 0.8 * random.normal(size=(120, texts.shape[1]))
    parts = [("train", "val", "test")[p % 3] for p in range(60) for _ in range(2)]
    return Embeddings(
        vectors.astype(np.float32), tuple(f"file{i}.png" for i in range(120)), encoder.space, "image", normalized=False,
        patients=tuple(f"secret{i // 2}" for i in range(120)),
        labels={"kind": tuple(("photo", HOSTILE)[k] for k in kind), "photo": tuple(int(k == 0) for k in kind),
                HOSTILE: tuple(int(k) for k in kind), "split": tuple(parts), "blank": (None,) * 120},
    )  # fmt: skip


def policy(**changes: Any) -> Policy:
    given: dict[str, Any] = {"against": ("a slide",), "threshold": 0.1, **changes}
    return Policy("intake", (Category("photo", ("a photo",), **given),
                             Category(HOSTILE, ("a slide",), ("a photo",), "review", 0.1)))  # fmt: skip


@pytest.fixture
def run(chiasm: Run, images: Embeddings, model_dir: Path, tmp_path: Path) -> Run:
    def moderate(*words: object, given: Policy | None = None, code: int = 0) -> Any:
        store, file = tmp_path / f"{len(list(tmp_path.iterdir()))}.store", tmp_path / "policy.toml"
        save_embeddings(store, images)
        file.write_text(policy_text(given or policy()), encoding="utf-8")
        return chiasm("moderate", "--store", store, "--model", model_dir, "--policy", file, "--resamples", 20, *words,
                      code=code)  # fmt: skip

    return moderate


def test_the_document_without_a_truth(run: Run, images: Embeddings) -> None:
    found = run("--json")
    assert set(found) == {"policy", "counts", "images", "scores", "split", "refused", "run_card"}
    assert (found["scores"], found["split"], found["refused"]) == (None, None, {})
    assert [i["id"] for i in found["images"]] == list(images.ids)
    assert found["counts"] == {
        a: sum(i["decision"] == a for i in found["images"]) for a in ("reject", "review", "accept")
    }
    for image in found["images"]:
        for e in image["evidence"]:
            assert e["score"] == pytest.approx(e["cosine"] - e["against_cosine"])
            assert e["margin"] == pytest.approx(e["score"] - 0.1)
            assert (e["verdict"] is not None) == (e["margin"] >= 0)
        strictest = [e["category"] for e in image["evidence"] if e["verdict"] == image["decision"]]
        assert image["because"] in (strictest or [None])


@pytest.mark.parametrize("truth", ["kind", "*"])
def test_truth_in_one_column_or_in_several_is_the_same(run: Run, truth: str) -> None:
    found = run("--json", "--truth", truth)
    assert list(found["scores"]["categories"]) == ["photo", HOSTILE]
    photo = found["scores"]["categories"]["photo"]
    scores = [i["evidence"][0]["score"] for i in found["images"]]
    truth_of = [int(k // 2 % 2 == 0) for k in range(120)]
    assert photo["auroc"]["value"] == pytest.approx(auroc(truth_of, scores))
    assert photo["found"]["value"] == pytest.approx(
        np.mean([s >= 0.1 for s, t in zip(scores, truth_of, strict=True) if t])
    )
    assert (photo["positives"], photo["negatives"]) == (60, 60)
    assert (found["scores"]["n"], found["scores"]["patients"], found["scores"]["skipped"]) == (120, 60, [])


def test_a_fit_takes_its_patients_from_validation_and_its_numbers_from_test(run: Run, tmp_path: Path) -> None:
    made = tmp_path / "fitted.toml"
    found = run("--json", "--truth", "kind", "--fit", made, given=policy(review=0.0))
    assert found["split"] == "fitted on `val`, judged on `test`"
    assert (found["scores"]["n"], found["scores"]["patients"]) == (40, 20)
    fitted = read_policy(made)
    photo = fitted.categories[0]
    assert photo.fitted["positives"] + photo.fitted["negatives"] == 40
    assert photo.fitted["specificity"] == 0.95
    assert fitted.to_dict() == found["policy"]
    assert fitted.by_hand == ()
    rows = [k for k in range(120) if k // 2 % 3 == 2]  # of the test split, and of nothing else
    score = np.array([found["images"][k]["evidence"][0]["score"] for k in rows])
    true = np.array([k // 2 % 2 == 0 for k in rows])
    assert found["scores"]["categories"]["photo"]["auroc"]["value"] == pytest.approx(auroc(true.astype(int), score))
    assert "secret" not in made.read_text()
    assert "file1" not in made.read_text()
    again = run("--json", "--truth", "kind", "--fit", tmp_path / "again.toml", given=policy(review=0.0))
    assert again["scores"] == found["scores"]
    assert (tmp_path / "again.toml").read_text() == made.read_text()
    assert fitted.space is not None
    elsewhere = dataclasses.replace(fitted, space=dataclasses.replace(fitted.space, weights="0" * 12))
    # Fitted anew from what was fitted before: the old thresholds leave no trace.
    third = run("--json", "--truth", "kind", "--fit", tmp_path / "third.toml", given=elsewhere)
    assert third["policy"]["categories"]["photo"]["threshold"] == pytest.approx(photo.threshold)


def test_files_hold_every_image(run: Run, tmp_path: Path) -> None:
    csv, lines, page = tmp_path / "d.csv", tmp_path / "d.jsonl", tmp_path / "p.html"
    found = run("--json", "--csv", csv, "--jsonl", lines, "--out", page, "--truth", "kind")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records == found["images"]
    frame = pd.read_csv(csv)
    assert frame["decision"].tolist() == [i["decision"] for i in found["images"]]
    for row, image in zip(frame.to_dict("records"), found["images"], strict=True):
        shown = max(image["evidence"], key=lambda e: e["margin"] if image["because"] in (None, e["category"]) else -9)
        assert row["category"] == shown["category"]
        assert row["margin"] == pytest.approx(shown["margin"])
    text = page.read_text()
    assert "<b>slide" not in text
    assert html.escape(HOSTILE) in text
    assert "secret" not in text
    assert "file1" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fit", "x.toml"), "labelled images"),
        (("--truth", "sort"), "no label column `sort`"),
        (("--truth", "blank"), "no category of the policy occurs in the truth"),
        (("--truth", "split"), "no category of the policy occurs in the truth"),
        (
            ("--truth", "kind", "--fit", "x.toml", "--fit-split", "dev", "--test-split", "test"),
            "no row has split `dev`",
        ),
        (("--truth", "kind", "--fit", "x.toml", "--fit-split", "val"), "name both"),
        (("--truth", "kind", "--fit", "x.toml", "--sensitivity", "95"), "no category could be fitted"),
        (("a.png",), "one of the three"),
        (("--truth", "kind", "a.png"), "images are given"),
    ],
)
def test_refusals_have_a_way_out(run: Run, words: tuple[str, ...], message: str) -> None:
    said = run(*words, code=1)
    assert message in said
    assert "hint: " in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("one", {"photo": [1, 0, None], HOSTILE: [0, 1, None]}),
        ("both", {"photo": [1, 0, 1], HOSTILE: [1, 0, 0]}),
        ("part", {"photo": [1, 0, 0]}),
        ("*", {"photo": [1, None, 0]}),
    ],
)
def test_truth_is_read_by_category(column: str, expected: dict[str, list[Any]], images: Embeddings) -> None:
    labels: Any = {"one": ("photo", HOSTILE, None), "both": (f"Photo|{HOSTILE}", "film", "photo"),
              "part": ("photo", "film", "film"), "photo": (1, None, 0)}  # fmt: skip
    rows = Embeddings(images.vectors[:3], images.ids[:3], images.space, "image", normalized=False, labels=labels)
    assert _truth(rows, column, policy()) == expected


def test_truth_of_no_category_names_the_categories(images: Embeddings) -> None:
    other = Policy("p", (Category("film", ("a film",)),))
    with pytest.raises(ChiasmError, match="no category of the policy occurs in the truth: film") as raised:
        _truth(images, "kind", other)
    assert "joined by `|`" in str(raised.value.hint)
