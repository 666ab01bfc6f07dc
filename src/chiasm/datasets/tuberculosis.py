"""The two chest film sets with and without tuberculosis of the US National Library of Medicine: Shenzhen and Montgomery.

Comes in: the folder of ``ChinaSet_AllFiles`` or ``MontgomerySet``. Goes out: one sample a film; its class is the last figure
of its name (``_0`` normal, ``_1`` tuberculosis), age and sex are in a text beside it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts, check_choice
from chiasm.datasets.layout import age_in_years, index_images, keep_whole, sex_of
from chiasm.datasets.parsing import read_text
from chiasm.io.manifest import Rejected
from chiasm.types import LabelValue, Sample

SHENZHEN_FACTS = DatasetFacts(
    name="tb-shenzhen",
    title="Shenzhen chest X-ray set",
    classes=("normal", "tuberculosis"),
    words={"normal": ("normal chest x-ray",), "tuberculosis": ("tuberculosis", "pulmonary tuberculosis")},
    tile_px=None,
    magnification=None,
    um_per_px=None,
    sizes={"all": 662},
    val="none",
    split_rule="none is given; every film is taken for a patient of its own",
    licence="not stated here; read the terms on the download page before you pass images on",
    page="https://lhncbc.nlm.nih.gov/LHC-downloads/downloads.html",
    citation="S. Jaeger, S. Candemir, S. Antani, Y.-X. J. Wáng, P.-X. Lu, G. Thoma 2014, Two public chest X-ray datasets "
    "for computer-aided screening of pulmonary diseases, Quantitative Imaging in Medicine and Surgery 4(6), 475-477",
    layout="ROOT/ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png ... and ROOT/ChinaSet_AllFiles/ClinicalReadings/*.txt",
    tissue=None,
    cautions=(
        "one hospital with its own machines: a model tested here and trained elsewhere shows the difference of places too",
        "the label `reading` states the class in words; never feed it to a model",
    ),
    sources={"sizes": "Jaeger et al. 2014", "words": "names of the classes", "layout": "the download"},
    columns=("age_years", "sex", "reading"),
)
MONTGOMERY_FACTS = replace(
    SHENZHEN_FACTS,
    name="tb-montgomery",
    title="Montgomery County chest X-ray set",
    sizes={"all": 138},
    layout="ROOT/MontgomerySet/CXR_png/MCUCXR_0001_0.png ... and ROOT/MontgomerySet/ClinicalReadings/*.txt",
    cautions=(
        "138 films, 58 of them with tuberculosis: an accuracy of 0.85 is known to about ± 0.06 (95 %)",
        *SHENZHEN_FACTS.cautions,
    ),
)
_BY_PLACE = {"shenzhen": SHENZHEN_FACTS, "montgomery": MONTGOMERY_FACTS}
_FOLDER = {"shenzhen": "ChinaSet_AllFiles", "montgomery": "MontgomerySet"}
_NAME = {"shenzhen": re.compile(r"CHNCXR_\d+_([01])"), "montgomery": re.compile(r"MCUCXR_\d+_([01])")}

Place = Literal["shenzhen", "montgomery"]


def load_tuberculosis(root: str | Path, *, place: Place = "shenzhen") -> Dataset:
    """Read the films with their class, age and sex.

    Args:
        root: Folder that holds ``ChinaSet_AllFiles`` or ``MontgomerySet`` (or ``CXR_png`` itself).
        place: Which of the two sets.

    Returns:
        Samples ``CHNCXR_0001_0`` ..., normal first, with the labels ``label``, ``age_years``, ``sex`` and ``reading``; the
        last three are None where there is no text of the film, or it does not say them. Masks are not read.

    Raises:
        InputError: A folder is missing or holds no film of the set.
        FileFormatError: A text is binary.
    """
    check_choice("place of tuberculosis", place, tuple(_BY_PLACE))
    facts, root = _BY_PLACE[place], Path(root)
    if not root.is_dir():
        raise facts.missing(f"folder `{root.name}` does not exist")
    base = next((b for b in (root / _FOLDER[place], root) if (b / "CXR_png").is_dir()), None)
    if base is None:
        raise facts.missing(f"folder `{_FOLDER[place]}/CXR_png` is missing")
    rows: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    images = index_images(base, ("CXR_png",))
    for number, name in enumerate(sorted(images), start=1):
        path = images[name]
        found = _NAME[place].fullmatch(path.stem)
        if found is None:
            rejected.append(Rejected(number, path.stem, "name does not tell the class"))
            continue
        label = facts.classes[int(found.group(1))]
        about = _read_about(base / "ClinicalReadings" / f"{path.stem}.txt")
        rows.append((number, Sample(path.stem, path, patient=path.stem, labels={"label": label, **about})))
    if not rows:
        raise facts.missing("folder `CXR_png` holds no film of this set")
    rows.sort(key=lambda row: facts.class_number(str(row[1].labels["label"])))
    return keep_whole(facts, rows, rejected, ("image",))


def _read_about(path: Path) -> dict[str, LabelValue]:
    """Return age, sex and reading: ``male 45yrs`` and the reading, or lines ``Patient's Sex: F``, ``Patient's Age: 027Y``."""
    lines = [line.strip() for line in read_text(path)[0].splitlines()] if path.is_file() else []
    lines = [line for line in lines if line]
    titled = [line for line in lines if line.casefold().startswith("patient")]
    head = " ".join(titled or lines[:1])
    sex = re.search(r"\b(?:fe)?male\b|\bsex:?\s*([FM])\b", head, re.IGNORECASE)
    age = re.search(r"(\d{1,3})\s*(y|m|w|d)[a-z]*", head, re.IGNORECASE)
    return {
        "age_years": age_in_years(age.group(0)) if age else None,
        "sex": sex_of(sex.group(1) or sex.group(0)) if sex else None,
        "reading": " ".join(line for line in lines if line not in (titled or lines[:1])) or None,
    }
