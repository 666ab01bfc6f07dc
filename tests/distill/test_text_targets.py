"""Whose text each image is taught by: its own where that is asked for, none where no report is near."""

from __future__ import annotations

import numpy as np

from chiasm.distill.experiment import Experiment
from chiasm.tasks.pairing import pair


def test_own_texts_stay_with_their_images_and_weak_pairs_teach_nothing(phantom_recipe, phantom_table, tmp_path):
    data = {
        "source": str(phantom_table),
        "phantoms": None,
        "patients": None,
        "phantom_size": None,
        "phantom_seed": None,
    }
    reports = tmp_path / "reports.txt"
    reports.write_text("gland forming tumour\nfat and stroma\nnecrosis with debris\n")
    pairing = {"reports": str(reports), "phantom_reports": None}
    whole = Experiment(phantom_recipe(data=data, pairing=pairing), cache=tmp_path / "cache")
    setup = whole.prepare(0)
    division, material = setup.division, whole.material
    rows = np.concatenate([division.train, division.validation])
    own = setup.sources.given["own"]
    for vectors, mask, side in (
        (own.train, own.train_mask, division.train),
        (own.validation, own.validation_mask, division.validation),
    ):
        assert mask.all()
        np.testing.assert_allclose(
            (vectors * material.own[side]).sum(1), np.linalg.norm(material.own[side], axis=1), rtol=1e-5
        )
    similarity = pair(whole.retriever.images(np.sort(rows)), material.chunks, report_of=material.report_of).similarity[
        :, 0
    ]
    gate = float(np.median(similarity))
    gated = Experiment(phantom_recipe(data=data, pairing={**pairing, "min_similarity": gate}), cache=tmp_path / "cache")
    pairs = gated.prepare(0).sources.given["pairs"]
    near = dict(zip(np.sort(rows).tolist(), similarity >= np.float32(gate), strict=True))
    assert pairs.train_mask.tolist() == [near[r] for r in division.train.tolist()]
    assert pairs.validation_mask.tolist() == [near[r] for r in division.validation.tolist()]
    assert 0 < pairs.train_mask.mean() < 1
