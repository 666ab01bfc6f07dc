from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from chiasm.data.duplicates import find_duplicates, fingerprint_images
from chiasm.data.splits import check_leakage, kfold_groups, merge_groups_by_duplicates, split_by_group
from chiasm.datasets import load_table
from chiasm.errors import InputError, LeakageError
from chiasm.types import Sample

GROUPS = st.lists(st.integers(0, 30).map(lambda i: f"p{i}"), min_size=1, max_size=120)
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


@given(groups=GROUPS, seed=st.integers(0, 5), data=st.data())
def test_groups_stay_whole_whatever_the_order_of_rows(groups: list[str], seed: int, data: st.DataObject) -> None:
    if len(set(groups)) < 3:
        with pytest.raises(InputError, match="groups cannot fill 3 splits"):
            split_by_group(groups, SHARES, seed=seed)
        return
    names = split_by_group(groups, SHARES, seed=seed)
    place = dict(zip(groups, names, strict=True))
    assert all(place[g] == n for g, n in zip(groups, names, strict=True))
    assert set(names) == set(SHARES)
    order = data.draw(st.permutations(range(len(groups))))
    again = split_by_group([groups[i] for i in order], SHARES, seed=seed)
    assert again == [names[i] for i in order]
    largest = max(Counter(groups).values())
    for name, share in SHARES.items():
        assert (
            abs(names.count(name) - share * len(groups)) <= 2 * largest + 1e-9
        )  # one group more where a split would be empty
    if len(set(groups)) > 25:
        assert max(abs(names.count(n) - share * len(groups)) for n, share in SHARES.items()) <= largest + 1e-9


def test_seeds_differ_and_large_splits_are_close() -> None:
    groups = [f"p{i // 3}" for i in range(3000)]
    splits = [split_by_group(groups, SHARES, seed=seed) for seed in range(3)]
    assert splits[0] != splits[1] != splits[2]
    for names in splits:
        for name, share in SHARES.items():
            assert abs(names.count(name) / 3000 - share) < 0.002
    overlap = sum(a == b == "test" for a, b in zip(splits[0], splits[1], strict=True)) / 3000
    assert 0.02 < overlap < 0.06  # independent draws of a fifth meet in a twenty-fifth


@given(
    labels=st.lists(st.sampled_from(["a", "b", None, 1]), min_size=3, max_size=150),
    rows_a_group=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_strata_get_their_share(labels: list[str | int | None], rows_a_group: int, seed: int) -> None:
    groups = [f"p{i}" for i in range(len(labels)) for _ in range(rows_a_group)]
    values = [label for label in labels for _ in range(rows_a_group)]
    names = split_by_group(groups, SHARES, seed=seed, stratify=values)
    assert len(set(zip(groups, names, strict=True))) == len(labels)
    for label, total in Counter(values).items():
        for name, share in SHARES.items():
            found = sum(v == label and n == name for v, n in zip(values, names, strict=True))
            assert abs(found - share * total) <= 3 * rows_a_group + 1e-9


def test_a_group_of_several_labels_counts_for_the_rarest() -> None:
    groups = [f"p{i // 2}" for i in range(400)]
    values = ["rare" if i in (0, 20, 40, 60, 80) else "common" for i in range(400)]
    names = split_by_group(groups, {"train": 0.6, "test": 0.4}, stratify=values)
    assert Counter(n for n, v in zip(names, values, strict=True) if v == "rare") == {"train": 3, "test": 2}


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.2, "b": -0.2}, {"a": 0.5, "b": 0.5, "c": 0.0}])
def test_shares_must_make_sense(fractions: dict[str, float]) -> None:
    with pytest.raises(InputError, match="sum to 1"):
        split_by_group(["a", "b", "c"], fractions)


def test_folds_are_disjoint_and_even() -> None:
    groups = [f"p{i % 37}" for i in range(500)]
    folds = kfold_groups(groups, 5, seed=2)
    assert set(folds) == set(range(5))
    assert len(set(zip(groups, folds, strict=True))) == 37
    assert max(Counter(folds).values()) - min(Counter(folds).values()) <= 2 * 14
    assert kfold_groups(groups, 5, seed=2) == folds
    with pytest.raises(InputError, match="k must be at least 2"):
        kfold_groups(groups, 1)
    with pytest.raises(InputError, match="1 groups cannot fill 2"):
        kfold_groups(["a", "a"], 2)
    with pytest.raises(InputError, match="stratify has 1 labels for 2 rows"):
        split_by_group(["a", "b"], {"x": 1.0}, stratify=["a"])


def scene(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    return Image.fromarray(noise).resize((160, 140), Image.Resampling.BICUBIC)


def saved(folder: Path, name: str, image: Image.Image, **options: int) -> Sample:
    path = folder / name
    image.save(path, **options)
    return Sample(id=name, image=path, patient=f"patient of {name}")


def test_ids_patients_studies_and_slides_are_found_and_never_named() -> None:
    train = [
        Sample(id="a", patient="Doe", slide="s1"),
        Sample(id="b", study="st1"),
        Sample(id="c", patient="Roe", study="1"),
        Sample(id="d", patient="Doe"),
    ]
    test = [
        Sample(id="a", patient="Poe", study="1"),
        Sample(id="e", patient="Doe"),
        Sample(id="f", study="st1", slide="s1"),
    ]
    with pytest.raises(LeakageError) as caught:
        check_leakage({"train": train, "test": test})
    assert caught.value.message == "1 id, 1 patient, 1 study and 1 slide are in both `train` and `test`"
    assert caught.value.hint == "split with `split_by_group`"
    report = check_leakage({"train": train, "test": test}, refuse=False)
    assert not report.is_clean
    assert {leak.kind: leak.rows for leak in report.leaks} == {
        "id": (("train", 0), ("test", 0)),
        "patient": (("train", 0), ("train", 3), ("test", 1)),
        "study": (("train", 1), ("test", 2)),
        "slide": (("train", 0), ("test", 2)),
    }
    assert report.rows("test") == (0, 1, 2)
    clean = check_leakage({"train": train, "test": [Sample(id="z", patient="Zoe")]})
    assert clean.is_clean
    assert clean.summary() == "nothing crosses the splits"
    three = check_leakage({"x": train[:1], "y": train[3:], "z": test[1:2]}, refuse=False)
    assert three.summary() == "1 patient is in several of `x`, `y`, `z`"


def test_the_same_picture_is_found_in_every_disguise(tmp_path: Path) -> None:
    image = scene(0)
    train = [saved(tmp_path, f"t{i}.png", scene(i)) for i in range(12)]
    disguises = {
        "same.bmp": (image, {}),
        "jpeg.jpg": (image, {"quality": 40}),
        "small.png": (image.resize((70, 61), Image.Resampling.LANCZOS), {}),
        "large.png": (image.resize((500, 437), Image.Resampling.BICUBIC), {}),
        "bright.png": (image.point(lambda v: min(255, int(v * 0.8) + 30)), {}),
        "soft.png": (image.filter(ImageFilter.GaussianBlur(1.5)), {}),
        "color.png": (image.convert("RGB"), {}),
        "palette.png": (image.convert("P"), {}),
    }
    for name, (disguised, options) in disguises.items():
        other = [saved(tmp_path, "other.png", scene(99)), saved(tmp_path, name, disguised, **options)]
        report = check_leakage({"train": train, "test": other}, refuse=False)
        assert [leak.rows for leak in report.leaks] == [(("train", 0), ("test", 1))], name
        kind = "image" if name == "same.bmp" else "near-duplicate image"
        assert report.leaks[0].kind == kind, name
        assert (report.images, report.unreadable) == (14, 0)
    with pytest.raises(LeakageError, match="1 near-duplicate image is in both") as caught:
        check_leakage({"train": train, "test": other})
    assert "merge_groups_by_duplicates" in str(caught.value.hint)
    assert check_leakage({"train": train, "test": other}, near_duplicates=False).is_clean


@pytest.mark.parametrize("way", list(Image.Transpose))
def test_mirrored_and_turned_copies_are_found(tmp_path: Path, way: Image.Transpose) -> None:
    train = [saved(tmp_path, f"t{i}.png", scene(i)) for i in range(12)]
    copy = scene(3).transpose(way).resize((90, 80), Image.Resampling.BICUBIC)
    other = [saved(tmp_path, "other.png", scene(99)), saved(tmp_path, "copy.jpg", copy, quality=80)]
    report = check_leakage({"train": train, "test": other}, refuse=False)
    assert [leak.rows for leak in report.leaks] == [(("train", 3), ("test", 1))]
    assert report.leaks[0].kind == "near-duplicate image"
    assert check_leakage({"train": train, "test": other}, turned=False).is_clean
    assert merge_groups_by_duplicates([train[3], *other])[2] == merge_groups_by_duplicates([train[3], *other])[0]


def test_different_pictures_are_not_confused(tmp_path: Path) -> None:
    samples = [saved(tmp_path, f"{i}.png", scene(i)) for i in range(60)]
    flat = [saved(tmp_path, f"flat{i}.png", Image.new("L", (50, 50), 100 + i)) for i in range(4)]
    report = check_leakage({"a": [*samples[:30], *flat[:2]], "b": [*samples[30:], *flat[2:]]})
    assert report.images == 64


def test_unreadable_images_are_counted(tmp_path: Path) -> None:
    good, bad = saved(tmp_path, "a.png", scene(1)), saved(tmp_path, "b.png", scene(2))
    (tmp_path / "b.png").write_bytes(b"torn")
    report = check_leakage({"a": [good, Sample(id="text", text="x")], "b": [bad]})
    assert (report.images, report.unreadable) == (1, 1)
    assert report.summary() == "nothing crosses the splits (1 images could not be read)"


def test_groups_that_share_pictures_are_merged(tmp_path: Path) -> None:
    pictures = [scene(i) for i in (0, 1, 1, 2, 2, 3)]
    patients = ["d", "b", "c", "c", "a", "e"]
    samples = [
        Sample(id=str(i), image=saved(tmp_path, f"{i}.png", picture).image, patient=patient)
        for i, (picture, patient) in enumerate(zip(pictures, patients, strict=True))
    ]
    samples.append(Sample(id="text", text="no image", patient="a"))
    assert merge_groups_by_duplicates(samples) == ["d", "a", "a", "a", "a", "e", "a"]
    soft = saved(tmp_path, "soft.png", pictures[0].filter(ImageFilter.GaussianBlur(1)))
    near = [*samples, Sample(id="soft", image=soft.image, patient="z")]
    assert merge_groups_by_duplicates(near)[-1] == "d"
    assert merge_groups_by_duplicates(near, near=False)[-1] == "z"


def test_blocks_do_not_change_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [saved(tmp_path, f"{i}.png", scene(i % 5)) for i in range(17)]
    prints = fingerprint_images(samples)
    whole = list(find_duplicates(prints))
    assert len(whole) == 2 * 6 + 3 * 3  # two pictures four times, three pictures three times
    monkeypatch.setattr("chiasm.data.duplicates._BLOCK", 4)
    assert sorted(find_duplicates(prints)) == sorted(whole)
    assert list(find_duplicates(fingerprint_images([]))) == []


def real_table(name: str) -> Path:
    folder = os.environ.get("CHIASM_DATA")
    if not folder:
        pytest.skip("CHIASM_DATA does not name the folder of the real data")
    path = Path(folder) / name / "metadata.csv"
    if not path.is_file():
        pytest.skip(f"`{name}` is not in CHIASM_DATA")
    return path


def test_persons_with_two_ids_are_found_in_real_films() -> None:
    """The source names two persons with two ids each; four more films lie under two ids, or nearly so."""
    data = load_table(real_table("covid_chestxray"))
    merged = merge_groups_by_duplicates(data.samples)
    assert len(set(data.groups)) == 197
    assert len(set(merged)) < 197
    by_patient = dict(zip(data.groups, merged, strict=True))
    assert by_patient["285"] == by_patient["339"]
    assert by_patient["287"] == by_patient["340"]
    names = split_by_group(merged, {"train": 0.8, "test": 0.2}, seed=0)
    sides = {side: [s for s, n in zip(data, names, strict=True) if n == side] for side in ("train", "test")}
    assert check_leakage(sides).images == 378


def test_real_films_of_different_persons_are_not_confused() -> None:
    data = load_table(real_table("nih_cxr14_sample"))
    assert merge_groups_by_duplicates(data.samples) == list(data.groups)
