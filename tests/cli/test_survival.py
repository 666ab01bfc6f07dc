"""`chiasm survival`: a table alone, a store with images and texts, the page, and the traps of a table with times."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from chiasm.data.phantom_survival import CHEST_HAZARD
from chiasm.types import Embeddings, Space

pytest.importorskip("sksurv", reason="the extra `survival` is not installed")

NAMES = tuple(CHEST_HAZARD.coefficients)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """160 patients, two rows each, with findings, age, sex, days, months, an event flag and its opposite."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("table") / "t.csv"
    rows = []
    for k in range(160):
        findings = dict(zip(NAMES, (random.random(7) < 0.3).astype(int).tolist(), strict=True))
        days, event = CHEST_HAZARD.observe(random, findings)
        sex = random.choice(["f", "m"])
        for visit in range(2):
            rows.append({"id": f"p{k}-{visit}", "patient_id": f"p{k}", "caption": "a film", **findings,
                         "age": 50 + k % 30, "sex": sex, "days": days, "months": days / 30.44, "event": event,
                         "censorship": 1 - event, "site": "AB"[k % 2], "empty": ""})  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory, table):
    """Images that hold the findings, texts that hold noise, of the table's rows."""
    from chiasm.io.store import save_embeddings

    with table.open() as file:
        rows = list(csv.DictReader(file))
    random = np.random.default_rng(1)
    findings = np.array([[float(r[n]) for n in NAMES] for r in rows])
    labels = {"days": tuple(int(r["days"]) for r in rows), "event": tuple(int(r["event"]) for r in rows),
              "age": tuple(int(r["age"]) for r in rows)}  # fmt: skip
    shared = {"ids": tuple(r["id"] for r in rows), "patients": tuple(r["patient_id"] for r in rows), "labels": labels}
    space = Space("m", "w", "p", 12)
    vectors = findings @ random.normal(size=(7, 12)) + 0.3 * random.normal(size=(len(rows), 12))
    images = Embeddings(vectors, space=space, modality="image", normalized=False, **shared)
    texts = Embeddings(random.normal(size=vectors.shape), space=space, modality="text", normalized=False,
                       texts=("x",) * len(rows), **shared)  # fmt: skip
    path = tmp_path_factory.mktemp("store") / "s"
    save_embeddings(path, images.normalize(), texts.normalize())
    return path


COMMON = ("--unit", "days", "--folds", "3", "--resamples", "40", "--seed", "1")


def test_a_table_alone_with_a_page(chiasm, table, tmp_path):
    page = tmp_path / "page.html"
    found = chiasm("survival", "--table", table, "--time", "days", "--event", "event", *COMMON, "--features",
                   f"columns:{','.join(NAMES)}+clinical:age,sex", "--out", page, "--json")  # fmt: skip
    assert (found["patients"], found["rows"]) == (160, 320)
    names = list(found["models"])
    assert names[1:] == [f"columns:{','.join(NAMES)}", "clinical:age,sex", "no features"]
    assert found["models"][names[0]]["columns"] == 9  # seven findings, age, sex=m
    assert found["models"][names[0]]["harrell"]["value"] > 0.6
    assert found["models"]["no features"]["harrell"]["value"] == 0.5
    assert set(found["gains"]) == set(names[1:])
    assert found["run_card"]["settings"]["method"] == "coxnet"
    assert [g["name"] for g in found["risk_groups"]] == ["low risk", "high risk"]
    assert 0 <= found["log_rank"]["p_value"] <= 1
    text = page.read_text()
    for word in ("Kaplan–Meier", "numbers", "Run card", "not a medical device", "patients under observation"):
        assert word in text or word == "numbers"
    assert "p12" not in text.replace("p12px", "")  # no id of a patient


def test_a_store_with_both_sides(chiasm, store):
    found = chiasm("survival", "--store", store, "--time", "days", "--event", "event", *COMMON, "--features",
                   "image+clinical:age", "--features", "joint", "--json")  # fmt: skip
    assert list(found["models"]) == ["image + clinical:age", "image + text", "image", "clinical:age", "no features"]
    assert found["models"]["image"]["columns"] == 12
    assert found["models"]["image + text"]["columns"] == 24
    assert found["models"]["image"]["harrell"]["value"] > 0.57
    assert json.dumps(found)


@pytest.mark.parametrize("method", ["neural", "forest"])
def test_other_methods(chiasm, store, method, monkeypatch):
    from chiasm.tasks import survival_models
    from chiasm.train import heads

    for module, name, fewer in ((heads, "NeuralCox", {"members": 1, "epochs": 20, "weight_decays": (1.0,)}),
                                (survival_models, "SurvivalForest", {"trees": 10, "leaves": (15,)})):  # fmt: skip
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda whole=whole, fewer=fewer, **given: whole(**given, **fewer))
    found = chiasm("survival", "--store", store, "--time", "days", "--event", "event", *COMMON, "--features", "image",
                   "--method", method, "--pooling", "max", "--groups", "3", "--json")  # fmt: skip
    assert found["method"] == method
    assert len(found["risk_groups"]) in (2, 3)
    assert found["models"]["image"]["harrell"]["value"] > 0.5


def test_the_opposite_flag_and_the_other_unit_give_the_same(chiasm, table):
    spec = ("--features", f"columns:{','.join(NAMES)}", "--json")
    one = chiasm("survival", "--table", table, "--time", "days", "--event", "event", *COMMON, *spec)
    two = chiasm("survival", "--table", table, "--time", "months", "--censored", "censorship", "--unit", "months",
                 *COMMON[2:], *spec)  # fmt: skip
    three = chiasm("survival", "--table", table, "--time", "days", "--event", "censorship", "--event-is", "0",
                   *COMMON, *spec)  # fmt: skip
    value = one["models"][f"columns:{','.join(NAMES)}"]["harrell"]["value"]
    for other in (two, three):
        assert other["models"][f"columns:{','.join(NAMES)}"]["harrell"]["value"] == pytest.approx(value, abs=1e-3)
    assert two["horizon"] == pytest.approx(one["horizon"] / 30.44, rel=1e-3)


def test_words_for_people(chiasm, table):
    text = chiasm("survival", "--table", table, "--time", "days", "--event", "event", *COMMON, "--features",
                  "clinical:age", "--where", "site=A")  # fmt: skip
    assert "80 patients" in text
    assert "Harrell's C" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--event", "censorship", "--unit", "days"], "opposite of an event"),
        (["--event", "event", "--censored", "censorship", "--unit", "days"], "one of the two"),
        (["--unit", "days"], "one of the two"),
        (["--event", "event", "--unit", "months"], "not in months"),
        (["--event", "event", "--unit", "weeks"], "unit of time"),
        (["--event", "nothing", "--unit", "days"], "no column `nothing`"),
        (["--event", "site", "--unit", "days"], "does not occur"),
        (["--event", "event", "--unit", "days", "--method", "svm"], "--method"),
        (["--event", "event", "--unit", "days", "--features", "clinical:nothing"], "no column `nothing`"),
        (["--event", "event", "--unit", "days", "--features", "clinical:empty"], "clinical columns has a value"),
        (["--event", "event", "--unit", "days", "--features", "clinical"], "--features names `clinical`"),
        (["--event", "event", "--unit", "days", "--where", "site=C"], "no row is left"),
        (["--event", "event", "--unit", "days", "--where", "site"], "COLUMN=VALUE"),
        (["--event", "event", "--event-is", "7", "--unit", "days"], "does not occur"),
        (["--censored", "censorship", "--event-is", "1", "--unit", "days"], "belongs to --event"),
        (["--event", "event", "--unit", "days", "--folds", "90"], "too few for 90 folds"),
    ],
)
def test_what_is_wrong_is_said(chiasm, table, words, message):
    features = () if "--features" in words else ("--features", "clinical:age")
    text = chiasm("survival", "--table", table, "--time", "days", *features, *words, code=1)
    assert message in text
    assert "hint: " in text


def test_real_tables_of_slides_become_patients(chiasm):
    """TCGA: 437 slides of 373 bladder cancers; its flag is the opposite of an event."""
    root = Path(os.environ.get("CHIASM_DATA", "")) / "tcga_survival" / "metadata.csv"
    if "CHIASM_DATA" not in os.environ or not root.is_file():
        pytest.skip("CHIASM_DATA names no folder with tcga_survival")
    found = chiasm("survival", "--table", root, "--where", "cohort=BLCA", "--group", "case_id", "--time",
                   "survival_months", "--censored", "censorship", "--unit", "months", "--features", "clinical:age",
                   "--resamples", "50", "--json")  # fmt: skip
    assert (found["rows"], found["patients"], found["events"]) == (437, 373, 169)
    assert found["models"]["clinical:age"]["harrell"]["value"] == pytest.approx(0.61, abs=0.04)  # older is worse


def test_features_must_be_named_where_there_is_no_model(chiasm, table):
    text = chiasm("survival", "--table", table, "--time", "days", "--event", "event", "--unit", "days", code=1)
    assert "no features were named" in text
