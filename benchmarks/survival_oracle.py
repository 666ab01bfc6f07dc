"""How near to the stated hazard of phantoms a risk from embeddings comes: C-index out of fold beside the oracle's.

Each patient is one synthetic chest film with its report; the oracle is the true linear predictor of the hazard that the
times were drawn from. Sources of features: the findings themselves, vectors that hold them in noise, and a model's image,
text and joint embeddings.

    .venv/bin/chiasm demo --out demo --seed 1
    .venv/bin/python benchmarks/survival_oracle.py --model demo/model --patients 1600
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from typing import Any

import numpy as np

import chiasm
from chiasm.data.phantoms import make_chest_phantoms
from chiasm.datasets import open_dataset
from chiasm.metrics.concordance import compare_statistics, harrell_c, harrell_statistic
from chiasm.tasks.survival import cross_validated_risks, survival_data
from chiasm.tasks.survival_models import CoxNet
from chiasm.train.heads import NeuralCox


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--patients", type=int, default=1600)
    parser.add_argument("--neural", action="store_true", help="the neural head, too")
    options = parser.parse_args()
    phantoms = make_chest_phantoms(
        options.patients, seed=77, size_px=128, images_per_patient=(1, 1), first_patient=50_000
    )
    hazard = phantoms.stated_hazard
    with tempfile.TemporaryDirectory() as folder:
        samples = open_dataset(phantoms.save(folder)).samples
        encoder = chiasm.load(options.model)
        image = chiasm.embed_images(encoder, samples, batch_size=64).vectors
        text = chiasm.embed_texts(encoder, samples, batch_size=128).vectors
    days, event = ([s.labels[k] for s in samples] for k in ("survival_days", "event"))
    groups = [s.group for s in samples]
    findings = np.array([[float(s.labels[k] or 0) for k in hazard.coefficients] for s in samples])
    random = np.random.default_rng(0)
    hidden = findings @ random.normal(size=(findings.shape[1], 128)) + random.normal(size=(len(samples), 128))
    truth = np.array([[hazard.linear_predictor(s.labels)] for s in samples])
    oracle = survival_data(truth, groups, days, event).features[:, 0]
    sets = {"findings": findings, "findings in noise": hidden, "image": image, "text": text,
            "image and text": np.concatenate([image, text], axis=1)}  # fmt: skip
    found: list[dict[str, Any]] = []
    for name, features in sets.items():
        data = survival_data(features, groups, days, event)
        plain = CoxNet(free=range(features.shape[1])) if name == "findings" else CoxNet()
        for method, model in {"coxnet": plain, **({"neural": NeuralCox()} if options.neural else {})}.items():
            out = cross_validated_risks(model, data)
            ours, best = (harrell_statistic(data.time, data.event, r, strata=out.fold) for r in (out.risk, oracle))
            found.append({
                "features": name,
                "method": method,
                "c": harrell_c(data.time, data.event, out.risk, strata=out.fold).to_dict(),
                "oracle": harrell_c(data.time, data.event, oracle, strata=out.fold).to_dict(),
                "difference": compare_statistics(ours, best, len(data)).difference.to_dict(),
                "events": data.events,
            })  # fmt: skip
            values = {k: v["value"] for k, v in found[-1].items() if isinstance(v, dict)}
            print(f"{name:18s} {method:7s}", {k: round(v, 3) for k, v in values.items()}, file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
