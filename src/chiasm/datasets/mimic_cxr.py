"""MIMIC-CXR and MIMIC-CXR-JPG: 377,110 chest films of 227,835 studies with their reports and fourteen observations.

Comes in: the folder of the tables and of ``files/``, and where the reports lie. Goes out: one sample a film (or a study),
with the report's sections as text, the observations of a labeller, patient, study and the official split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from chiasm.datasets.chexpert import OBSERVATION_WORDS, OBSERVATIONS
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.layout import (
    Part,
    Uncertain,
    check_uncertain,
    find_file,
    find_optional,
    finding_value,
    keep_whole,
    read_rows,
)
from chiasm.datasets.parsing import read_text
from chiasm.datasets.sections import join_sections, split_sections
from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import Rejected
from chiasm.types import LabelValue, Sample

FACTS = DatasetFacts(
    name="mimic-cxr",
    title="MIMIC-CXR",
    classes=OBSERVATIONS,
    words=OBSERVATION_WORDS,
    tile_px=None,
    magnification=None,
    um_per_px=None,
    sizes={"train": 368_960, "val": 2_991, "test": 5_159},
    val="official",
    split_rule="`mimic-cxr-2.0.0-split.csv` of the authors, by patient; its `validate` is here val",
    licence="PhysioNet Credentialed Health Data License: credentialed users only, never to be passed on",
    page="https://physionet.org/content/mimic-cxr-jpg/ (reports: https://physionet.org/content/mimic-cxr/)",
    citation="A. E. W. Johnson, T. J. Pollard, S. J. Berkowitz et al. 2019, MIMIC-CXR, a de-identified publicly available "
    "database of chest radiographs with free-text reports, Scientific Data 6, 317; MIMIC-CXR-JPG: arXiv:1901.07042",
    layout="ROOT/mimic-cxr-2.0.0-{metadata,split,chexpert,negbio}.csv.gz (or .csv) and "
    "ROOT/files/p10/p10000000/s50000000/*.jpg; reports as files/p10/p10000000/s50000000.txt in ROOT, in "
    "ROOT/mimic-cxr-reports, or where `reports` says",
    tissue=None,
    cautions=(
        "a blank cell means that the report does not mention the observation: None here, neither present nor absent",
        "-1 means uncertain; say with `uncertain` whether it counts as 1, as 0 or as not labelled",
        "the labels were read out of the reports by a program: a model that saw the reports has seen them",
        "all films of a study share one report; reports speak of earlier films that are not shown",
    ),
    sources={
        "sizes": "mimic-cxr-2.0.0-split.csv",
        "classes": "header of mimic-cxr-2.0.0-chexpert.csv",
        "words": "names of the observations",
    },
    kind="findings",
    columns=("view",),
    texts=True,
)
RELEASE = "mimic-cxr-2.0.0"
LABELLERS = ("chexpert", "negbio")
#: Their name of a split -> ours.
SPLITS = {"train": "train", "validate": "val", "test": "test"}
SECTIONS = ("findings", "impression")
_IDS = {"dicom": "dicom_id", "patient": "subject_id", "study": "study_id"}
_SUFFIXES = (".jpg", ".dcm", ".png")
_REPORT_FOLDERS = ("", "mimic-cxr-reports")

Per = Literal["image", "study"]
_Study = tuple[str, str]


def load_mimic_cxr(
    root: str | Path,
    *,
    reports: str | Path | None = None,
    sections: Sequence[str] = SECTIONS,
    labeller: Literal["chexpert", "negbio"] = "chexpert",
    uncertain: Uncertain = "keep",
    per: Per | None = None,
    require: Sequence[Part] = ("image",),
) -> Dataset:
    """Read the tables of films, studies and observations, the reports, and where the images lie.

    Args:
        root: Folder of the tables and of ``files/``. Without ``mimic-cxr-2.0.0-metadata.csv`` the list of films may be
            ``cxr-record-list.csv`` of MIMIC-CXR; without a table of observations every observation is None, without
            the table of the split no sample has one.
        reports: Folder that holds ``files/p10/...`` with the reports, where it is not ``root``.
        sections: Sections that make the text, joined in this order; empty takes the whole report. A report without
            any of them gives no text.
        labeller: Whose observations: ``chexpert`` or ``negbio``.
        uncertain: What -1 becomes: ``keep``, ``ones``, ``zeros`` or ``ignore`` (None).
        per: ``image``: a sample a film; ``study``: a sample a study, with its report and no image. None: ``study`` where
            texts alone are required.
        require: What a sample must have, of ``image`` and ``text``; ``()`` takes the labels alone.

    Returns:
        Samples named by ``dicom_id`` (or by study), in the order of the table. ``patient`` is ``p10000000``, ``study``
        ``p10000000/s50000000``. Labels: the observations (1, 0, -1, None), and ``view`` of films.

    Raises:
        InputError: A table is missing, nothing required was found, or an option has none of its values.
        UnknownName: A table lacks a column.
        FileFormatError: A table is damaged, or an observation is none of 1, 0, -1 and blank.
    """
    root = Path(root)
    check_uncertain("mimic-cxr", uncertain)
    check_choice("labeller of mimic-cxr", labeller, LABELLERS)
    by_study = per == "study" or (per is None and "text" in require and "image" not in require)
    check_choice("per of mimic-cxr", per or "image", ("image", "study"))
    if by_study and "image" in require:
        raise InputError("a sample that is a study has no image", hint="require texts alone, or leave `per` out")
    table = find_file(FACTS, root, (f"{RELEASE}-metadata.csv", "cxr-record-list.csv"))
    splits, labels = _read_splits(root), _read_labels(root, labeller, uncertain)
    texts = _Reports(root, None if reports is None else Path(reports), sections)
    rows: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    studies: set[_Study] = set()
    unlabelled: dict[str, LabelValue] = dict.fromkeys(OBSERVATIONS)
    for number, cells in read_rows(table, _IDS, optional={"view": "ViewPosition"}):
        dicom, patient, study = (cells[key] for key in _IDS)
        if not (dicom and _is_number(patient) and _is_number(study)) or "/" in dicom:
            rejected.append(Rejected(number, dicom or "", "film, patient or study is blank or no number"))
            continue
        place = (f"p{patient}", f"s{study}")
        if by_study and place in studies:
            continue
        studies.add(place)
        own = labels.get(place, unlabelled)
        rows.append((number, Sample(
            id=place[1] if by_study else dicom, image=None if by_study else _image(root, place, dicom),
            text=texts.read(place), patient=place[0], study="/".join(place),
            labels=own if by_study else {**own, "view": cells["view"]}, split=splits.get(dicom),
        )))  # fmt: skip
    return keep_whole(FACTS, rows, rejected, require)


class _Reports:
    """Reads each report once; the films of a study follow each other."""

    def __init__(self, root: Path, given: Path | None, sections: Sequence[str]) -> None:
        if given is not None and not given.is_dir():
            raise FACTS.missing(f"folder `{given.name}` of the reports does not exist")
        self.folders = [root / f for f in _REPORT_FOLDERS] if given is None else [given]
        self.sections = tuple(sections)
        self.last: tuple[_Study, str | None] | None = None

    def read(self, place: _Study) -> str | None:
        """Return the text of a study, or None where there is no report."""
        if self.last is None or self.last[0] != place:
            paths = (folder / f"{_folder(place).as_posix()}.txt" for folder in self.folders)
            path = next((p for p in paths if p.is_file()), None)
            self.last = (place, None if path is None else self._text(path))
        return self.last[1]

    def _text(self, path: Path) -> str | None:
        report = read_text(path)[0]
        if not self.sections:
            return report.strip() or None
        return join_sections(split_sections(report), self.sections)


def _is_number(cell: str | None) -> bool:
    return cell is not None and cell.isascii() and cell.isdigit()


def _folder(place: _Study) -> Path:
    return Path("files", place[0][:3], *place)


def _image(root: Path, place: _Study, dicom: str) -> Path | None:
    paths = (root / _folder(place) / f"{dicom}{suffix}" for suffix in _SUFFIXES)
    return next((p for p in paths if p.is_file()), None)


def _read_splits(root: Path) -> dict[str, str]:
    """Return film -> official split; nothing where the table is absent."""
    path = find_optional(root, (f"{RELEASE}-split.csv",))
    if path is None:
        return {}
    found: dict[str, str] = {}
    for number, cells in read_rows(path, {"dicom": "dicom_id", "split": "split"}):
        if cells["dicom"] is None or cells["split"] not in SPLITS:
            raise FileFormatError(
                f"row {number} of `{path.name}` names no split, expected {', '.join(SPLITS)}", hint="download it again"
            )
        found[cells["dicom"]] = SPLITS[cells["split"]]
    return found


def _read_labels(root: Path, labeller: str, uncertain: Uncertain) -> Mapping[_Study, dict[str, LabelValue]]:
    """Return study -> observations; nothing where the table is absent."""
    path = find_optional(root, (f"{RELEASE}-{labeller}.csv",))
    if path is None:
        return {}
    found: dict[_Study, dict[str, LabelValue]] = {}
    columns = {"patient": "subject_id", "study": "study_id", **{o: o for o in OBSERVATIONS}}
    for number, cells in read_rows(path, columns):
        try:
            values = {o: finding_value(cells[o], uncertain) for o in OBSERVATIONS}
        except FileFormatError as error:
            raise FileFormatError(f"row {number} of `{path.name}`: {error.message}") from error
        found[f"p{cells['patient']}", f"s{cells['study']}"] = values
    return found
