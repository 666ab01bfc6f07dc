"""Open-i, the Indiana University collection: 3,955 chest reports with sections and MeSH terms, 7,470 films.

Comes in: the folder of the XML reports (``ecgen-radiology``) and of the PNG images, or the two tables
``indiana_reports.csv`` and ``indiana_projections.csv`` in which the same collection is passed around. Goes out: one sample a
film (or a report), with findings and impression as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.layout import Part, find_optional, index_images, keep_whole, read_rows
from chiasm.datasets.sections import join_sections
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected
from chiasm.types import LabelValue, Sample

FACTS = DatasetFacts(
    name="openi",
    title="Open-i (Indiana University chest X-rays)",
    classes=("normal",),
    words={"normal": ("normal chest x-ray",)},
    tile_px=None,
    magnification=None,
    um_per_px=None,
    sizes={"all": 7_470},
    val="none",
    split_rule="none is given; split by report, which is the study here",
    licence="CC BY-NC-ND 4.0, as each report states",
    page="https://openi.nlm.nih.gov/faq",
    citation="D. Demner-Fushman, M. D. Kohli, M. B. Rosenman et al. 2016, Preparing a collection of radiology "
    "examinations for distribution and retrieval, JAMIA 23(2), 304-310",
    layout="ROOT/ecgen-radiology/*.xml and the images of NLMCXR_png.tgz in ROOT, ROOT/NLMCXR_png or ROOT/images; or "
    "ROOT/indiana_reports.csv, ROOT/indiana_projections.csv and ROOT/images/images_normalized/*.png",
    tissue=None,
    cautions=(
        "many normal reports are word for word the same: count identical texts as one in retrieval",
        "words that might tell the patient were replaced by XXXX",
        "`normal` is what the MeSH terms say, given by people who read the report, not the film",
        "patients are not named; every report is taken for a patient of its own",
    ),
    sources={"sizes": "the image ids of the reports", "licence": "the reports", "words": "the MeSH term"},
    kind="findings",
    columns=("mesh", "mesh_automatic", "projection"),
    texts=True,
)
REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
SECTIONS = ("findings", "impression")
MAX_REPORT_BYTES = 1 << 20
#: MeSH terms that say nothing of the chest.
NO_STATEMENT = frozenset({"no indexing", "technical quality of image unsatisfactory"})
_XML_FOLDERS = ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", "NLMCXR_reports", "reports", "")
_IMAGE_FOLDERS = ("", "NLMCXR_png", "images", "images/images_normalized", "images_normalized")

Per = Literal["image", "report"]


@dataclass(frozen=True)
class _Report:
    name: str
    sections: dict[str, str]
    mesh: tuple[str, ...]
    mesh_automatic: tuple[str, ...]
    #: Image file names without ending, each with its projection where known.
    images: tuple[tuple[str, str | None], ...]


def load_openi(
    root: str | Path,
    *,
    sections: Sequence[str] = SECTIONS,
    per: Per | None = None,
    require: Sequence[Part] = ("image",),
) -> Dataset:
    """Read the reports and where their images lie.

    Args:
        root: Folder of the reports and the images.
        sections: Sections that make the text, joined in this order: ``findings``, ``impression``, ``indication``,
            ``comparison``. A report without any of them gives no text.
        per: ``image``: a sample a film; ``report``: a sample a report, without an image. None: ``report`` where texts
            alone are required.
        require: What a sample must have, of ``image`` and ``text``.

    Returns:
        Samples named by the image (``CXR1_1_IM-0001-3001``) or the report (``CXR1``), by the number of the report.
        Labels: ``normal`` (1, 0; None where the report was not indexed), ``mesh`` and ``mesh_automatic`` (terms joined
        by ``|``), ``projection`` (Frontal, Lateral; the XML does not say it). ``study`` is the report.

    Raises:
        InputError: There is no report, nothing required was found, or an option has none of its values.
        UnknownName: A table lacks a column.
        FileFormatError: A table is damaged.
    """
    root = Path(root)
    check_choice("per of openi", per or "image", ("image", "report"))
    by_report = per == "report" or (per is None and "text" in require and "image" not in require)
    if by_report and "image" in require:
        raise InputError("a sample that is a report has no image", hint="require texts alone, or leave `per` out")
    rejected: list[Rejected] = []
    reports = _from_tables(root) if find_optional(root, (REPORTS,)) else _from_xml(root, rejected)
    found = index_images(root, _IMAGE_FOLDERS, (".png", ".jpg", ".jpeg", ".dcm"))
    images = {_stem(name): path for name, path in found.items()}
    rows: list[tuple[int, Sample]] = []
    for number, report in reports:
        text = join_sections(report.sections, sections)
        labels = _labels(report)
        if by_report:
            rows.append((number, Sample(id=report.name, text=text, study=report.name, labels=labels)))
            continue
        for image, projection in report.images:
            own = labels | {"projection": projection}
            rows.append((number, Sample(image, images.get(image), text, study=report.name, labels=own)))
    return keep_whole(FACTS, rows, rejected, require)


def _labels(report: _Report) -> dict[str, LabelValue]:
    terms = {term.casefold() for term in report.mesh} - NO_STATEMENT
    return {
        "normal": int(terms == {"normal"}) if terms else None,
        "mesh": "|".join(report.mesh) or None,
        "mesh_automatic": "|".join(report.mesh_automatic) or None,
    }


def _stem(name: str) -> str:
    """Return an image's name without its ending; the tables write ``1_IM-0001-4001.dcm.png``."""
    return re.sub(r"(\.dcm)?\.(png|jpe?g|dcm)$", "", name, flags=re.IGNORECASE)


def _from_xml(root: Path, rejected: list[Rejected]) -> Iterator[tuple[int, _Report]]:
    if not root.is_dir():
        raise FACTS.missing(f"folder `{root.name}` does not exist")
    folders = [root / folder for folder in _XML_FOLDERS]
    files = next((f for f in (sorted(folder.glob("*.xml"), key=_number) for folder in folders) if f), None)
    if files is None:
        raise FACTS.missing("folder `ecgen-radiology` holds no report, or is missing")
    return _parse_all(files, rejected)


def _number(path: Path) -> tuple[int, str]:
    found = re.search(r"\d{1,9}", path.stem)
    return (int(found.group()) if found else 0, path.name)


def _parse_all(files: Sequence[Path], rejected: list[Rejected]) -> Iterator[tuple[int, _Report]]:
    for number, path in enumerate(files, start=1):
        content = path.read_bytes() if path.stat().st_size <= MAX_REPORT_BYTES else b"\0"
        try:
            # Reports define no entities; a file that does, or hides them in another encoding, is no report.
            if b"<!" in content.replace(b"<!--", b"") or b"\0" in content:
                raise ElementTree.ParseError
            tree = ElementTree.fromstring(content)
        except (ElementTree.ParseError, ValueError, LookupError):
            rejected.append(Rejected(number, path.stem, "report is no plain XML"))
            continue
        yield number, _of_tree(tree, path)


def _of_tree(tree: ElementTree.Element, path: Path) -> _Report:
    named = next((e.get("id") for e in tree.iter("uId") if e.get("id")), None)
    sections: dict[str, str] = {}
    for element in tree.iter("AbstractText"):
        text = " ".join("".join(element.itertext()).split())
        if text:
            sections[(element.get("Label") or "").casefold()] = text

    def terms(tag: str) -> tuple[str, ...]:
        return tuple(word for e in tree.iter(tag) if (word := " ".join((e.text or "").split())))

    ids = dict.fromkeys(e.get("id") or "" for e in tree.iter("parentImage"))
    images = tuple((name, None) for name in ids if name)
    return _Report(named or f"CXR{path.stem.removeprefix('CXR')}", sections, terms("major"), terms("automatic"), images)


def _from_tables(root: Path) -> Iterator[tuple[int, _Report]]:
    reports, projections = (find_optional(root, (name,)) for name in (REPORTS, PROJECTIONS))
    if reports is None or projections is None:
        raise FACTS.missing(f"file `{PROJECTIONS}` is missing")
    images: dict[str, list[tuple[str, str | None]]] = {}
    for _, cells in read_rows(projections, {"uid": "uid", "file": "filename", "projection": "projection"}):
        if cells["uid"] and cells["file"]:
            images.setdefault(cells["uid"], []).append((_stem(cells["file"]), cells["projection"]))
    names = ("findings", "impression", "indication", "comparison")
    for number, cells in read_rows(reports, {"uid": "uid", "mesh": "MeSH"}, optional={n: n for n in names}):
        uid = cells["uid"] or ""
        sections = {name: " ".join(text.split()) for name in names if (text := cells[name])}
        mesh = tuple(term.strip() for term in (cells["mesh"] or "").split(";") if term.strip())
        yield number, _Report(f"CXR{uid}", sections, mesh, (), tuple(images.get(uid, ())))
