"""The face of a loaded encoder: images and texts in, vectors out, with everything needed to use them rightly.

In: a built model and its :class:`EncoderConfig`. Out: :class:`Encoder`, which ``chiasm.load`` returns. Everything runs
in inference mode and in eval mode; nothing is kept between calls but the digest of the weights, so one encoder may
serve many threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chiasm.encoders.weights import structure_key, weights_digest, weights_key
from chiasm.errors import ConfigError, InputError
from chiasm.types import Embeddings, Modality, Preprocess, Space, check_same_space

__all__ = ["Encoder", "weights_digest", "weights_key"]

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.data.tokenizers import Tokenizer
    from chiasm.data.tokens import Tokens
    from chiasm.encoders.base import EncoderConfig
    from chiasm.encoders.dual import DualEncoder
    from chiasm.encoders.inference.engine import Engine
    from chiasm.encoders.inference.gate import PrecisionCheck
    from chiasm.encoders.inference.gpu import GpuEngine
    from chiasm.encoders.precision import Precision

    Item = str | Path | Image


class Encoder:
    """An image tower and a text tower that share a space, with their preprocessing, tokenizer and scale.

    Args:
        model: The module; it is switched to eval mode, also later if somebody switched it back.
        config: What the model was built from.
        name: Name of the encoder; part of its space.
        tokenizer: None: made from ``config.tokenizer``.
        precision: Arithmetic of :meth:`encode_image`, :meth:`encode_text` and :meth:`encode`: ``fp32``, ``bf16``
            (mixed), ``int8`` or ``auto`` (``encoders.precision``). Whoever uses ``model`` itself gets float32.

    Raises:
        ConfigError: A tokenizer with more ids or a longer context than the text tower has; an unknown precision.

    Attributes:
        model: The underlying ``nn.Module``.
        config: Its declaration.
        name: Its name.
    """

    def __init__(
        self,
        model: DualEncoder,
        config: EncoderConfig,
        *,
        name: str,
        tokenizer: Tokenizer | None = None,
        precision: str = "fp32",
    ) -> None:
        self.model = model.eval()
        self.config = config
        self.name = name
        self._tokenizer = None if tokenizer is None else _checked_tokenizer(tokenizer, config)
        self._vocabulary_read = False
        self._preprocess: Callable[[Image], Tensor] | None = None
        self._digest: tuple[object, str] | None = None
        self._wanted = precision
        self._precision: tuple[str, Precision] | None = None
        self._engine: tuple[object, Engine | GpuEngine] | None = None
        self._static_batch: int | None = None
        self._engine_lock = Lock()
        self._batched: set[Modality] = set()
        if precision not in ("fp32", "auto"):
            self.precision  # noqa: B018  an unknown one is told now

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, dim={self.dim}, device={str(self.device)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or another process gets: everything but the fast form, which it makes itself."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_engine", "_engine_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _engine=None, _engine_lock=Lock())

    @property
    def dim(self) -> int:
        """Dimensions of the joint space; of an ensemble those of all its members."""
        return self.config.dim

    @property
    def members(self) -> int:
        """How many models stand side by side in a vector: 1, unless this is an ensemble."""
        return self.config.members or 1

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.device

    @property
    def preprocess_spec(self) -> Preprocess:
        """The declaration behind :attr:`preprocess`."""
        return self.config.preprocess

    @property
    def preprocess(self) -> Callable[[Image], Tensor]:
        """The function PIL image -> float32 tensor (3, height, width)."""
        if self._preprocess is None:
            from chiasm.data.transforms import image_transform

            self._preprocess = image_transform(self.config.preprocess)
        return self._preprocess

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the text tower; ``InputError`` where there is no text side."""
        if not self.config.has_text:
            raise InputError(
                f"`{self.name}` has no text side, so it has no tokenizer",
                hint="`chiasm models` lists the encoders that have both sides",
            )
        if self._tokenizer is None:
            from chiasm.data.tokenizers import make_tokenizer

            self._tokenizer = _checked_tokenizer(make_tokenizer(self.config.tokenizer), self.config)
        read = getattr(getattr(self.model.text, "transformer", None), "read_vocabulary", None)
        if read is not None and not self._vocabulary_read:
            read(self._tokenizer)
            self._vocabulary_read = True
        return self._tokenizer

    @property
    def logit_scale(self) -> float | None:
        """The multiplier of cosines, about 100 after training: NOT its logarithm, which the state dict holds.

        None for a model that was published without one.
        """
        log_scale = self.model.logit_scale
        return None if log_scale is None else float(log_scale.detach().double().exp())

    @property
    def logit_bias(self) -> float | None:
        """What SigLIP adds after the scale; None for a model without."""
        bias = self.model.logit_bias
        return None if bias is None else float(bias.detach())

    @property
    def space(self) -> Space:
        """Identity of the embedding space; it changes when any weight changes, also in place."""
        key = weights_key(self.model)
        if self._digest is None or self._digest[0] != key:
            self._digest = (key, weights_digest(self.model.state_dict()))
        return Space(self.name, self._digest[1], self.config.preprocess.digest, self.dim)

    @property
    def precision(self) -> Precision:
        """The arithmetic in use: ``fp32``, ``bf16`` or ``int8``."""
        if self._wanted == "fp32":
            return "fp32"
        place = self.device.type  # the model may be shared, and moved by another encoder
        if self._precision is None or self._precision[0] != place:
            from chiasm.encoders.precision import resolve_precision

            self._precision = (place, resolve_precision(self._wanted, self.device))
        return self._precision[1]

    def with_precision(self, precision: str) -> Encoder:
        """Return an encoder of the same weights (shared, not copied) that computes in another precision."""
        other = Encoder(self.model, self.config, name=self.name, tokenizer=self._tokenizer, precision=precision)
        other._preprocess, other._digest, other._vocabulary_read = (
            self._preprocess, self._digest, self._vocabulary_read,
        )  # fmt: skip
        return other

    def prepare(self, *, static_batch: int | None = None) -> Self:
        """Lay out the weights for speed now, not at the first batch; return self.

        Args:
            static_batch: On a GPU: record a CUDA graph of that many images, into which every batch is cut (see
                ``encoders.inference.gpu``); None: as before, at first no graph. On a CPU nothing changes.
        """
        if static_batch is not None and static_batch != self._static_batch:
            self._static_batch, self._engine = static_batch, None
        self._fast_form()
        return self

    def one_run(self) -> AbstractContextManager[None]:
        """Calls that belong together: that int8 was checked on too few images is said at their end, not of the first."""
        if self.precision != "int8":
            return nullcontext()
        engine: Any = self._fast_form()
        run: AbstractContextManager[None] = engine.gate.one_run()
        return run

    @property
    def precision_check(self) -> PrecisionCheck | None:
        """How far int8 was from float32 on the images seen so far; None before the first, and of other precisions."""
        made = self._engine
        gate = None if made is None else made[1].gate
        return None if gate is None or not gate.check.images else gate.check

    def check_precision(self, images: Tensor | Sequence[Image | Path]) -> PrecisionCheck:
        """Compare int8 with float32 on images of one's own, before any vector is used.

        Args:
            images: At least 64 for a full check: preprocessed (n, 3, size, size), or pictures and paths.

        Raises:
            PrecisionRefused: int8 is too far from float32 on them.
            ConfigError: The encoder's precision is another.
            InputError: No images.
        """
        if self.precision != "int8":
            raise ConfigError(f"only int8 is checked on images, the precision is `{self.precision}`")
        if not len(images):
            raise InputError("int8 is checked on images, got none", hint="give 64 or more of your own")
        for i in range(0, len(images), 8):
            some = images[i : i + 8]
            if not isinstance(some, Tensor):
                for item in some:
                    _check_image_item(item)
            pixels = some if isinstance(some, Tensor) else torch.stack([self.preprocess(_open(x)) for x in some])
            with torch.inference_mode():
                engine: Any = self._fast_form()
                engine.encode_image(self._pixels(pixels), warn=False)
            if engine.gate.check.complete:
                break
        check: PrecisionCheck = engine.gate.check
        return check

    def to(self, device: str | torch.device) -> Self:
        """Move the weights and return self; ``auto`` precision is decided anew."""
        self.model.to(device)
        self._engine = self._precision = None
        return self

    def encode_image(self, pixels: Tensor, normalize: bool = False, *, prior: Tensor | None = None) -> Tensor:
        """Return the embeddings of preprocessed images.

        Args:
            pixels: (batch, 3, height, width), as :attr:`preprocess` gives them; one image may lack the batch axis.
            normalize: Whether to scale rows to unit L2 norm.
            prior: The same for an earlier image of each patient, where the model compares two (BioViL-T).

        Returns:
            (batch, dim), on the encoder's device.

        Raises:
            PrecisionRefused: In int8, when it is too far from float32 on the first 64 images.
        """
        pixels = self._pixels(pixels)
        before = None if prior is None else self._pixels(prior)
        with torch.inference_mode():
            if before is not None:
                return self._eval().encode_image(pixels, normalize=normalize, prior=before)
            return self._fast_form("image", single=len(pixels) == 1).encode_image(pixels, normalize=normalize)

    def encode_text(self, tokens: Tensor | Tokens | str | Sequence[str], normalize: bool = False) -> Tensor:
        """Return the embeddings of texts, given as strings, as :class:`Tokens` or as token ids.

        Args:
            tokens: n strings (or one), or ids of shape (n, context). Ids alone are searched for their end.
            normalize: Whether to scale rows to unit L2 norm.

        Returns:
            (n, dim), on the encoder's device.

        Warns:
            TruncationWarning: A string was longer than the context.
        """
        ids, lengths = self._tokens(tokens)
        with torch.inference_mode():
            if len(ids) == 0:
                return torch.zeros(0, self.dim, device=self.device)
            form = self._fast_form("text", single=len(ids) == 1)
            return form.encode_text(ids.to(self.device), lengths, normalize=normalize)

    def patch_features(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Return one vector of the joint space for every patch, for heat maps: (batch, rows, columns, dim).

        See :meth:`DualEncoder.patch_features` for how they are made.
        """
        pixels = self._pixels(pixels)
        with torch.inference_mode():
            return self._eval().patch_features(pixels, normalize=normalize)

    def encode(
        self,
        inputs: Item | Sequence[Item],
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        precision: Literal["float32", "float16"] = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = False,
    ) -> NDArray[Any] | Tensor | list[Tensor]:
        """Return the embeddings of texts and images, mixed at will, in the order given.

        The arguments are those of sentence-transformers, by name. A ``str`` is a text, also when it looks like a path;
        an image is a ``PIL.Image`` or a ``pathlib.Path``. Texts are batched by length, which does not change them
        (but with MedCLIP: its vectors depend on the longest text of a batch).

        Args:
            inputs: One item, or a sequence of items.
            batch_size: Items per forward pass.
            show_progress_bar: Draw a bar on standard error.
            precision: Type of the result.
            convert_to_numpy: Return an array; otherwise a list of tensors, one per item.
            convert_to_tensor: Return one tensor, whatever ``convert_to_numpy`` says.
            device: Move the encoder there first; None: leave it.
            normalize_embeddings: Scale rows to unit L2 norm.

        Returns:
            (n, dim), or (dim,) for a single item; (0, dim) for an empty sequence.

        Raises:
            InputError: An item that is neither text nor image, or an unknown precision.
            FileFormatError: A path that holds no readable image.

        References:
            sentence-transformers, ``SentenceTransformer.encode``, https://sbert.net. Deviation: int8 and binary
            precision are not offered.
        """
        if precision not in ("float32", "float16"):
            raise InputError(f"precision `{precision}` is not offered", hint="use `float32` or `float16`")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        single = isinstance(inputs, (str, os.PathLike)) or not isinstance(inputs, Sequence)
        items: list[Any] = [inputs] if single else list(inputs)  # type: ignore[arg-type]
        if device is not None and torch.device(device) != self.device:
            self.to(device)
        rows = self._encode_items(items, batch_size, show_progress_bar is True, normalize_embeddings)
        result = rows.to(torch.float16 if precision == "float16" else torch.float32)
        if single:
            result = result[0]
        if convert_to_tensor:
            return result
        return result.cpu().numpy() if convert_to_numpy else list(result)

    def similarity(
        self, a: Tensor | NDArray[Any] | Embeddings, b: Tensor | NDArray[Any] | Embeddings
    ) -> NDArray[np.float32]:
        """Return the cosines (n, m) of all rows of ``a`` with all rows of ``b``; a zero row gives 0.

        Raises:
            SpaceMismatch: ``Embeddings`` of two spaces, or of a space that is not this encoder's.
        """
        for side in (a, b):
            if isinstance(side, Embeddings):
                check_same_space(side, Embeddings(np.zeros((0, self.dim), np.float32), (), self.space, side.modality))
        return _unit_rows(a) @ _unit_rows(b).T

    def _fast_form(self, side: Modality | None = None, *, single: bool = False) -> DualEncoder | Engine | GpuEngine:
        """Return what encodes: the model itself, or its fast form, made anew when weights have changed.

        Args:
            side: Which side is asked; None: both will be.
            single: Whether the call is of one item. In fp32 such calls go to the model itself until a batch comes on
                their side or :meth:`prepare` is called: whoever asks one question does not wait until all weights are
                laid out anew, and who asks it twice gets the same bits. Both forms agree to the last few.
        """
        model = self._eval()
        with self._engine_lock:
            if single and side not in self._batched and self.precision == "fp32":
                return model
            self._batched.update(("image", "text") if side is None else (side,))
            key = (structure_key(model), weights_key(model))
            if self._engine is None or self._engine[0] != key:
                from chiasm.encoders.inference.engine import make_engine

                self._engine = None  # so that the old layout's memory is free before the new one is made
                self._engine = (key, make_engine(model, self.precision, static_batch=self._static_batch))
            return self._engine[1]

    def _eval(self) -> DualEncoder:
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        return self.model

    def _pixels(self, pixels: Tensor) -> Tensor:
        if pixels.ndim == 3:
            pixels = pixels[None]
        # Waited for: whoever gave page-locked pixels may fill them anew as soon as this call has returned.
        return pixels.to(self.device, self.model.dtype if pixels.is_floating_point() else None)

    def _tokens(self, tokens: Tensor | Tokens | str | Sequence[str]) -> tuple[Tensor, Tensor | None]:
        if isinstance(tokens, Tensor):
            return (tokens[None] if tokens.ndim == 1 else tokens), None
        from chiasm.data.tokens import Tokens, warn_if_cut

        if isinstance(tokens, Tokens):
            return tokens.ids, tokens.lengths
        texts = [tokens] if isinstance(tokens, str) else list(tokens)
        if not texts:
            return torch.zeros(0, 1, dtype=torch.long), None
        encoded = warn_if_cut(self.tokenizer.encode(texts))
        return encoded.ids, encoded.lengths

    def _encode_items(self, items: list[Any], batch_size: int, show: bool, normalize: bool) -> Tensor:
        from chiasm.data.tokens import warn_if_cut
        from chiasm.progress import Progress, RichProgress, SilentProgress

        text_rows = [i for i, item in enumerate(items) if isinstance(item, str)]
        image_rows = [i for i, item in enumerate(items) if not isinstance(item, str)]
        for i in image_rows:
            _check_image_item(items[i])
        vectors = torch.zeros(len(items), self.dim, device=self.device)
        progress: Progress = RichProgress() if show else SilentProgress()
        progress.start(len(items), "embedding")
        try:
            if text_rows:
                tokens = warn_if_cut(self.tokenizer.encode([items[i] for i in text_rows]))
                order = torch.argsort(tokens.lengths, stable=True)
                for start in range(0, len(order), batch_size):
                    part = order[start : start + batch_size]
                    with torch.inference_mode():
                        ids = tokens.ids[part].to(self.device)
                        form = self._fast_form("text", single=len(items) == 1)
                        found = form.encode_text(ids, tokens.lengths[part], normalize=normalize)
                    vectors[[text_rows[int(i)] for i in part]] = found.to(vectors.dtype)
                    progress.advance(len(part))
            with self.one_run() if image_rows else nullcontext():
                for start in range(0, len(image_rows), batch_size):
                    rows = image_rows[start : start + batch_size]
                    pixels = torch.stack([self.preprocess(_open(items[i])) for i in rows])
                    vectors[rows] = self.encode_image(pixels, normalize=normalize).to(vectors.dtype)
                    progress.advance(len(rows))
        finally:
            progress.finish()
        return vectors


def _checked_tokenizer(tokenizer: Tokenizer, config: EncoderConfig) -> Tokenizer:
    text = config.text
    if tokenizer.context_length > text.context_length:
        raise ConfigError(
            f"the tokenizer's context of {tokenizer.context_length} tokens is longer than the text tower's "
            f"{text.context_length}",
            hint="set `tokenizer.context_length` to `text.context_length`",
        )
    if text.is_native and tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the text tower embeds {text.vocab_size}",
            hint="set `text.vocab_size` to the tokenizer's size",
        )
    return tokenizer


def _check_image_item(item: object) -> None:
    from PIL.Image import Image

    if not isinstance(item, (Image, os.PathLike)):
        raise InputError(
            f"cannot embed a {type(item).__name__}",
            hint="give a text (str), a PIL image or a pathlib.Path to an image",
        )


def _open(item: Image | Path) -> Image:
    from chiasm.io.image import open_image

    return open_image(Path(item)) if isinstance(item, os.PathLike) else item


def _unit_rows(values: Tensor | NDArray[Any] | Embeddings) -> NDArray[np.float32]:
    if isinstance(values, Embeddings):
        values = values.vectors
    array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float32)
    rows = np.atleast_2d(array)
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
