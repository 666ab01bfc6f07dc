"""The public data sets, read from miniatures in the layout of the real downloads, and what is said when a file is absent."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.datasets import open_dataset as open_source
from chiasm.datasets import open_sample_image
from chiasm.datasets.bach import REFERENCE_STEP, TEST_RANGES, TRAIN_RANGES, split_indices
from chiasm.datasets.crc import held_out
from chiasm.datasets.images import image_exists
from chiasm.datasets.miniature import make_miniature
from chiasm.datasets.named import cautions_of, dataset_facts, dataset_names, open_dataset, split_source
from chiasm.errors import FileFormatError, InputError, UnknownName

#: Data sets of one class an image; those of several findings are tested in test_chest.py.
NAMES = [name for name in dataset_names() if dataset_facts(name).kind == "classes"]
MODULE = "camelyonpatch_level_2_split_train"


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One miniature of each family, 8 px, read by many tests and changed by none."""
    root = tmp_path_factory.mktemp("trees")
    for name in ("crc-nonorm", *(n for n in NAMES if "-" not in n or n.startswith(("tb-", "rsna-")))):
        make_miniature(name, root / name, size_px=8)
    return root


@pytest.fixture
def pcam(trees: Path, tmp_path: Path) -> Path:
    shutil.copytree(trees / "pcam", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_whole_and_hold_for_what_is_read(name: str, trees: Path) -> None:
    facts = dataset_facts(name)
    for words in (facts.title, facts.split_rule, facts.licence, facts.page, facts.citation, facts.layout):
        assert words
        assert "[?]" not in words
        assert "\n" not in words
    assert set(facts.words) == set(facts.classes)
    assert all(facts.words.values())
    assert facts.cautions
    assert {"sizes", "words"} & set(facts.sources)
    assert facts.page.startswith("https://")
    tree = trees / (name if (trees / name).exists() else name.partition("-")[0])
    data = open_dataset(name, tree)
    assert data.name == name
    assert {s.labels["label"] for s in data} == set(facts.classes)
    assert list(dict.fromkeys(facts.class_number(str(s.labels["label"])) for s in data)) == list(
        range(len(facts.classes))
    )
    assert set(data.splits) == ({"train", "val", "test"} & set(facts.sizes))
    assert ("val" in data.splits) == (facts.val != "none")
    assert all(image_exists(s.image) for s in data if s.image is not None)
    assert open_source(f"{name}:{tree}") == data
    assert open_source(Path(f"{name.upper()}:{tree}")).digest == data.digest
    with pytest.raises(InputError, match="has no class"):
        facts.class_number("nothing")


@pytest.mark.parametrize("name", dataset_names())
def test_an_absent_folder_says_what_is_expected_and_where_to_get_it(name: str, tmp_path: Path) -> None:
    facts = dataset_facts(name)
    for root in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError) as caught:
            open_dataset(name, root)
        assert facts.layout in caught.value.message
        assert facts.page in (caught.value.hint or "")
        assert str(tmp_path) not in str(caught.value)


def test_pcam_images_and_labels_are_those_of_the_files(trees: Path) -> None:
    import h5py

    data = open_dataset("pcam", trees / "pcam")
    assert Counter(s.split for s in data) == {"train": 20, "val": 20, "test": 20}
    assert data[0].id == "train/0"
    assert len({s.group for s in data if s.split == "train"}) == 5
    with h5py.File(trees / "pcam" / "pcam" / "camelyonpatch_level_2_split_valid_x.h5") as file:
        pixels = file["x"][()]
    valid = data.subset("val")
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(open_sample_image, valid))
    assert all(p.mode == "RGB" for p in pictures)
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), pixels)
    assert [s.labels["label"] for s in valid][:2] == ["normal", "tumor"]


def test_pcam_reads_both_directories_and_single_splits(pcam: Path, trees: Path) -> None:
    whole = open_dataset("pcam", pcam)
    for file in sorted((pcam / "pcam").iterdir()):
        file.rename(pcam / file.name)
    assert open_dataset("pcam", pcam).digest == whole.digest
    (pcam / "pcam").rmdir()
    assert open_dataset("pcam", pcam).digest == whole.digest
    for file in pcam.glob("*train*"):
        file.unlink()
    assert open_dataset("pcam", pcam, splits=("val", "test")).splits == ("test", "val")
    with pytest.raises(InputError, match=rf"file `{MODULE}_x.h5` is missing \(and 1 more\)"):
        open_dataset("pcam", pcam)
    with pytest.raises(InputError, match="train, val or test, got `valid`"):
        open_dataset("pcam", pcam, splits=("valid",))
    with pytest.raises(InputError, match="has no option `shuffle`"):
        open_dataset("pcam", trees / "pcam", shuffle=True)


def write(path: Path, key: str, values: np.ndarray) -> None:
    """Put a new file in the place of an old one, which the reader holds open."""
    import h5py

    path.unlink()
    with h5py.File(path, "w") as file:
        file[key] = values


def test_pcam_says_what_is_wrong_with_a_file(pcam: Path) -> None:
    folder = pcam / "pcam"
    images, labels, meta = (folder / f"{MODULE}_{kind}" for kind in ("x.h5", "y.h5", "meta.csv"))
    meta.unlink()
    assert open_dataset("pcam", pcam)[0].slide is None
    meta.write_text("wsi\na\n")
    with pytest.raises(FileFormatError, match="describes 1 patches, the split has 20"):
        open_dataset("pcam", pcam)
    meta.write_text("slide\n" + "a\n" * 20)
    with pytest.raises(UnknownName, match="wsi"):
        open_dataset("pcam", pcam)
    meta.unlink()
    for values, message in (
        (np.zeros((19, 1, 1, 1)), "holds 20 images, .* 19 labels"),
        (np.full(20, 3), "neither 0 nor 1"),
    ):
        write(labels, "y", values.astype(np.uint8))
        with pytest.raises(FileFormatError, match=message):
            open_dataset("pcam", pcam)
    write(labels, "z", np.zeros(3))
    with pytest.raises(FileFormatError, match=rf"`{MODULE}_y.h5` has no array `y`; it holds `z`"):
        open_dataset("pcam", pcam)
    half = images.read_bytes()[:500]
    images.unlink()
    images.write_bytes(half)
    with pytest.raises(FileFormatError, match=rf"`{MODULE}_x.h5` is not a whole HDF5 file"):
        open_dataset("pcam", pcam)
    images.rename(folder / f"{images.name}.gz")
    with pytest.raises(InputError, match="still compressed") as caught:
        open_dataset("pcam", pcam)
    assert caught.value.hint == f"gunzip {images.name}.gz"


def test_bach_ranges_cover_400_files_once() -> None:
    numbers = [i for ranges in (TRAIN_RANGES, TEST_RANGES) for a, b in ranges for i in range(a, b)]
    assert sorted(numbers) == list(range(400))
    assert Counter(split_indices()) == {"train": 268, "test": 132}
    assert Counter(split_indices("reference")) == {"train": 254, "val": 14, "test": 132}
    plain, reference = split_indices(), split_indices("reference")
    assert all(r == p or (p, r) == ("train", "val") for p, r in zip(plain, reference, strict=True))
    train = [i for i, s in enumerate(plain) if s == "train"]
    assert [i for i, s in enumerate(reference) if s == "val"] == train[::REFERENCE_STEP]


def test_bach_goes_by_class_and_name(trees: Path) -> None:
    data = open_dataset("bach", trees / "bach")
    assert [data[i].id for i in (0, 100, 200, 399)] == [
        "Benign/b001.tif", "InSitu/is001.tif", "Invasive/iv001.tif", "Normal/n100.tif",
    ]  # fmt: skip
    assert [s.split for s in data] == list(split_indices())
    assert open_sample_image(data[0]).size == (8, 8)
    assert open_dataset("bach", trees / "bach" / "ICIAR2018_BACH_Challenge").samples == data.samples
    reference = open_dataset("bach-clip-it", trees / "bach")
    assert [s.split for s in reference] == list(split_indices("reference"))


def test_bach_counts_its_files_and_takes_part_of_them_on_request(trees: Path, tmp_path: Path) -> None:
    shutil.copytree(trees / "bach", tmp_path / "b")
    photos = tmp_path / "b" / "ICIAR2018_BACH_Challenge" / "Photos"
    whole = {s.id: s.split for s in open_dataset("bach", tmp_path / "b")}
    (photos / "InSitu" / "is007.tif").unlink()
    (photos / "InSitu" / "Thumbs.db").write_text("no image")
    with pytest.raises(InputError, match=r"folder `InSitu` holds 99 .tif files, expected 100"):
        open_dataset("bach", tmp_path / "b")
    shutil.copy(photos / "InSitu" / "is008.tif", photos / "InSitu" / "copy of 8.tif")
    with pytest.raises(InputError, match="row"):
        open_dataset("bach", tmp_path / "b", partial=True, on_bad_row="fail")
    part = open_dataset("bach", tmp_path / "b", partial=True)
    assert {s.id: s.split for s in part} == {k: v for k, v in whole.items() if k != "InSitu/is007.tif"}
    assert [r.reason for r in part.rejected] == ["no number in its name"]
    shutil.rmtree(photos / "Normal")
    with pytest.raises(InputError, match="folder `Normal` is missing"):
        open_dataset("bach", tmp_path / "b", partial=True)


def test_bach_takes_a_table_of_patients(trees: Path, tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    data = open_dataset("bach", trees / "bach")
    table.write_text("file,patient\n" + "".join(f"{Path(s.id).name},p{i // 8}\n" for i, s in enumerate(data)))
    grouped = open_dataset("bach", trees / "bach", patients=table)
    assert grouped[17].patient == "p2"
    table.write_text("file,patient\nb001.tif,p0\n")
    with pytest.raises(InputError, match="lacks `b002"):
        open_dataset("bach", trees / "bach", patients=table)


def test_crc_split_is_a_stratified_fifth_of_the_sorted_files(trees: Path) -> None:
    data = open_dataset("crc", trees / "crc")
    assert Counter((s.split, s.labels["label"]) for s in data if s.split == "val") == {
        ("val", c): 2 for c in dataset_facts("crc").classes
    }
    assert Counter(s.split for s in data) == {"train": 72, "val": 18, "test": 90}
    assert {s.id.partition("/")[0] for s in data if s.split == "test"} == {"CRC-VAL-HE-7K"}
    assert [s.id for s in data if s.split != "test"] == sorted(s.id for s in data if s.split != "test")
    # The reference's call, on labels in this order; scikit-learn's stream must not change under us unseen.
    assert held_out([0] * 10 + [1] * 10) == [3, 6, 12, 16]
    assert open_dataset("crc-nonorm", trees / "crc-nonorm")[0].id.startswith("NCT-CRC-HE-100K-NONORM/ADI/")


@given(st.lists(st.integers(5, 40), min_size=2, max_size=9))
@settings(max_examples=15)
def test_every_class_gives_a_fifth_to_validation(counts: list[int]) -> None:
    classes = [c for c, n in enumerate(counts) for _ in range(n)]
    held = held_out(classes)
    assert held == sorted(set(held))
    assert len(held) == -(-len(classes) // 5)
    share = Counter(classes[row] for row in held)
    assert all(abs(share[c] - n * len(held) / len(classes)) < 1 for c, n in enumerate(counts))
    assert held_out(classes) == held


def test_crc_says_which_folder_is_missing(trees: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder `NCT-CRC-HE-100K` is missing"):
        open_dataset("crc", trees / "crc-nonorm")
    shutil.copytree(trees / "crc", tmp_path / "c")
    for file in (tmp_path / "c" / "CRC-VAL-HE-7K" / "MUS").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="folder `CRC-VAL-HE-7K/MUS` holds no image"):
        open_dataset("crc", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "NCT-CRC-HE-100K" / "TUM")
    with pytest.raises(InputError, match="folder `NCT-CRC-HE-100K/TUM` is missing"):
        open_dataset("crc", tmp_path / "c")
    with pytest.raises(InputError, match="too few to hold out a fifth with all 3 classes"):
        held_out([0, 0, 1, 1, 2])


def test_lc25000_keeps_a_tile_whole(trees: Path, tmp_path: Path) -> None:
    from chiasm.data.splits import split_by_group

    data = open_dataset("lc25000", trees / "lc25000")
    assert not data.splits
    assert len(set(data.groups)) == 15
    assert all(s.patient is not None and s.patient.startswith(f"{s.labels['label']}/") for s in data)
    side = split_by_group(data.groups, {"train": 0.6, "test": 0.4}, stratify=data.labels("label"))
    assert not {g for g, s in zip(data.groups, side, strict=True) if s == "train"} & {
        g for g, s in zip(data.groups, side, strict=True) if s == "test"
    }
    lung = open_dataset("lc25000-lung", trees / "lc25000")
    assert [s.id for s in lung] == [s.id for s in data if s.id.startswith("lung")]


def test_lc25000_without_a_table_has_neither_groups_nor_split(trees: Path, tmp_path: Path) -> None:
    shutil.copytree(trees / "lc25000", tmp_path / "l")
    (tmp_path / "l" / "lc25000_image_groups.csv").unlink()
    data = open_dataset("lc25000", tmp_path / "l")
    assert dataset_facts("lc25000").needs_groups
    assert all(s.patient is None and s.split is None for s in data)
    (tmp_path / "l" / "lung_image_sets" / "lung_n").rename(tmp_path / "l" / "lung_n")
    assert open_dataset("lc25000", tmp_path / "l").samples[30:31][0].id == data[30].id
    assert len(open_dataset("lc25000-colon", tmp_path / "l")) == 20
    shutil.rmtree(tmp_path / "l" / "lung_n")
    with pytest.raises(InputError, match="folder `lung_image_sets/lung_n` is missing"):
        open_dataset("lc25000-lung", tmp_path / "l")


def test_lc25000_reads_the_tables_of_lc25000_clean(trees: Path, tmp_path: Path) -> None:
    by_csv = open_dataset("lc25000-lung", trees / "lc25000")
    tiles = {s.id: s.patient for s in by_csv}
    for label in ("lung_aca", "lung_n", "lung_scc"):
        folder = tmp_path / "annotations" / label / "UNI" / "resize_only"
        folder.mkdir(parents=True)
        own = [(i, t) for i, t in tiles.items() if i.startswith(label)]
        numbers = {t: n for n, t in enumerate(dict.fromkeys(t for _, t in own))}
        lines = [f"{numbers[t]},./LC25000/{i}" for i, t in own if not i.endswith("scc3.jpeg")]
        (folder / "final_clusters.csv").write_text("\n".join(["cluster_label,img_path", *lines]))
        (folder / "results.csv").write_text("a,b\n1,2\n")
    by_folder = open_dataset("lc25000-lung", trees / "lc25000", groups=tmp_path / "annotations")
    assert [r.sample_id if hasattr(r, "sample_id") else r.id for r in by_folder.rejected] == ["lung_scc/lungscc3.jpeg"]
    of_csv = {s.id: s.patient for s in by_csv}
    pairs = {(of_csv[s.id], s.patient) for s in by_folder}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 9
    table = tmp_path / "t.csv"
    table.write_text("image,source_tile_group\nlungaca1.jpg,7\nlungaca1.png,8\n")
    with pytest.raises(InputError, match="two groups"):
        open_dataset("lc25000-lung", trees / "lc25000", groups=table)
    table.write_text("image,source_tile_group\nelsewhere.jpg,7\n")
    with pytest.raises(InputError, match="names none of the 30 images"):
        open_dataset("lc25000-lung", trees / "lc25000", groups=table)
    table.write_text("image,colour\na.jpg,7\n")
    with pytest.raises(InputError, match="no column of the group"):
        open_dataset("lc25000-lung", trees / "lc25000", groups=table)


def test_damaged_images_are_found_when_asked(trees: Path, tmp_path: Path) -> None:
    shutil.copytree(trees / "crc", tmp_path / "c")
    victim = tmp_path / "c" / "NCT-CRC-HE-100K" / "DEB" / "DEB-0003.tif"
    victim.write_bytes(b"no image")
    assert len(open_dataset("crc", tmp_path / "c")) == 180
    checked = open_dataset("crc", tmp_path / "c", check_images=True)
    assert [r.id for r in checked.rejected] == ["NCT-CRC-HE-100K/DEB/DEB-0003.tif"]
    with pytest.raises(InputError, match="has no texts"):
        open_source(f"crc:{tmp_path / 'c'}", require=("image", "text"))
    with pytest.raises(InputError, match="is a data set of its own"):
        open_source(f"crc:{tmp_path / 'c'}", root=tmp_path)


def test_what_is_a_name_and_what_is_a_path(trees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_source("pcam:/data") == ("pcam", "/data")
    assert split_source(Path("BACH-clip-it:here")) == ("bach-clip-it", "here")
    for path in (
        "table.csv",
        "/a/b",
        "C:\\data",
        "https://x/y",
        Path("https://x/y"),
        "a.tar::b.tar",
        "pcam:",
        "x:{0..1}.tar",
    ):
        assert split_source(path) is None, path
    with pytest.raises(UnknownName, match=r"unknown data set `pcan`; did you mean `pcam`\?"):
        open_source("pcan:/data")
    with pytest.raises(UnknownName, match="unknown data set `cifar`"):
        dataset_facts("cifar")
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "scan:1"
    odd.mkdir()
    Image.new("RGB", (4, 4)).save(odd / "a.png")
    assert len(open_source("scan:1")) == 1
    assert cautions_of("scan:1") == ()
    assert any(re.search("optimistic", c) for c in cautions_of(f"crc:{trees}"))


def test_the_page_in_the_docs_is_the_table() -> None:
    """`python tools/make_datasets_page.py` writes docs/reference/datasets.md; correct the readers, not the page."""
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("make_datasets_page", root / "tools" / "make_datasets_page.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = (root / "docs" / "reference" / "datasets.md").read_text(encoding="utf-8")
    assert text == page.render(), "run tools/make_datasets_page.py"
