"""A made-up problem on which text is privileged: noisy image labels, clean meaning only in unpaired reports.

Comes in: :class:`SyntheticConfig` and a seed. Goes out: a :class:`Problem` of features and the texts of all arms.

A latent variable gives the image's features, the retriever's view of the image and the embeddings of reports of other
patients. Labels of training and validation images are redrawn at a rate; pairing never sees them, so what it brings is
clean. Test labels are clean. With clean training labels there is nothing that text could add, and it does not.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.config import to_mapping
from chiasm.distill.problem import Problem, Rows, Targets
from chiasm.distill.recipe import SyntheticConfig
from chiasm.distill.targets import ReportIds, TextSources, make_targets
from chiasm.tasks.pairing import pair
from chiasm.types import Embeddings, Space, digest_of

CODE = "1"
Array = NDArray[np.float64]


def make_synthetic(config: SyntheticConfig, *, seed: int) -> tuple[Problem, TextSources]:
    """Draw a problem and its texts.

    ``own`` is an image's own report; ``prompts`` are the directions of the class means, paired as reports are;
    ``label`` is the prompt of the label as it was trained on.

    Args:
        config: Sizes and noises.
        seed: Decides everything.
    """
    rng = np.random.default_rng([seed, 61])
    k, n = config.latent, config.train
    means = _unit(rng.standard_normal((config.classes, k))) * config.separation
    to_image = rng.standard_normal((k, config.width)) / np.sqrt(k)
    to_text = rng.standard_normal((k, config.text_dim)) / np.sqrt(k)
    stain = np.random.default_rng([seed, 62])  # of its own: without a nuisance everything else stays as it is
    to_stain = stain.standard_normal((config.nuisance, config.width)) / np.sqrt(max(1, config.nuisance))

    def latent(count: int) -> tuple[NDArray[np.int64], Array]:
        labels = rng.integers(config.classes, size=count)
        return labels, means[labels] + config.within * rng.standard_normal((count, k))

    def view(of: Array, noise: float) -> Array:
        return _unit(of @ to_text + noise * rng.standard_normal((len(of), config.text_dim)))

    reports = view(latent(config.reports)[1], config.report_noise)
    prompts = _unit(means @ to_text)
    sides: dict[str, Rows] = {}
    texts: dict[str, dict[str, Array]] = {}
    found: dict[str, NDArray[np.int64]] = {}
    for name, count in (("train", n), ("validation", max(2, n // 2)), ("test", config.test)):
        labels, z = latent(count)
        features = z @ to_image + config.image_noise * rng.standard_normal((count, config.width))
        features += config.nuisance_scale * stain.standard_normal((count, config.nuisance)) @ to_stain
        given = labels if name == "test" else _redrawn(labels, config, rng)
        ids = tuple(f"{name}-{i}" for i in range(count))
        sides[name] = Rows(ids, ids, given.astype(np.int64), features.astype(np.float32))
        if name == "test":
            continue
        seen, own = view(z, config.clip_noise), view(z, config.report_noise)
        found[name] = nearest(seen, reports)
        texts[name] = {
            "pairs": reports[found[name]],
            "own": own,
            "prompts": prompts[nearest(seen, prompts)],
            "label": prompts[given],
        }
    problem = Problem(
        classes=tuple(f"class_{c}" for c in range(config.classes)),
        train=sides["train"],
        validation=sides["validation"],
        test=sides["test"],
        digest=digest_of(["synthetic", CODE, to_mapping(config), seed]),
        facts={"synthetic": to_mapping(config)},
    )
    targets: dict[str, Targets] = {
        kind: make_targets(texts["train"][kind], texts["validation"][kind]) for kind in texts["train"]
    }
    return problem, TextSources(targets, ReportIds(found["train"][:, None]), ReportIds(found["validation"][:, None]))


def nearest(views: Array, texts: Array) -> NDArray[np.int64]:
    """Return the row of the most similar text (m, dim) for each view (n, dim), as ``chiasm pairing`` finds it."""
    space = Space("synthetic", digest_of("synthetic"), "none", views.shape[1])

    def embeddings(rows: Array, modality: Literal["image", "text"]) -> Embeddings:
        return Embeddings(rows.astype(np.float32), tuple(map(str, range(len(rows)))), space, modality)

    found = pair(embeddings(views, "image"), embeddings(texts, "text"), report_of=range(len(texts)))
    return found.report_rows[:, 0]


def _unit(rows: Array) -> Array:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _redrawn(labels: NDArray[np.int64], config: SyntheticConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    """Redraw a share of labels uniformly over all classes, so that some stay as they are."""
    chosen = rng.random(len(labels)) < config.flip
    return np.where(chosen, rng.integers(config.classes, size=len(labels)), labels)
