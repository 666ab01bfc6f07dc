"""Two small models, a table of synthetic films, and a suite over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.evaluate.suite.settings import Suite, load_suite

SUITE = """
name = "tiny"
n_resamples = 40
n_permutations = 60
smallest_group = 4

[models.one]
source = "one"

[models.two]
source = "two"

[models.colours]
floor = "colours"

[data.films]
source = "films/table.csv"
labels = ["cardiomegaly", "effusion"]
truth = "*"
fractions = { train = 0.4, val = 0.2, test = 0.4 }
subgroups = ["visit"]

[tasks.zero_shot]

[tasks.prototype]

[tasks.retrieval]
ks = [1, 5]
"""


@pytest.fixture(scope="session")
def suite_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and films; a test writes its suite file beside them."""
    from chiasm.data.phantoms import make_chest_phantoms
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    folder = tmp_path_factory.mktemp("suite")
    for seed, name in enumerate(("one", "two")):
        save_encoder(TinyEncoder(seed), folder / name)
    (folder / "films").mkdir()
    make_chest_phantoms(90, seed=5, size_px=32).save(folder / "films")
    return folder


@pytest.fixture(scope="session")
def suite(suite_dir: Path) -> Suite:
    """The suite of this folder."""
    path = suite_dir / "tiny.toml"
    path.write_text(SUITE)
    return load_suite(path)
