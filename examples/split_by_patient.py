"""Add a column `split` to a table that has none: whole patients to `train` or `test`, by a hash of their id.

    python examples/split_by_patient.py "$CHIASM_DATA/pneumonia_cxr/metadata.csv" \
        --patient patient --out runs/pneumonia_cxr.csv

A patient belongs to the fold md5(id) modulo 5; fold 0 is `test`. Nothing is drawn at random, so everyone gets the same
split. The new table names each image by its absolute path, so it may lie anywhere; the images stay where they are.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections import Counter
from pathlib import Path


def fold_of(patient: str, folds: int = 5) -> int:
    """Return the fold of a patient: md5 of the id as an integer, modulo ``folds``."""
    return int(hashlib.md5(patient.encode(), usedforsecurity=False).hexdigest(), 16) % folds


def split_table(table: Path, out: Path, *, patient: str, image: str = "image", test_fold: int = 0) -> Counter[str]:
    """Write ``table`` to ``out`` with a column ``split`` and absolute image paths; return the rows of each split.

    Raises:
        ValueError: A column is missing, there is a split already, or a row has no patient.
    """
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), list(reader.fieldnames or ())
    for column in (patient, image):
        if column not in header:
            raise ValueError(f"the table has no column `{column}`; columns: {', '.join(header)}")
    if "split" in header:
        raise ValueError("the table has a column `split` already")
    if any(not row[patient] for row in rows):
        raise ValueError(f"a row has no `{patient}`, so it cannot be kept on one side")
    for row in rows:
        row["split"] = "test" if fold_of(row[patient]) == test_fold else "train"
        row[image] = str((table.parent / row[image]).resolve())
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*header, "split"])
        writer.writeheader()
        writer.writerows(rows)
    return Counter(row["split"] for row in rows)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a CSV whose image column is relative to its own folder")
    parser.add_argument("--patient", required=True, help="column of the patient")
    parser.add_argument("--image", default="image", help="column of the image (default: image)")
    parser.add_argument("--test-fold", type=int, default=0, choices=range(5), help="0 to 4 (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="the new table")
    options = parser.parse_args()
    try:
        counts = split_table(
            options.table, options.out, patient=options.patient, image=options.image, test_fold=options.test_fold
        )
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(", ".join(f"{name} {count}" for name, count in sorted(counts.items())) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
