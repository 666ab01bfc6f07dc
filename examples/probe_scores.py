"""A linear probe on stored vectors to a table of scores for ``chiasm calibrate``: fitted on some patients, scores of others.

    python examples/probe_scores.py STORE --label subtype --out scores.csv
    chiasm calibrate --scores scores.csv --save calibration.json --out calibration.html

Half of the patients train the probe (logistic regression; C is chosen on a fifth of them), a quarter are ``val`` and a
quarter ``test``. With ``--folds 5`` every row gets the score of a probe that was trained on other patients, and the AUROC
of each label is printed with its 95 % interval over patients and its p value against chance, corrected by Holm.
Labels joined by ``|`` are taken one by one.
"""

from __future__ import annotations

import argparse
import math
import sys

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chiasm.data.splits import kfold_groups, split_by_group
from chiasm.io.store import open_store
from chiasm.metrics.bootstrap import holm
from chiasm.metrics.classification import auroc_interval
from chiasm.metrics.compare import delong_covariance
from chiasm.tasks.scored_rows import deal_patients

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


def fit(vectors: np.ndarray, truth: np.ndarray, groups: list[str], seed: int) -> object:
    """Return a probe whose C was chosen on a fifth of the patients and which was then fitted on all."""
    held = deal_patients(groups, 0.2, seed=seed)
    made = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)) for c in STRENGTHS]
    losses = []
    for model in made:
        model.fit(vectors[~held], truth[~held])
        if set(truth[held]) - set(model.classes_):
            losses.append(math.inf)
            continue
        losses.append(log_loss(truth[held], model.predict_proba(vectors[held]), labels=model.classes_))
    return made[int(np.argmin(losses))].fit(vectors, truth)


def scores_of(vectors: np.ndarray, truth: np.ndarray, groups: list[str], fitting: np.ndarray, judging: np.ndarray,
              seed: int) -> np.ndarray:  # fmt: skip
    """Return log-odds of class 1 of two, or the logits of classes, of the rows that are judged."""
    model = fit(vectors[fitting], truth[fitting], [groups[i] for i in fitting], seed)
    return model.decision_function(vectors[judging])


def main() -> None:
    """Read the options, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--label", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-patients", type=int, default=10, help="labels of fewer patients are left out")
    options = parser.parse_args()
    with open_store(options.store) as store:
        images = store.read("image")
    vectors, groups, cells = images.vectors, list(images.groups), [str(v) for v in images.labels[options.label]]
    names = sorted({part for cell in cells for part in cell.split("|")})
    multi = any("|" in cell for cell in cells)
    if options.folds:
        place = np.array(kfold_groups(groups, options.folds, options.seed))
        rounds = [(np.flatnonzero(place != k), np.flatnonzero(place == k)) for k in range(options.folds)]
        parts = None
    else:
        parts = split_by_group(groups, {"train": 0.5, "val": 0.25, "test": 0.25}, seed=options.seed)
        train = np.array([p == "train" for p in parts])
        rounds = [(np.flatnonzero(train), np.flatnonzero(~train))]
    frame = pd.DataFrame({"id": [f"row {i}" for i in range(len(groups))], "patient": groups})
    if parts is not None:
        frame["split"] = parts
    if not multi and len(names) > 2 and not options.folds:
        truth = np.array([names.index(cell) for cell in cells])
        ((fitting, judging),) = rounds
        frame["truth"] = cells
        columns = np.full((len(groups), len(names)), np.nan)
        columns[judging] = scores_of(vectors, truth, groups, fitting, judging, options.seed)
        for k, name in enumerate(names):
            frame[f"score {name}"] = columns[:, k]
        frame = frame.iloc[judging]
    else:
        frame = by_label(
            frame, names if multi or len(names) > 2 else names[1:], cells, vectors, groups, rounds, options
        )
        if parts is not None:
            frame = frame[frame["split"] != "train"]
    frame.to_csv(options.out, index=False)
    if options.folds:
        print_auroc(frame, groups)


def by_label(frame, names, cells, vectors, groups, rounds, options):
    """Return the frame with score and truth of every label that enough patients have."""
    for name in names:
        truth = np.array([name in cell.split("|") for cell in cells]).astype(int)
        if len({g for g, t in zip(groups, truth, strict=True) if t}) < options.min_patients:
            continue
        column = np.full(len(groups), np.nan)
        for fitting, judging in rounds:
            column[judging] = scores_of(vectors, truth, groups, fitting, judging, options.seed)
        frame[f"score {name}"], frame[f"truth {name}"] = column, truth
    return frame


def print_auroc(frame: pd.DataFrame, groups: list[str]) -> None:
    """Print AUROC, interval and p against chance, corrected for the number of labels."""
    names = [c[len("truth ") :] for c in frame.columns if c.startswith("truth ")]
    p_values, lines = [], []
    for name in names:
        truth, score = frame[f"truth {name}"].to_numpy(), frame[f"score {name}"].to_numpy()
        found = delong_covariance(truth, score[:, None], groups)
        z = (found.auroc[0] - 0.5) / math.sqrt(found.covariance[0, 0])
        p_values.append(math.erfc(abs(z) / math.sqrt(2)))
        lines.append((name, auroc_interval(truth, score, groups, seed=0), found.with_finding, int(truth.sum())))
    for (name, interval, patients, rows), p in zip(lines, holm(p_values), strict=True):
        sys.stdout.write(f"{name:20s} AUROC {interval}  p {p:.4f} (Holm)  {rows} images of {patients} patients\n")


if __name__ == "__main__":
    main()
