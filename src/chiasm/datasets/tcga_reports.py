"""Pathology reports of The Cancer Genome Atlas, in the two forms in which users obtain them, as a corpus.

Comes in: the table of TCGA-Reports (``patient_filename``, ``text``), or the Parquet files of the Hugging Face data set
Lab-Rasool/TCGA (``PatientID``, ``report_text``), with a table of patients that says the tissue. Goes out: a
`ReportCorpus`. Tables are known by their columns, whatever the folders are called.

Neither may be copied into a project: Lab-Rasool/TCGA is under CC-BY-NC-ND-4.0, which forbids commercial use and changed
copies (cleaned texts, say). Whoever publishes pairs publishes ids, never texts. Slides of the same patients may have been
among those that a pathology encoder was pre-trained on (TCGA is, for several): state that where it is scored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm.datasets.columns import cell_text
from chiasm.datasets.corpus import ReportCorpus
from chiasm.datasets.parsing import detect_encoding, detect_separator, parse_table, unique_header
from chiasm.datasets.report_filters import RawReport, make_corpus, text_filters, tissue_filter
from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import Rejected

TCGA_REPORTS = (
    "TCGA-Reports (Kefeli and Tatonetti 2024, Patterns): unpack `TCGA_Reports.csv.zip` of "
    "https://github.com/tatonetti-lab/tcga-path-reports"
)
LAB_RASOOL = (
    "https://huggingface.co/datasets/Lab-Rasool/TCGA (CC-BY-NC-ND-4.0), configurations `pathology_report` and "
    "`clinical`, split `gatortron`"
)
#: TCGA's project codes (the ``cancer_type`` of TCGA-Reports) and the organ that each is about.
ORGANS: Mapping[str, str] = {
    "ACC": "adrenal gland", "BLCA": "bladder", "BRCA": "breast", "CESC": "cervix uteri", "CHOL": "bile duct",
    "COAD": "colon", "DLBC": "lymph nodes", "ESCA": "esophagus", "GBM": "brain", "HNSC": "head and neck",
    "KICH": "kidney", "KIRC": "kidney", "KIRP": "kidney", "LAML": "bone marrow", "LGG": "brain", "LIHC": "liver",
    "LUAD": "lung", "LUSC": "lung", "MESO": "pleura", "OV": "ovary", "PAAD": "pancreas", "PCPG": "adrenal gland",
    "PRAD": "prostate", "READ": "rectum", "SARC": "soft tissue", "SKCM": "skin", "STAD": "stomach", "TGCT": "testis",
    "THCA": "thyroid", "THYM": "thymus", "UCEC": "corpus uteri", "UCS": "uterus", "UVM": "uvea",
}  # fmt: skip
#: What GDC writes where it knows nothing.
_UNKNOWN = frozenset(("'--", "--", "not reported", "unknown"))
_BARCODE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class _Kind:
    """A kind of table: its columns of ids and of values."""

    id: str
    value: str

    def fits(self, header: Sequence[str]) -> bool:
        return {self.id, self.value} <= set(header)


_REPORTS = (_Kind("patient_filename", "text"), _Kind("PatientID", "report_text"))
_TISSUES = (_Kind("case_submitter_id", "tissue_or_organ_of_origin"), _Kind("patient_id", "cancer_type"))


def read_tcga_reports(
    root: str | Path,
    *,
    tissue: str | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    min_words: int = 0,
) -> ReportCorpus:
    """Read the pathology reports of TCGA, all items of a report whose text is a list.

    Args:
        root: Folder that holds the tables at any depth, or the table of reports alone.
        tissue: Pattern for the tissue, as in :func:`chiasm.datasets.reports.read_reports`: ``breast`` is found anywhere
            in ``tissue_or_organ_of_origin`` ("Breast, NOS"). That is as loose as it is in CLIP-IT's reference:
            ``colo`` finds "Colon, NOS" and "Ascending colon", but neither "Cecum" nor "Rectum, NOS"; a patient with
            tumours of several tissues is found by each, with all of the reports. Where ``cancer_type`` says it, the
            tissue is the organ with the code: ``colon (COAD)``, ``rectum (READ)``. None: all reports.
        keep: Patterns that a text must have.
        drop: Patterns that a text must not have.
        min_words: Words that a text must have.

    Returns:
        Reports in the order of the tables. ``Report.patient`` is the barcode ``TCGA-XX-XXXX``; ids are file names, or
        barcodes, ``#2`` added to the second report of a patient.

    Raises:
        InputError: A table is missing (the message says where it comes from), there are two kinds of reports, or a
            filter leaves none.
        FileFormatError: A table is damaged.

    References:
        BanafshehKarimian/ModalityPairing ``Data/TCGATextLoader.py`` and ``get_text.py``. Deviations: all items of
        ``report_text``, not only the first; line ends inside a report do not split it into several.
    """
    root = Path(root)
    if not root.exists():
        raise InputError(f"`{root.name}` does not exist", hint=f"get {TCGA_REPORTS}; or {LAB_RASOOL}")
    tables = list(_tables(root))
    kind, paths = _find_reports(root, tables)
    tissues = _read_tissues(tables)
    if tissue is not None and not tissues:
        raise InputError(
            f"`{root.name}` holds no table that says the tissue of a patient (columns "
            + " or ".join(f"`{k.id}` and `{k.value}`" for k in _TISSUES)
            + ")",
            hint=f"add `{'clinical` of ' + LAB_RASOOL if kind is _REPORTS[1] else _METADATA}",
        )
    raw, rejected = _read_reports(kind, paths, tissues)
    filters = [] if tissue is None else [tissue_filter(tissue, _tissue_column(tables))]
    filters += text_filters(keep=keep, drop=drop, min_words=min_words)
    return make_corpus(raw, name=root.name, filters=filters, rejected=rejected)


_METADATA = (
    "tcga_patient_to_cancer_type.csv` of https://github.com/tatonetti-lab/tcga-path-reports, folder data/tcga_metadata; "
    "or filter the texts with `keep`"
)


def _tables(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Return each table under ``root`` with its header; of tables split by encoder, those of one encoder."""
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.casefold() in _SUFFIXES)
    if root.is_file() and root.suffix.casefold() not in _SUFFIXES:
        raise InputError(f"`{root.name}` is no table", hint=f"get {TCGA_REPORTS}; or {LAB_RASOOL}")
    headers = {p: _header(p) for p in found if p.is_file() and not p.name.startswith(".")}
    for kind in (*_REPORTS, *_TISSUES):
        own = [p for p, header in headers.items() if kind.fits(header)]
        splits: dict[tuple[Path, str], list[Path]] = {}
        for path in own:
            splits.setdefault((path.parent, _PART.sub("", path.stem)), []).append(path)
        # The hub holds the same reports once for each text encoder that embedded them.
        names = sorted(splits, key=lambda s: ("gatortron" not in f"{s[0].name}/{s[1]}".casefold(), s))
        for path in splits[names[0]] if names else ():
            yield path, headers[path]


def _header(path: Path) -> tuple[str, ...]:
    if path.suffix.casefold() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return tuple(pyarrow.parquet.read_schema(path).names)
        except (pyarrow.ArrowException, OSError) as error:
            raise FileFormatError(f"`{path.name}` is not a readable Parquet file") from error
    if path.stat().st_size == 0:
        raise FileFormatError(f"`{path.name}` is empty", hint="download it again")
    with path.open(encoding=detect_encoding(path), newline="") as file:
        head = file.read(65536)
    line = head.splitlines()[0] if head.strip() else ""
    return tuple(cell.strip('"') for cell in unique_header(line.split(detect_separator(head))))


def _find_reports(root: Path, tables: Sequence[tuple[Path, tuple[str, ...]]]) -> tuple[_Kind, list[Path]]:
    found = {k: [p for p, header in tables if k.fits(header)] for k in _REPORTS}
    kinds = [k for k, paths in found.items() if paths]
    if len(kinds) > 1:
        raise InputError(f"`{root.name}` holds reports of TCGA-Reports and of Lab-Rasool/TCGA", hint="name one of them")
    if kinds:
        return kinds[0], found[kinds[0]]
    packed = root.is_dir() and next(root.rglob("TCGA_Reports.csv.zip"), None)
    if packed:
        raise InputError(f"`{packed.name}` is packed", hint="unpack it beside itself")
    columns = " or ".join(f"`{k.id}` and `{k.value}`" for k in _REPORTS)
    raise InputError(
        f"`{root.name}` holds no table of reports (columns {columns})", hint=f"get {TCGA_REPORTS}; or {LAB_RASOOL}"
    )


def _tissue_column(tables: Sequence[tuple[Path, tuple[str, ...]]]) -> str:
    return next(k.value for k in _TISSUES for _, header in tables if k.fits(header))


def _read_tissues(tables: Sequence[tuple[Path, tuple[str, ...]]]) -> dict[str, str]:
    """Return patient -> tissues, each once, joined by a semicolon; the clinical table wins over the cancer types."""
    for kind in _TISSUES:
        paths = [p for p, header in tables if kind.fits(header)]
        tissues: dict[str, dict[str, None]] = {}
        for path in paths:
            table = parse_table(path, only=(kind.id, kind.value))
            for patient, value in zip(table.values(kind.id), table.values(kind.value), strict=True):
                barcode, tissue = _barcode(cell_text(patient)), cell_text(value)
                if barcode and tissue and tissue.casefold() not in _UNKNOWN:
                    organ = ORGANS.get(tissue.upper()) if kind.value == "cancer_type" else None
                    tissues.setdefault(barcode, {})[f"{organ} ({tissue})" if organ else tissue] = None
        if paths:
            return {patient: "; ".join(values) for patient, values in tissues.items()}
    return {}


def _read_reports(
    kind: _Kind, paths: Sequence[Path], tissues: Mapping[str, str]
) -> tuple[list[RawReport], list[Rejected]]:
    raw: list[RawReport] = []
    rejected: list[Rejected] = []
    seen: dict[str, int] = {}
    before = 0
    for path in paths:
        table = parse_table(path, list_separator="\n", only=(kind.id, kind.value))
        cells = zip(table.rows, table.values(kind.id), table.values(kind.value), strict=True)
        for (number, _), name, text in cells:
            id = cell_text(name) or f"row-{before + number}"
            seen[id] = seen.get(id, 0) + 1
            unique = id if seen[id] == 1 else f"{id}#{seen[id]}"
            patient = _barcode(id)
            raw.append(RawReport(before + number, unique, cell_text(text), tissues.get(patient or ""), patient))
        rejected += [Rejected(before + number, "", reason) for number, reason in table.bad]
        before += len(table.rows) + len(table.bad)
    return raw, rejected


def _barcode(name: str | None) -> str | None:
    """Return the patient's barcode at the start of a name, or None."""
    found = _BARCODE.match(name or "")
    return found.group().upper() if found else None
