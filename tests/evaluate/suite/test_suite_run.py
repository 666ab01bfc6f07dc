"""A suite is run once, goes on after a crash, computes nothing twice, and says why a cell has no result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.errors import UnknownName
from chiasm.evaluate.suite import run as suite_module
from chiasm.evaluate.suite.run import SuiteRun, plan_suite, run_suite, wanted_cells
from chiasm.evaluate.suite.settings import DataEntry, ModelEntry, Suite
from chiasm.evaluate.suite.tasks import SUITE_TASKS


@pytest.fixture(scope="module")
def finished(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, Path, SuiteRun]:
    folder = tmp_path_factory.mktemp("run")
    return suite, folder, run_suite(suite, folder)


def numbers(run: SuiteRun) -> dict[tuple[str, str, str], Any]:
    return {(c.model, c.data, c.task): c.result.to_dict() for c in run.cells if c.result is not None}


def test_every_cell_is_there_with_interval_chance_and_card(finished: tuple[Suite, Path, SuiteRun]) -> None:
    _suite, _folder, run = finished
    assert len(run.cells) == 9
    assert {(c.model, c.task) for c in run.failed} == {("colours", "zero_shot"), ("colours", "retrieval")}
    for c in run.cells:
        if c.result is None:
            assert "no text tower" in c.reason
            continue
        main = c.result.main
        assert 0 <= main.value.low <= main.value.value <= main.value.high <= 1
        assert main.value.chance is not None
        assert main.majority is not None
        assert c.card is not None
        assert c.card.split
        assert c.card.versions["chiasm"]
        assert (c.card.prompts is None) == (c.task != "zero_shot")
    document = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    assert document["failed"] == 2
    assert document["run_card"]["settings"]["cells"] == "7 of 9"


def test_parts_keep_patients_whole(finished: tuple[Suite, Path, SuiteRun]) -> None:
    rows = finished[2].rows["films"]
    sides: dict[str, set[str | None]] = {}
    for group, part in zip(rows.groups, rows.parts, strict=True):
        sides.setdefault(group, set()).add(part)
    assert all(len(s) == 1 for s in sides.values())
    assert finished[2].leakage[0].counts == {}


def test_the_same_call_again_computes_nothing(
    finished: tuple[Suite, Path, SuiteRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, folder, run = finished
    assert sorted(run.embedded) == [
        ("colours", "films", "image"), ("one", "films", "image"), ("one", "films", "text"),
        ("two", "films", "image"), ("two", "films", "text"),
    ]  # fmt: skip  # three tasks share one embedding
    before = {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    loads = count_loads(monkeypatch)
    monkeypatch.setattr(suite_module, "compare_models", None)  # tests lie on disk, too
    monkeypatch.setattr(suite_module, "compare_groups", None)
    again = run_suite(suite, folder)
    assert loads == []
    assert again.embedded == ()
    assert all(c.cached for c in again.cells if c.result is not None)
    assert numbers(again) == numbers(run)
    assert {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()} == before
    document, earlier = again.to_dict(), run.to_dict()
    for part in ("tests", "subgroups", "best", "leakage", "exposure"):
        assert document[part] == earlier[part]


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import chiasm.load

    found: list[str] = []
    real: Callable[..., Any] = chiasm.load.load

    def counted(name: Any, **options: Any) -> Any:
        found.append(Path(str(name)).name)
        return real(name, **options)

    monkeypatch.setattr(chiasm.load, "load", counted)
    return found


def test_after_a_crash_between_cells_only_what_is_missing_is_computed(
    finished: tuple[Suite, Path, SuiteRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, _, whole = finished
    ran: list[str] = []
    real = suite_module.write_cell

    def crash(folder: Path, key: str, *rest: Any) -> None:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(key)
        real(folder, key, *rest)

    monkeypatch.setattr(suite_module, "write_cell", crash)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, tmp_path)
    monkeypatch.setattr(suite_module, "write_cell", real)
    loads = count_loads(monkeypatch)
    rest = run_suite(suite, tmp_path)
    assert [c.key for c in rest.cells if c.cached] == ran
    assert loads == []
    assert rest.embedded == ()
    assert numbers(rest) == numbers(whole)


@pytest.mark.parametrize("damage", ["empty", "half", "no arrays"])
def test_a_damaged_cell_is_computed_again(finished: tuple[Suite, Path, SuiteRun], damage: str) -> None:
    suite, folder, run = finished
    key = next(c.key for c in run.cells if c.result is not None)
    path = folder / "cells" / f"{key}.json"
    if damage == "no arrays":
        path.with_suffix(".npz").write_bytes(b"PK")
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 100])
    again = run_suite(suite, folder)
    assert [c.key for c in again.cells if c.result is not None and not c.cached] == [key]
    assert numbers(again) == numbers(run)


def test_what_a_cell_depends_on_is_in_its_name(finished: tuple[Suite, Path, SuiteRun], suite_dir: Path) -> None:
    suite, folder, _run = finished

    def cached(changed: Suite, task: str = "prototype", model: str = "one") -> bool:
        cells = plan_suite(changed, folder, only=[f"task={task}", f"model={model}"])
        assert len(cells) == 1
        return cells[0].cached

    def data(**changes: Any) -> Suite:
        return dataclasses.replace(suite, data={"films": dataclasses.replace(suite.data["films"], **changes)})

    assert cached(suite)
    assert cached(suite, "zero_shot")
    assert not cached(dataclasses.replace(suite, seed=1))
    assert not cached(dataclasses.replace(suite, n_resamples=41))
    assert not cached(data(labels=("cardiomegaly", "nodule")))
    assert not cached(data(fractions={"train": 0.5, "test": 0.5}))
    assert cached(data(template="chest"))  # a probe has no prompts
    assert not cached(data(template="chest"), "zero_shot")
    assert cached(dataclasses.replace(suite, n_permutations=61, smallest_group=5))  # of the page alone
    swapped = dataclasses.replace(suite, models={**suite.models, "one": suite.models["two"]})
    assert cached(swapped)  # the weights count, not the key
    (suite_dir / "three").mkdir(exist_ok=True)
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    save_encoder(TinyEncoder(7), suite_dir / "three")
    other = ModelEntry(source=str(suite_dir / "three"))
    assert not cached(dataclasses.replace(suite, models={**suite.models, "one": other}))


def test_the_seed_is_in_the_name_even_where_it_draws_no_parts(finished: tuple[Suite, Path, SuiteRun]) -> None:
    from chiasm.evaluate.suite.cells import cell_key
    from chiasm.types import Space

    suite, _, run = finished
    rows, space = run.rows["films"], Space("m", "w", "p", 4)
    tasks = {t.name: t for t in suite.entries}
    names = {
        cell_key(suite, rows, tasks["prototype"], space, None),
        cell_key(dataclasses.replace(suite, seed=9), rows, tasks["prototype"], space, None),
        cell_key(suite, rows, tasks["zero_shot"], space, None),
        cell_key(suite, rows, tasks["prototype"], space, "prompts"),
        cell_key(suite, rows, tasks["prototype"], dataclasses.replace(space, weights="v"), None),
        cell_key(suite, rows, tasks["prototype"], dataclasses.replace(space, preprocess="q"), None),
    }
    assert len(names) == 6
    assert cell_key(suite, rows, tasks["prototype"], space, None) in names


def test_a_changed_picture_is_embedded_again(suite_dir: Path, suite: Suite, tmp_path: Path) -> None:
    import shutil

    from PIL import Image

    shutil.copytree(suite_dir / "films", tmp_path / "films")
    data = {"films": dataclasses.replace(suite.data["films"], source=str(tmp_path / "films" / "table.csv"))}
    suite = dataclasses.replace(suite, data=data)
    run_suite(suite, tmp_path / "run", only=["model=colours", "task=prototype"])
    picture = next((tmp_path / "films" / "images").iterdir())
    Image.new("L", (32, 32), 99).save(picture)
    again = run_suite(suite, tmp_path / "run", only=["model=colours", "task=prototype"])
    assert again.embedded == (("colours", "films", "image"),)
    assert not again.cells[0].cached


def test_a_model_or_a_data_set_that_fails_takes_no_other_with_it(suite: Suite, tmp_path: Path) -> None:
    suite = dataclasses.replace(
        suite,
        models={"absent": ModelEntry(source="/nowhere/model"), "colours": ModelEntry(floor="colours")},
        data={**suite.data, "gone": DataEntry(source="/nowhere/table.csv", labels=("a", "b"), truth="x")},
        tasks={"prototype": {}},
    )
    run = run_suite(suite, tmp_path)
    states = {(c.model, c.data): c.result is not None for c in run.cells}
    assert states == {("absent", "films"): False, ("colours", "films"): True, ("absent", "gone"): False,
                      ("colours", "gone"): False}  # fmt: skip
    reasons = [c.reason for c in run.failed]
    assert all(reasons)
    assert not any("/nowhere/" in r for r in reasons)
    assert "table.csv" in str(run.broken["gone"])
    # What failed is tried again once it can work.
    assert run_suite(suite, tmp_path).cells[0].result is None


def test_a_library_that_breaks_down_fails_one_cell_and_quotes_no_data(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = SUITE_TASKS.get("prototype")

    def broken(cell: Any, settings: Any) -> Any:
        raise ValueError("patient 4711")

    monkeypatch.setitem(SUITE_TASKS._items, "prototype", dataclasses.replace(task, run=broken))
    run = run_suite(suite, tmp_path, only=["model=colours", "task=prototype"])
    assert run.failed[0].reason.startswith("ValueError")
    assert "4711" not in json.dumps(run.to_dict())


def test_only_narrows_and_unknown_names_are_met(suite: Suite) -> None:
    assert [(m, t.name) for m, _, t in wanted_cells(suite, ["model=one", "task=zero_shot"])] == [("one", "zero_shot")]
    assert len(wanted_cells(suite, ["model=one", "model=two"])) == 6
    other = {**suite.data, "more": suite.data["films"]}
    models = {**suite.models, "one": dataclasses.replace(suite.models["one"], data=("more",))}
    both = dataclasses.replace(suite, data=other, models=models)
    assert {d for _, d, _ in wanted_cells(both, ["model=one"])} == {"more"}
    assert {d for _, d, _ in wanted_cells(both, ["model=two"])} == {"films", "more"}
    with pytest.raises(UnknownName, match="did you mean `one`"):
        wanted_cells(suite, ["model=on"])
    with pytest.raises(UnknownName, match="part of a suite"):
        wanted_cells(suite, ["modl=one"])


def test_few_shot_knn_probe_and_calibration_run_on_the_same_vectors(suite: Suite, tmp_path: Path) -> None:
    tasks: dict[str, dict[str, Any]] = {
        "knn": {"ks": [1, 3]}, "linear_probe": {"cs": [1.0]}, "calibration": {},
        "shots": {"kind": "few_shot", "shots": 2, "draws": 2},
    }  # fmt: skip
    run = run_suite(dataclasses.replace(suite, tasks=tasks), tmp_path, only=["model=one"])
    assert not run.failed, [c.reason for c in run.failed]
    assert run.embedded == (("one", "films", "image"),)
    shots = run.cell("one", "films", "shots")
    assert shots is not None
    assert shots.result is not None
    assert shots.result.answers.shape[1:] == (2, 2)
    calibration = run.cell("one", "films", "calibration")
    assert calibration is not None
    assert calibration.result is not None
    assert calibration.result.main.better == "lower"
    assert np.isfinite(calibration.result.main.value.value)


def test_survival_orders_the_test_patients(suite: Suite, tmp_path: Path) -> None:
    pytest.importorskip("sksurv")
    from chiasm.metrics.concordance import harrell_c

    settings = {"kind": "survival", "time": "survival_days", "event": "event"}
    suite = dataclasses.replace(suite, tasks={"cox": settings}, smallest_group=8)
    run = run_suite(suite, tmp_path, only=["model=one", "model=colours"])
    assert not run.failed, [c.reason for c in run.failed]
    result = run.cells[0].result
    assert result is not None
    rows = run.rows["films"]
    tested = {rows.groups[int(r)] for r in result.rows}
    assert tested == {g for g, p in zip(rows.groups, rows.parts, strict=True) if p == "test"}
    assert len(tested) == len(result.rows)  # one row a patient
    direct = harrell_c(result.truth[:, 0], result.truth[:, 1], result.answers[:, 0], n_resamples=20)
    assert result.main.value.value == pytest.approx(direct.value)
    assert [t.test.test for t in run.tests] == ["permutation"]
    assert run.subgroups[("one", "films", "cox")]
    # The columns are part of the cell's name.
    other = dataclasses.replace(suite, tasks={"cox": {**settings, "time": "visit"}})
    assert not plan_suite(other, tmp_path, only=["model=one"])[0].cached
    gone = dataclasses.replace(suite, tasks={"cox": {**settings, "time": "days"}})
    assert "no column `days`" in run_suite(gone, tmp_path, only=["model=colours"]).failed[0].reason


def test_retrieval_hits_are_the_recall_that_is_compared(finished: tuple[Suite, Path, SuiteRun]) -> None:
    cell = finished[2].cell("one", "films", "retrieval")
    assert cell is not None
    assert cell.result is not None
    assert cell.result.primary == "text to image R@1"
    assert cell.result.answers.mean() == pytest.approx(cell.result.main.value.value)
    assert [t.test.test for t in finished[2].tests if t.task == "retrieval"] == ["permutation"]
