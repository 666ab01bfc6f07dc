"""The speed table: every promised row has a script, the kept results parse, the page shows what was kept.

Nothing is measured here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: The rows that were promised, with the smallest ratio that each has to reach.
PROMISED_ROWS = """
image_fp32_b1 image_fp32_b8 image_fp32_b32 image_bf16_b1 image_bf16_b8 image_bf16_b32 image_int8_b1 image_int8_b8
rn50_bf16_b8 text_prompts_fp32 text_captions_fp32 text_mixed_fp32 text_prompts_bf16 text_captions_bf16
text_mixed_bf16 bert_text tokenizer_prompts tokenizer_varied preprocess_jpeg preprocess_cxr loss_4k loss_8k
loss_memory_16k train_fp32 train_bf16 cold_start search_batch search_single embed_folder
"""
PROMISED = PROMISED_ROWS.split()
MODULES = ("timing", "cases", "table", "all")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The modules of benchmarks/, which is a folder of scripts and no package."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def machine(**changes: object) -> dict[str, object]:
    return {
        "versions": {"torch": "2.13.0", "numpy": "2.4.6", "open_clip_torch": "3.3.0", "faiss-cpu": "1.15.1"},
        "python": "3.11.2", "cpu": "A processor", "flags": ["avx2"], "cores": 2, "commit": "abc", "date": "2026-11-21",
        **changes,
    }  # fmt: skip


def a_case(bench: dict[str, ModuleType], name: str = "loss_4k", **changes: Any) -> Any:
    values = {
        "ratio_wall": 1.5, "ratio_cpu": 1.6, "peer": "open_clip_torch fp32", "n": 7, "error": 1e-6,
        "error_kind": "gradient", "error_bound": 1e-5, **changes,
    }  # fmt: skip
    return bench["cases"].Case(name, **values)


def a_row(bench: dict[str, ModuleType], name: str = "loss_4k", **changes: Any) -> dict[str, Any]:
    return dict(a_case(bench, name, **changes).to_dict(machine()))


# --- what is promised and what lies here


def test_every_promised_row_has_a_floor_and_one_script(bench: dict[str, ModuleType]) -> None:
    cases = bench["cases"]
    assert sorted(cases.FLOORS) == sorted(PROMISED)
    declared = [row for rows in cases.SCRIPTS.values() for row in rows]
    assert sorted(declared) == sorted(PROMISED)


def test_every_script_is_here_and_reports_under_its_own_name(bench: dict[str, ModuleType]) -> None:
    for script, rows in bench["cases"].SCRIPTS.items():
        path = BENCHMARKS / f"{script}.py"
        assert path.is_file(), script
        text = path.read_text()
        assert "add_options(" in text, script
        assert f'report("{script}"' in text.replace("\n", "").replace(" ", ""), script
        for row in rows:  # named in full, or made of its parts
            assert row in text or all(part in text for part in row.split("_")[:2]), (script, row)


def test_kept_results_parse_and_lie_in_the_file_of_their_script(bench: dict[str, ModuleType]) -> None:
    cases = bench["cases"]
    rows = bench["table"].read_rows()
    for script, names in cases.SCRIPTS.items():
        path = cases.RESULTS / f"{script}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            assert row["name"] in names or row["name"] not in cases.FLOORS, (script, row["name"])
            assert set(cases.KEYS) <= set(row)
            assert row["floor"] == cases.FLOORS.get(row["name"])
            assert row["ratio_wall"] > 0
            assert row["ratio_cpu"] > 0
            assert row["n"] >= 1
            assert row["error"] >= 0  # also says that it is a number
            assert row["peer_version"], row["name"]
            assert {"cpu", "flags", "cores", "versions", "commit", "date"} <= set(row["machine"])
            assert rows[row["name"]] == row


def test_the_page_shows_the_kept_results(bench: dict[str, ModuleType]) -> None:
    table = bench["table"]
    text = (BENCHMARKS / "README.md").read_text()
    assert text == table.with_table(text, table.render(table.read_rows())), "run `benchmarks/all.py --table`"


def test_no_milliseconds_on_the_page(bench: dict[str, ModuleType]) -> None:
    assert " ms" not in bench["table"].render(bench["table"].read_rows())


# --- the judgement of a row


def test_a_row_is_reached_with_both_a_right_result_and_a_ratio(bench: dict[str, ModuleType]) -> None:
    assert a_case(bench).reached
    assert not a_case(bench, ratio_cpu=1.34).reached
    assert not a_case(bench, error=2e-5).reached
    assert not a_case(bench, error=float("nan")).reached
    assert a_case(bench, "something else", ratio_cpu=0.1).reached  # no floor


def test_compare_takes_medians_of_cpu_time_and_of_paired_wall_ratios(bench: dict[str, ModuleType]) -> None:
    timing_of = bench["timing"].Timing
    timings = {
        "open_clip_torch fp32": timing_of([2.0, 4.0, 300.0], [2.0, 6.0, 9.0]),
        "rival": timing_of([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        "chiasm": timing_of([1.0, 2.0, 3.0], [1.0, 2.0, 1.0]),
    }
    case = bench["cases"].compare(
        "loss_4k", "open_clip_torch fp32", timings, error=0, error_kind="ids", error_bound=0, rivals={"rival": 1.05}
    )
    assert (case.ratio_cpu, case.ratio_wall, case.n) == (2.0, 3.0, 3)
    assert case.cpu_per_wall == 1.5
    (rival,) = case.rivals
    assert (rival.ratio_cpu, rival.ratio_wall, rival.floor) == (0.5, 1.0, 1.05)
    line = case.to_dict(machine())
    assert set(bench["cases"].KEYS) <= set(line)
    assert line["peer_version"] == "3.3.0"
    json.dumps(line)


def test_report_keeps_rows_that_were_not_measured_again(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = bench["cases"]
    monkeypatch.setattr(cases, "RESULTS", tmp_path)
    parser = argparse.ArgumentParser()
    cases.add_options(parser)
    keep = parser.parse_args(["--keep", "--json"])
    cases.report("loss", [a_case(bench, "loss_4k"), a_case(bench, "loss_8k")], keep, ["open_clip_torch"])
    cases.report("loss", [a_case(bench, "loss_8k", ratio_cpu=9.0)], keep, ["open_clip_torch"])
    cases.report("loss", [a_case(bench, "loss_4k", ratio_cpu=7.0)], parser.parse_args([]), ["open_clip_torch"])
    kept = {
        row["name"]: row["ratio_cpu"] for row in map(json.loads, (tmp_path / "loss.jsonl").read_text().splitlines())
    }
    assert kept == {"loss_4k": 1.6, "loss_8k": 9.0}
    assert len(capsys.readouterr().out.splitlines()) == 3


# --- the table


def test_rows_say_reached_missed_wrong_or_not_measured(bench: dict[str, ModuleType]) -> None:
    rows = [
        a_row(bench, "loss_4k"),
        a_row(bench, "loss_8k", ratio_cpu=1.4),
        a_row(bench, "train_fp32", error=1.0),
        a_row(bench, "search_batch", ratio_cpu=9.0, ratio_wall=7.0),
        a_row(bench, "image_int8_b32", ratio_cpu=3.0),
    ]
    text = bench["table"].render({row["name"]: row for row in rows})
    line_of = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert "| reached |" in line_of["loss_4k"]
    assert "MISSED" in line_of["loss_8k"]
    assert "WRONG" in line_of["train_fp32"]
    assert "| reached (CPU) |" in line_of["search_batch"]
    assert "not measured" in line_of["bert_text"]
    assert "8" in line_of["bert_text"]  # the floor stands also where nothing was measured
    assert list(line_of)[: len(PROMISED)] == list(bench["cases"].FLOORS)
    assert list(line_of)[-1] == "image_int8_b32"
    assert "MISSED" not in line_of["image_int8_b32"]
    assert "open_clip_torch 3.3.0 fp32" in line_of["loss_4k"]
    assert "1.0e-06 (gradient)" in line_of["loss_4k"]


def test_the_fastest_rival_is_shown_also_when_it_beats_us(bench: dict[str, ModuleType]) -> None:
    rival = bench["cases"].Rival
    row = a_row(bench, rivals=(rival("one matrix", 1.2, 1.2), rival("compiled", 0.9, 0.9, 1.0)))
    shown = bench["table"].rival_of(row)
    assert shown == "compiled: 0.90 (**MISSED** 1)"
    assert bench["table"].rival_of(a_row(bench)) == ""


def test_rows_of_two_machines_are_told_apart(bench: dict[str, ModuleType]) -> None:
    one, two = a_row(bench, "loss_4k"), a_row(bench, "loss_8k")
    assert bench["table"].machine_lines([one, two]).startswith("Machine: A processor")
    two["machine"] = machine(cpu="Another", gpu="a card")
    lines = bench["table"].machine_lines([one, two]).splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("loss_4k")
    assert "Another" in lines[1]
    assert "a card" in lines[1]


def test_a_kept_line_without_a_key_is_named(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    row = a_row(bench)
    del row["peer_version"]
    (tmp_path / "loss.jsonl").write_text(json.dumps(a_row(bench, "loss_8k")) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"loss\.jsonl, line 2: no peer_version"):
        bench["table"].read_rows(tmp_path)


def test_the_text_around_the_table_stays(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    table = bench["table"]
    page = tmp_path / "README.md"
    page.write_text(f"# Title\n\n{table.BEGIN}\nwhat was here\n{table.END}\n\nafter\n")
    (tmp_path / "loss.jsonl").write_text(json.dumps(a_row(bench)) + "\n")
    table.write_table(page, tmp_path)
    first = page.read_text()
    assert first.startswith("# Title\n")
    assert first.endswith("\n\nafter\n")
    assert "what was here" not in first
    table.write_table(page, tmp_path)
    assert page.read_text() == first
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        table.write_table(page, tmp_path)
    assert page.read_text() == "no markers"


# --- the runner


def test_choose_takes_scripts_and_rows_in_the_fixed_order(bench: dict[str, ModuleType]) -> None:
    choose = bench["all"].choose
    assert list(choose([])) == list(bench["cases"].SCRIPTS)
    assert choose(["search", "loss_8k", "loss_4k"]) == {"loss": ("loss_4k", "loss_8k"), "search": ()}
    with pytest.raises(ValueError, match="no script or row `lost_4k`"):
        choose(["lost_4k"])


def test_a_failing_script_is_told_and_the_others_run(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    said = "import os, sys; open(sys.argv[0] + '.said', 'w').write(' '.join([os.environ['OMP_WAIT_POLICY'], *sys.argv[1:]]))"
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    (tmp_path / "good.py").write_text(said)
    failed = bench["all"].run_scripts(
        {"bad": (), "absent": (), "slow": (), "good": ("row",)}, ["--keep"], folder=tmp_path, limit_s=1
    )
    assert failed == {"bad": "ended with status 3", "absent": "there is no such script", "slow": "stopped after 1 s"}
    assert (tmp_path / "good.py.said").read_text() == "PASSIVE --json --keep --case row"


def test_a_row_that_a_script_does_not_have_is_told(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = bench["cases"]
    monkeypatch.setattr(cases, "RESULTS", tmp_path)
    options = argparse.Namespace(json=True, keep=True, case=["serch_batch"])
    with pytest.raises(SystemExit) as stop:
        cases.report("search", [], options, [])
    assert "no row `serch_batch`" in str(stop.value)
    assert "search_batch, search_single" in str(stop.value)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
