"""May int8 be used here? Asked of the user's own images, on the machine that encodes them.

In: pixels and their int8 vectors, as they are encoded anyway. Out: nothing while int8 agrees with float32 on the first 64
images, and :class:`~chiasm.errors.PrecisionRefused` from the moment on at which it does not. int8 may fail where nobody
expects it: weights with a few very large channels, images unlike those it was tried on, processors whose int8 products
saturate. So nothing is taken from a file or from another machine, and every encoder checks anew, at the cost of 64 images
in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import PrecisionRefused

#: Images of which each is encoded both ways.
NEEDED = 64
#: Largest 1 - cosine of an image's int8 vector with its float32 vector.
ALLOWED = 5e-4
#: The same once the mean float32 direction is taken off both: plain cosines of CLIP's narrow cone flatter.
ALLOWED_CENTRED = 1e-2
_ALONE = 1e-4  # a unit vector nearer to the mean than this has no direction from there


class UncheckedPrecisionWarning(UserWarning):
    """Vectors are given before the check of int8 has seen enough images."""


@dataclass(frozen=True)
class PrecisionCheck:
    """How far int8 was from float32.

    Attributes:
        images: How many were encoded both ways.
        cos: Largest 1 - cosine; 0 before the first image.
        centred: The same around the mean float32 vector; None before the check is complete.
        complete: Whether it saw at least 64 images.
    """

    images: int
    cos: float
    centred: float | None
    complete: bool

    @property
    def passed(self) -> bool:
        """Whether nothing seen so far speaks against int8 (NaN does)."""
        return self.cos <= ALLOWED and (self.centred is None or self.centred <= ALLOWED_CENTRED)

    def to_dict(self) -> dict[str, object]:
        """Return what a report holds: the numbers, what is allowed, and the verdict."""
        return {
            "images": self.images, "cos_error": self.cos, "cos_error_allowed": ALLOWED,
            "centred_cos_error": self.centred, "centred_cos_error_allowed": ALLOWED_CENTRED,
            "complete": self.complete, "passed": self.passed,
        }  # fmt: skip


class Gate:
    """Compares the first images that pass through it; safe to share between threads.

    Args:
        exact: pixels -> float32 vectors (batch, dim).
        needed: Images to see.
    """

    def __init__(self, exact: Callable[[Tensor], Tensor], needed: int = NEEDED) -> None:
        self._exact = exact
        self._needed = needed
        self._lock = Lock()
        self._warned = False
        self._runs = 0
        self._vectors: list[tuple[Tensor, Tensor]] = []
        self._check = PrecisionCheck(0, 0.0, None, False)

    @property
    def check(self) -> PrecisionCheck:
        """What was seen so far."""
        return self._check

    @contextmanager
    def one_run(self) -> Iterator[None]:
        """Calls that belong together: whether they were too few images is asked, and told, at their end."""
        with self._lock:
            self._runs += 1
        try:
            yield
        finally:
            with self._lock:
                self._runs -= 1
        self._tell(self._check)

    def see(self, pixels: Tensor, found: Tensor, *, warn: bool = True) -> None:
        """Compare as many images as are still wanted.

        Args:
            pixels: (batch, 3, size, size).
            found: Their int8 vectors, (batch, dim), not normalised.
            warn: Whether to say, once, that the check is not complete yet; within :meth:`one_run` nothing is said.

        Raises:
            PrecisionRefused: int8 is too far from float32, now or in an earlier call.

        Warns:
            UncheckedPrecisionWarning: Fewer than 64 images were seen so far.
        """
        check = self._check
        if not check.complete and len(pixels):
            with self._lock:
                check = self._look(pixels, found)
            if warn and not self._runs:
                self._tell(check)
        if not check.passed:
            raise _refusal(check)

    def _tell(self, check: PrecisionCheck) -> None:
        if not check.images or check.complete or not check.passed:
            return
        with self._lock:
            told, self._warned = self._warned, True
        if not told:
            warnings.warn(
                f"int8 was compared with float32 on {check.images} images so far, a full check takes {self._needed}",
                UncheckedPrecisionWarning,
                stacklevel=5,
            )

    def _look(self, pixels: Tensor, found: Tensor) -> PrecisionCheck:
        check = self._check
        wanted = self._needed - check.images
        if wanted <= 0 or not check.passed:
            return check
        exact = self._exact(pixels[:wanted]).double()
        some = found[:wanted].double()
        self._vectors.append((exact, some))
        images, centred = check.images + len(exact), None
        if images >= self._needed:
            centred = _centred(torch.cat([e for e, _ in self._vectors]), torch.cat([s for _, s in self._vectors]))
            self._vectors.clear()
        self._check = PrecisionCheck(images, _worse(check.cos, _far(exact, some)), centred, images >= self._needed)
        return self._check


def _far(exact: Tensor, found: Tensor) -> float:
    """Largest 1 - cosine of rows; NaN where a row holds one."""
    return float((1 - F.cosine_similarity(exact, found, dim=1)).max())


def _centred(exact: Tensor, found: Tensor) -> float:
    """Largest 1 - cosine around the mean, of unit vectors: their lengths mean nothing in CLIP."""
    exact, found = F.normalize(exact, dim=1), F.normalize(found, dim=1)
    mean = exact.mean(0)
    apart = (exact - mean).norm(dim=1) > _ALONE
    return _far(exact[apart] - mean, found[apart] - mean) if bool(apart.any()) else 0.0


def _worse(first: float, second: float) -> float:
    return second if math.isnan(second) or second > first else first


def _refusal(check: PrecisionCheck) -> PrecisionRefused:
    around = (
        "" if check.centred is None else f" and {check.centred:.1e} around the mean (allowed {ALLOWED_CENTRED:.0e})"
    )
    return PrecisionRefused(
        f"int8 does not suit this encoder and these images: of {check.images} images the vector that is furthest from "
        f"its float32 vector is off by a 1 - cosine of {check.cos:.1e} (allowed {ALLOWED:.0e}){around}",
        hint="use precision `bf16` or `fp32`",
    )
