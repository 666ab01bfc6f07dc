"""Make the tables that the CLIP-IT recipes read: training pairs of a retriever, or phantoms to classify.

    python examples/clip_it_tables.py retriever-pcam --data "$CHIASM_DATA" --out runs/clip_it/retriever_pcam
    python examples/clip_it_tables.py retriever-lung --data "$CHIASM_DATA" --out runs/clip_it/retriever_lung
    python examples/clip_it_tables.py retriever-chest --data "$CHIASM_DATA" --out runs/clip_it/retriever_chest
    python examples/clip_it_tables.py phantoms --out runs/clip_it/phantoms

A retriever must never have seen a label of the set that it is used on. So the one for lymph nodes learns from tissue
phantoms and lung tiles, the one for lung tiles from tissue phantoms and lymph nodes, the one for children's chest films
from chest phantoms and the notes of the COVID-19 collection. Captions of real tiles are made of their labels.

`phantoms` writes three sets of synthetic patients that have nobody in common: `train` and `test` images with a class
(none, low or high grade), and the reports of others, one a line of `reports.jsonl`. The retriever's own phantoms
(`recipes/clip_it_retriever_tissue.toml`, seed 0) are a fourth.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from chiasm.data.phantoms import PhantomSet, make_chest_phantoms, make_tissue_phantoms

CAPTIONS = {
    "lung_aca": ("lung adenocarcinoma", "malignant glands: adenocarcinoma", "H&E of an adenocarcinoma of the lung"),
    "lung_scc": (
        "lung squamous cell carcinoma",
        "solid sheets of squamous cell carcinoma",
        "H&E of squamous carcinoma",
    ),
    "lung_n": ("benign lung tissue", "no tumor, normal alveoli", "H&E of normal lung without malignancy"),
    "0": ("no tumor", "normal lymph node tissue", "benign lymphocytes, no malignancy"),
    "1": ("tumor", "metastatic breast carcinoma", "tumor cells of a carcinoma in a lymph node"),
}
#: Seeds of phantoms; 0 belongs to the demo and to the retriever that learns from scratch.
SEEDS = {"retriever": 1, "train": 11, "test": 12, "reports": 13}
HEADER = ("image", "text", "patient")
Row = tuple[str, str, str]


def phantom_rows(made: PhantomSet, folder: Path, name: str) -> list[Row]:
    """Write the images of a set and return its rows."""
    made.save(folder / name)
    return [
        (str((folder / name / f"images/{s.id}.png").resolve()), s.text or "", f"{name} {s.patient}")
        for s in made.samples
    ]


def captioned(table: Path, *, group: str | None, split: str | None = None) -> list[Row]:
    """Return the rows of a classified set with captions made of its labels, three ways to say each in turn."""
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline="")))
    made = []
    for number, row in enumerate(rows):
        if split is not None and row["split"] != split:
            continue
        words = CAPTIONS[row["label"]]
        where = str((table.parent / row["image"]).resolve())
        made.append((where, words[number % len(words)], row[group] if group else row["image"]))
    return made


def noted(table: Path) -> list[Row]:
    """Return the pairs of the COVID-19 collection; its two persons with two ids are merged."""
    same = {"339": "285", "340": "287"}
    rows = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline=""))
    return [
        (str((table.parent / r["image"]).resolve()), r["text"], same.get(r["patientid"], r["patientid"]))
        for r in rows
        if r["view"] != "L"
    ]


def write_table(rows: list[Row], path: Path) -> None:
    """Write the rows under :data:`HEADER`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(rows)


def grade(labels: Mapping[str, object]) -> str:
    """Return the class of a tissue phantom."""
    return "no tumour" if not labels["tumour"] else "high grade" if labels["high_grade"] else "low grade"


def write_phantoms(out: Path, *, patients: int, test_patients: int, report_patients: int, size_px: int) -> None:
    """Write images with a class of two sets of patients, and the reports of a third."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "label", "patient", "split", "report"))
        for split, count in (("train", patients), ("test", test_patients)):
            made = make_tissue_phantoms(count, seed=SEEDS[split], size_px=size_px)
            made.save(out / split)
            for s in made.samples:
                writer.writerow((f"{split}/images/{s.id}.png", grade(s.labels), f"{split} {s.patient}", split, s.text))
    made = make_tissue_phantoms(report_patients, seed=SEEDS["reports"], size_px=32, images_per_patient=(1, 1))
    lines = [json.dumps({"id": f"report-{i:04d}", "text": s.text}) for i, s in enumerate(made.samples)]
    (out / "reports.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "audit.json").write_text(json.dumps([grade(s.labels) for s in made.samples]) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("retriever-pcam", "retriever-lung", "retriever-chest", "phantoms"))
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=600)
    parser.add_argument("--size", type=int, default=None, help="side of the phantoms in pixels")
    args = parser.parse_args(arguments)
    if args.what == "phantoms":
        write_phantoms(
            args.out, patients=args.patients, test_patients=400, report_patients=400, size_px=args.size or 64
        )
        return 0
    if args.data is None:
        parser.error("--data is needed")
    seed, out = SEEDS["retriever"], args.out
    if args.what == "retriever-chest":
        rows = phantom_rows(make_chest_phantoms(args.patients, seed=seed, size_px=args.size or 160), out, "phantoms")
        rows += noted(args.data / "covid_chestxray" / "metadata.csv")
    else:
        rows = phantom_rows(make_tissue_phantoms(args.patients, seed=seed, size_px=args.size or 96), out, "phantoms")
        if args.what == "retriever-pcam":
            rows += captioned(args.data / "lc25000_lung" / "metadata.csv", group="source_tile_group")
        else:
            rows += captioned(args.data / "pcam_subset" / "metadata.csv", group=None, split="train")
    write_table(rows, out / "table.csv")
    sys.stdout.write(f"{len(rows)} pairs, {len({r[2] for r in rows})} groups, {len({r[1] for r in rows})} texts\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
