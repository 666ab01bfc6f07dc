"""Label reports by phrase rules that know negation and doubt; compare with given labels; train a probe on them."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from chiasm.cli.inputs import ColumnOption, GroupOption, RootOption, SplitOption, TableOption
from chiasm.cli.output import JsonOption, ModelOption, SeedOption, check_output, print_json, print_table
from chiasm.cli.vectors import PageOption, StoreOption, open_vectors
from chiasm.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from chiasm.evaluate.weak_label_scores import WeakLabelScores
    from chiasm.evaluate.weak_probe import WeakProbeScores
    from chiasm.io.manifest import Rejected
    from chiasm.tasks.weak_labels import Blank, Uncertain, WeakLabels
    from chiasm.types import Embeddings, Sample


@dataclass(frozen=True)
class _Images:
    """Where the vectors of a probe come from."""

    store: Path | None
    table: Path
    model: str
    column: Sequence[str] | None
    group: str | None
    root: Path | None

    def open(self, *, as_json: bool) -> Embeddings:
        """Return the embeddings of images."""
        if self.store is not None:
            return open_vectors(store=self.store, table=None, as_json=as_json)
        return open_vectors(
            store=None, table=self.table, model=self.model, column=self.column, group=self.group, root=self.root, as_json=as_json
        )  # fmt: skip


RulesOption = Annotated[str, typer.Option("--rules", help="Shipped rules (chest_findings), or a .toml or .json file.")]
WriteOption = Annotated[
    Path | None,
    typer.Option("--write-rules", help="Write the shipped rules here, to be edited, and stop.", callback=check_output),
]
SectionsOption = Annotated[
    str, typer.Option("--sections", help="Read only these, where reports have headings: findings,impression.")
]
UncertainOption = Annotated[
    Literal["ignore", "positive", "negative"], typer.Option("--uncertain", help="What doubt counts as.")
]
BlankOption = Annotated[
    Literal["negative", "ignore"], typer.Option("--blank", help="What a finding that is not named counts as.")
]
TruthOption = Annotated[
    str | None,
    typer.Option("--truth", help="Compare with a column of terms joined by |, or * for 0/1 columns of the findings."),
]
LabelsOption = Annotated[
    Path | None, typer.Option("--labels-out", help="Table of labels to write: .csv or .parquet.", callback=check_output)
]
EvidenceOption = Annotated[bool, typer.Option("--evidence", help="Also write where in the text the words stand.")]
ProbeOption = Annotated[
    bool, typer.Option("--train-probe", help="Train a probe on weak and one on given labels; needs images.")
]
ExamplesOption = Annotated[int, typer.Option("--examples", min=0, help="Texts that the page shows, words marked.")]


def run(
    table: TableOption = None,
    rules: RulesOption = "chest_findings",
    write_rules: WriteOption = None,
    sections: SectionsOption = "",
    uncertain: UncertainOption = "ignore",
    blank: BlankOption = "negative",
    truth: TruthOption = None,
    labels_out: LabelsOption = None,
    evidence: EvidenceOption = False,
    train_probe: ProbeOption = False,
    store: StoreOption = None,
    model: ModelOption = "",
    split: SplitOption = None,
    group: GroupOption = None,
    column: ColumnOption = None,
    root: RootOption = None,
    out: PageOption = None,
    examples: ExamplesOption = 0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Label the texts of a table."""
    from chiasm.cli.inputs import open_table, select_rows
    from chiasm.evaluate.page import save_page
    from chiasm.evaluate.weak_label_page import make_weak_label_page, report_card
    from chiasm.evaluate.weak_label_scores import given_labels, score_weak_labels
    from chiasm.tasks.weak_labels import label_texts
    from chiasm.tasks.weak_rules import LabelRules, rules_text

    if write_rules is not None:
        write_rules.write_text(rules_text(), encoding="utf-8")
        print(f"rules: {write_rules}")
        return
    if table is None:
        raise InputError("no table of reports was given", hint="--table T.csv with a column of texts")
    if train_probe and truth is None:
        raise InputError("--train-probe needs --truth: the probes are judged by given labels", hint='--truth "*"')
    if labels_out is not None and labels_out.suffix.lower() not in (".csv", ".parquet"):
        raise InputError(f"--labels-out must end in .csv or .parquet, got `{labels_out.name}`", hint="labels.csv")
    if examples and sections:
        raise InputError("--examples shows whole reports, and --sections reads parts", hint="leave one of them out")
    began = time.monotonic()
    found = LabelRules.load(rules)
    dataset = open_table(table, group=group, columns=column, root=root, require=("text",))
    samples = select_rows(dataset.samples, split)
    wanted = tuple(s.strip() for s in sections.split(",") if s.strip())
    ids, texts = [s.id for s in samples], [s.text or "" for s in samples]
    weak = label_texts(texts, found, ids=ids, patients=[s.group for s in samples], sections=wanted)
    scores = probes = given = images = None
    if truth is not None:
        names = sorted({k for s in samples for k in s.labels})
        given = given_labels({name: [s.labels.get(name) for s in samples] for name in names}, found, truth)
        scores = score_weak_labels(weak, given, uncertain=uncertain, blank=blank, seed=seed)
        if train_probe:
            images = _Images(store, table, model, column, group, root).open(as_json=as_json)
            probes = _train(images, weak, given, samples, uncertain, blank, seed)
    if labels_out is not None:
        _write(labels_out, weak.to_rows(spans=evidence))
    settings = {"rules": found.name, "uncertain": uncertain, "blank": blank, "sections": sections or "all"}
    took = time.monotonic() - began
    card = report_card(weak, samples, settings, given=given, images=images, seed=seed, seconds=took)
    if out is not None:
        save_page(make_weak_label_page(weak, card, scores=scores, probes=probes, texts=texts, examples=examples), out)
    if as_json:
        more = {"agreement": scores and scores.to_dict(), "probes": probes and probes.to_dict()}
        document = {"reports": len(ids), "labels": weak.counts(), **{k: v for k, v in more.items() if v}}
        print_json({**document, "rejected": len(dataset.rejected), "run_card": card.to_dict()})
        return
    _print(weak, scores, probes, dataset.rejected)
    for path in (labels_out, out):
        if path is not None:
            print(f"written: {path}")


def _print(
    weak: WeakLabels, scores: WeakLabelScores | None, probes: WeakProbeScores | None, rejected: Sequence[Rejected]
) -> None:
    from chiasm.cli.inputs import say_rejected
    from chiasm.io.manifest import RejectLog

    rows = [(name, c["positive"], c["negative"], c["uncertain"], c["blank"]) for name, c in weak.counts().items()]
    print_table(("finding", "stated", "denied", "doubted", "not named"), rows, title=f"{len(weak.ids)} reports")
    if scores is not None:
        heads = ("finding", "given", "precision", "recall", "F1", "always", "kappa")
        print_table(heads, scores.table(), title="agreement with the given labels")
    if probes is not None:
        print_table(("finding", "n", "AUROC, weak", "AUROC, given", "difference"), probes.table(), title="probes")
        for name, reason in probes.left_out.items():
            print(f"note: no probe of {name}: {reason}", file=sys.stderr)
    say_rejected(RejectLog(rejected))


def _train(
    images: Embeddings,
    weak: WeakLabels,
    given: Mapping[str, NDArray[np.float64]],
    samples: Sequence[Sample],
    uncertain: Uncertain,
    blank: Blank,
    seed: int,
) -> WeakProbeScores:
    from chiasm.evaluate.weak_probe import compare_probes

    place = {s.id: k for k, s in enumerate(samples)}
    rows = np.array([k for k, name in enumerate(images.ids) if name in place], dtype=np.int64)
    if not len(rows):
        raise InputError("no image of the vectors has the id of a report", hint="embed the same table: `chiasm embed`")
    images = images.select(rows)
    order = np.array([place[name] for name in images.ids])
    images = dataclasses.replace(images, patients=tuple(weak.patients[k] for k in order))  # as the table groups them
    values = weak.resolve(uncertain=uncertain, blank=blank)[order]
    columns = {name: values[:, k] for k, name in enumerate(weak.findings)}
    parts = [samples[k].split for k in order]
    test = np.array([part == "test" for part in parts]) if "test" in parts else None
    return compare_probes(images, columns, {n: v[order] for n, v in given.items()}, test=test, seed=seed)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row a report as CSV or Parquet."""
    import csv

    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([dict(r) for r in rows]), path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
