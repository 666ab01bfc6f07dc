"""The nearest terms of an image and of a region of it, beside reference images.

Comes in: an encoder, an image, a vocabulary, perhaps a box and reference images. Goes out: lists of terms
(:mod:`chiasm.tasks.terms`). For a region the reference is the same place of the reference images, made in the same way:
a covered or cropped picture is unusual in itself, and only the like can be compared. Reference images whose crop misses
the place are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.tasks.terms import NearestTerms, RankBy, load_vocabulary, nearest_terms
from chiasm.types import Box, Embeddings, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder
    from chiasm.explain.regions import RegionMethod
    from chiasm.progress import Progress


def region_terms(
    encoder: Encoder,
    image: Image,
    vocabulary: str | Path,
    *,
    region: Box | None = None,
    how: RegionMethod = "cover",
    reference: Sequence[Sample] | None = None,
    own: Path | None = None,
    k: int = 10,
    rank_by: RankBy | None = None,
    progress: Progress | None = None,
) -> list[tuple[str, NearestTerms]]:
    """Return what each list is about (``whole image``, ``region``) and the nearest terms.

    Args:
        encoder: Embeds images and words.
        image: Of any size and mode.
        vocabulary: Name of a built-in vocabulary, or a file.
        region: In pixels of the image; None: the whole image only.
        how: How a region becomes a vector.
        reference: Ordinary images with their patients; at least 20 of others than the image's.
        own: The image's file: where the reference holds it or a copy, its patient is left out.
        k: Terms of each list.
        rank_by: As :func:`chiasm.tasks.terms.nearest_terms`.
        progress: Told while the reference is embedded.

    Raises:
        InputError: As :func:`chiasm.tasks.terms.nearest_terms` and :func:`chiasm.explain.regions.embed_regions`.
    """
    from chiasm.embed import embed_images, embed_texts
    from chiasm.explain.regions import embed_regions, scale_box, sees_region

    words = load_vocabulary(vocabulary)
    terms = embed_texts(encoder, words.terms)
    identity, patient = _identity(own, reference)
    query = replace(embed_images(encoder, [image]), ids=(identity,), patients=(patient,))
    null = None if reference is None else embed_images(encoder, list(reference), progress=progress)
    options = {"vocabulary": words, "k": k, "rank_by": rank_by}
    found = [("whole image", nearest_terms(query, terms, null, **options)[0])]  # type: ignore[arg-type]
    if region is not None:
        place = embed_regions(encoder, [image], [region], how=how, ids=[identity], patients=[patient])
        same: Embeddings | None = None
        if reference is not None:
            all_of = [(sample, _open(sample)) for sample in reference]
            placed = [(sample, picture, scale_box(region, image.size, picture.size)) for sample, picture in all_of]
            kept = [row for row in placed if how == "crop" or sees_region(encoder, row[1].size, row[2])]
            ids, patients = [s.id for s, _, _ in kept], [s.patient for s, _, _ in kept]
            if kept:
                pictures, boxes = [p for _, p, _ in kept], [b for _, _, b in kept]
                same = embed_regions(encoder, pictures, boxes, how=how, ids=ids, patients=patients)
        found.append(("region", nearest_terms(place, terms, same, **options)[0]))  # type: ignore[arg-type]
    return found


def _identity(own: Path | None, reference: Sequence[Sample] | None) -> tuple[str, str | None]:
    """Return the id and patient of the image among the reference, where it is one of them."""
    for sample in reference or ():
        if own is not None and sample.image is not None and _is_same(sample.image, own):
            return sample.id, sample.patient
    return "the image", None


def _is_same(first: Path, second: Path) -> bool:
    """Return whether two paths lead to the same bytes; an image inside an archive has no bytes of its own to compare."""
    if not first.is_file() or not second.is_file():
        return False
    if first.samefile(second):
        return True
    return first.stat().st_size == second.stat().st_size and first.read_bytes() == second.read_bytes()


def _open(sample: Sample) -> Image:
    from chiasm.datasets.images import open_sample_image

    return open_sample_image(sample)
