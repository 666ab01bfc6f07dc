"""Few-shot classifiers that start from texts: Tip-Adapter, its fine-tuned form, CLIP-Adapter, a text-initialised probe.

In: image embeddings and a :class:`~chiasm.tasks.zero_shot.TextClassifier` of the same space, whose labels are the classes.
Out: estimators as in ``few_shot``. Gradients are written out, so no torch is needed.

With ``f`` a unit image vector, ``t_k`` the unit text direction of class k and ``s`` the model's logit scale, all methods
begin at the zero-shot logits ``s f·t_k``. Grids hold the value at which a method *is* zero-shot classification, so
validation rows can send it back there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from chiasm.errors import InputError
from chiasm.tasks.few_shot import Codes, Floats, ZeroShotReference, best_of, class_weights, quality
from chiasm.tasks.zero_shot import TextClassifier, softmax

#: Weight of the cache against the texts; 0 is zero-shot.
ALPHAS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
#: Sharpness of the cache.
BETAS = (0.5, 1.0, 2.0, 4.0, 5.5, 8.0, 16.0, 32.0)
#: Share of the adapted feature of CLIP-Adapter; 0 is zero-shot.
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
#: Strengths of the pull towards zero-shot, weak ones last.
PENALTIES = tuple(10.0**e for e in (2, 1, 0.5, 0, -0.5, -1, -1.5, -2, -2.5, -3, -4))


class TipAdapter(ZeroShotReference):
    """Training-free Tip-Adapter (Zhang et al. 2022, https://arxiv.org/abs/2207.09519, equations 3 to 6).

    ``logits = s f Wᵀ + α exp(-β (1 - f Fᵀ)) L``: F holds the vectors of the shots, L their classes one-hot, W the texts.

    Deviations: α and β are searched on a geometric grid on validation patients (published: 200 × 20 values on the
    validation set; pass them as ``alphas`` and ``betas``); α and β given are used as they are. ``s`` is the model's logit
    scale (published: 100). Where classes have unequal numbers of rows, L is scaled so that every class weighs alike (no
    change with k shots each). Shots are not averaged over augmented views: a task sees vectors only.

    Args:
        texts: Of the classes.
        alpha: Weight of the cache; None: chosen.
        beta: Sharpness; None: chosen.
        alphas: Grid of α.
        betas: Grid of β.
        logit_scale: As for zero-shot.
        seed: Of the patients that are held back where no validation rows are given.

    Attributes:
        keys_: F, shape (shots, dim).
        values_: L, shape (shots, classes).
    """

    def __init__(
        self,
        texts: TextClassifier,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        alphas: Iterable[float] = ALPHAS,
        betas: Iterable[float] = BETAS,
        logit_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(texts, logit_scale=logit_scale)
        self.alpha = alpha
        self.beta = beta
        self.alphas = alphas
        self.betas = betas
        self.seed = seed

    def _open_choices(self) -> bool:
        return self.alpha is None or self.beta is None

    def _given(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta}

    def _search(self, x: Floats, y: Codes, x_held: Floats, y_held: Codes) -> dict[str, Any]:
        chosen, _ = self._search_cache(x, self._values(y), x_held, y_held)
        return chosen

    def _fit_with(self, x: Floats, y: Codes, chosen: dict[str, Any]) -> None:
        self.keys_, self.values_ = x, self._values(y)

    def _logits(self, x: Floats) -> Floats:
        cache = cache_logits(x, self.keys_, self.values_, beta=self.chosen_["beta"])
        logits: Floats = super()._logits(x) + self.chosen_["alpha"] * cache
        return logits

    def _values(self, y: Codes) -> Floats:
        values = np.eye(len(self.classes_))[y]
        scaled: Floats = values * (len(y) / (len(self.classes_) * values.sum(axis=0)))
        return scaled

    def _search_cache(
        self, keys: Floats, values: Floats, x_held: Floats, y_held: Codes
    ) -> tuple[dict[str, Any], tuple[float, float]]:
        """Return α and β that do best on held-back rows, and how well; among equals the smaller α, then β."""
        alphas = sorted([self.alpha] if self.alpha is not None else [float(a) for a in self.alphas])
        betas = sorted([self.beta] if self.beta is not None else [float(b) for b in self.betas])
        if not alphas or not betas:
            raise InputError("the grids of α and β are empty")
        base = ZeroShotReference._logits(self, x_held)
        pairs, found = [], []
        caches = {b: cache_logits(x_held, keys, values, beta=b) for b in betas}
        for a in alphas:
            for b in betas:
                pairs.append({"alpha": a, "beta": b})
                found.append(quality(base + a * caches[b], y_held))
        place = best_of(found)
        return pairs[place], found[place]


class TipAdapterF(TipAdapter):
    """Fine-tuned Tip-Adapter: the keys F are trained by cross-entropy, values and texts stay (Zhang et al. 2022, 3.3).

    AdamW on F, cosine schedule, full batches, each class weighing alike. α and β are first searched as for
    :class:`TipAdapter`, stay fixed while F is trained and are searched again with the trained F. *The step is chosen on
    validation patients*, step 0 included; the published code reports the best epoch of the test set
    (gaopengcuhk/Tip-Adapter, issue 11).

    Deviations, beside this and those of :class:`TipAdapter`: steps instead of 20 epochs of random crops in batches of
    256; the training starts with the searched α and β (published: 1 and 5.5), α at least 1 so that F has a gradient.

    Args:
        texts: As :class:`TipAdapter`.
        alpha: As :class:`TipAdapter`.
        beta: As :class:`TipAdapter`.
        alphas: As :class:`TipAdapter`.
        betas: As :class:`TipAdapter`.
        steps: Of the optimiser; without any choice open all of them are made.
        learning_rate: Of AdamW (published: 0.001).
        weight_decay: Of AdamW (published: torch's 0.01).
        logit_scale: As for zero-shot.
        seed: As :class:`TipAdapter`.
    """

    def __init__(
        self,
        texts: TextClassifier,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        alphas: Iterable[float] = ALPHAS,
        betas: Iterable[float] = BETAS,
        steps: int = 60,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        logit_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(texts, alpha=alpha, beta=beta, alphas=alphas, betas=betas, logit_scale=logit_scale, seed=seed)
        self.steps = steps
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def _given(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "beta": self.beta,
            "step": self.steps,
            "train_alpha": self.alpha,
            "train_beta": self.beta,
        }

    def _search(self, x: Floats, y: Codes, x_held: Floats, y_held: Codes) -> dict[str, Any]:
        values = self._values(y)
        start, first = self._search_cache(x, values, x_held, y_held)
        fixed = {"train_alpha": max(start["alpha"], 1.0), "train_beta": start["beta"]}
        found, chosen = [first], [start | {"step": 0}]

        def look(step: int, keys: Floats) -> None:
            if step % 5 == 0 or step == self.steps:
                best, how_good = self._search_cache(keys, values, x_held, y_held)
                found.append(how_good)
                chosen.append(best | {"step": step})

        self._train(x, y, values, fixed, self.steps, look)
        return chosen[best_of(found)] | fixed

    def _fit_with(self, x: Floats, y: Codes, chosen: dict[str, Any]) -> None:
        values = self._values(y)
        self.keys_ = self._train(x, y, values, chosen, chosen["step"], None)
        self.values_ = values

    def _train(
        self,
        x: Floats,
        y: Codes,
        values: Floats,
        fixed: dict[str, Any],
        steps: int,
        look: Callable[[int, Floats], None] | None,
    ) -> Floats:
        """Return the keys after some steps of a schedule that is always ``self.steps`` long."""
        base, weights = ZeroShotReference._logits(self, x), class_weights(y, len(self.classes_))
        alpha, beta = fixed["train_alpha"], fixed["train_beta"]
        optimiser = AdamW((x.shape,), rate=self.learning_rate, decay=self.weight_decay, steps=self.steps)
        keys = x.copy()
        for step in range(1, steps + 1):
            _, gradient = cache_loss(x, y, keys, values, base, alpha=alpha, beta=beta, weights=weights)
            (keys,) = optimiser.update((keys,), (gradient,))
            if look is not None:
                look(step, keys)
        return keys


class CLIPAdapter(ZeroShotReference):
    """CLIP-Adapter on image features (Gao et al. 2021, https://arxiv.org/abs/2110.04544, equations 4 and 6).

    ``f* = ratio · ReLU(ReLU(f W₁) W₂) + (1 - ratio) · f``, of unit norm again; logits ``s f*·t_k``. W₁ narrows the vector
    by ``reduction`` (published: 4), nothing has a bias. Ratio and step are chosen on validation patients; ratio 0 is
    zero-shot.

    Deviations: no adapter on the texts (the paper found it worse); AdamW with full batches and a cosine schedule
    (published: Adam at 1e-5, batches of 32, augmented views); every class weighs alike.

    Args:
        texts: Of the classes.
        ratio: Share of the adapted feature, in [0, 1]; None: chosen from ``ratios``.
        ratios: Grid; the published one by default.
        reduction: Divisor of the bottleneck's width.
        steps: Of the optimiser; with ``ratio`` given all of them are made.
        learning_rate: Of AdamW.
        logit_scale: As for zero-shot.
        seed: Of the weights, and of the patients that are held back where no validation rows are given.
    """

    def __init__(
        self,
        texts: TextClassifier,
        *,
        ratio: float | None = None,
        ratios: Iterable[float] = RATIOS,
        reduction: int = 4,
        steps: int = 100,
        learning_rate: float = 1e-2,
        logit_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(texts, logit_scale=logit_scale)
        self.ratio = ratio
        self.ratios = ratios
        self.reduction = reduction
        self.steps = steps
        self.learning_rate = learning_rate
        self.seed = seed

    def _open_choices(self) -> bool:
        return self.ratio is None

    def _given(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "step": self.steps}

    def _search(self, x: Floats, y: Codes, x_held: Floats, y_held: Codes) -> dict[str, Any]:
        ratios = sorted(float(r) for r in self.ratios)
        if not ratios or ratios[0] < 0 or ratios[-1] > 1:
            raise InputError("ratios of CLIP-Adapter must lie in [0, 1]")
        found, chosen = [], []
        for ratio in ratios:

            def look(step: int, layers: tuple[Floats, Floats], ratio: float = ratio) -> None:
                if step % 5 == 0 or step == self.steps:
                    adapted = adapt(x_held, layers, ratio=ratio)[0]
                    found.append(quality(self.scale_ * (adapted @ self.text_vectors_.T), y_held))
                    chosen.append({"ratio": ratio, "step": step})

            if ratio == 0:
                found.append(quality(ZeroShotReference._logits(self, x_held), y_held))
                chosen.append({"ratio": 0.0, "step": 0})
            else:
                self._train(x, y, ratio, self.steps, look)
        return chosen[best_of(found)]

    def _fit_with(self, x: Floats, y: Codes, chosen: dict[str, Any]) -> None:
        self.layers_ = self._train(x, y, chosen["ratio"], chosen["step"], None)

    def _logits(self, x: Floats) -> Floats:
        return super()._logits(adapt(x, self.layers_, ratio=self.chosen_["ratio"])[0])

    def _train(
        self,
        x: Floats,
        y: Codes,
        ratio: float,
        steps: int,
        look: Callable[[int, tuple[Floats, Floats]], None] | None,
    ) -> tuple[Floats, Floats]:
        random = np.random.default_rng(self.seed)
        width = max(1, x.shape[1] // self.reduction)
        shapes = ((x.shape[1], width), (width, x.shape[1]))
        one, two = (random.uniform(-1, 1, shape) / math.sqrt(shape[0]) for shape in shapes)
        layers: tuple[Floats, Floats] = (one, two)
        weights = class_weights(y, len(self.classes_))
        optimiser = AdamW(shapes, rate=self.learning_rate, decay=0.01, steps=self.steps)
        for step in range(1, steps + 1):
            _, gradients = adapter_loss(
                x, y, layers, self.text_vectors_, ratio=ratio, scale=self.scale_, weights=weights
            )
            one, two = optimiser.update(layers, gradients)
            layers = (one, two)
            if look is not None:
                look(step, layers)
        return layers


class TextProbe(ZeroShotReference):
    """Linear probe whose class weights are ``w_k + α_k t_k``, begun at the texts: after LP++ (Huang et al. 2024).

    Minimises the cross-entropy of ``f·(w_k + α_k t_k)``, every class weighing alike, plus
    ``penalty / 2 · Σ_k (‖w_k‖² + (α_k - s)²)``: with a strong penalty it is zero-shot classification, with a weak one a
    linear probe without intercept. As LP++ (https://arxiv.org/abs/2404.02285, equation 3) it blends visual weights and
    texts class by class.

    Deviations: LP++ starts ``w_k`` at the class means and ``α_k`` at a multiple of their cosine with the texts, and stops
    300 block-wise majorise-minimise steps later, without a validation set. Here the objective is convex, so the start
    does not matter; the penalty, chosen on validation patients, stands for stopping early; L-BFGS solves it.

    Args:
        texts: Of the classes.
        penalty: Pull towards zero-shot; None: chosen from ``penalties``.
        penalties: Grid.
        max_iter: Of L-BFGS.
        logit_scale: As for zero-shot; α_k starts here.
        seed: Of the patients that are held back where no validation rows are given.

    Attributes:
        coef_: ``w_k + α_k t_k``, shape (classes, dim).
        alphas_: ``α_k``, shape (classes,).
    """

    def __init__(
        self,
        texts: TextClassifier,
        *,
        penalty: float | None = None,
        penalties: Iterable[float] = PENALTIES,
        max_iter: int = 500,
        logit_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(texts, logit_scale=logit_scale)
        self.penalty = penalty
        self.penalties = penalties
        self.max_iter = max_iter
        self.seed = seed

    def _open_choices(self) -> bool:
        return self.penalty is None

    def _given(self) -> dict[str, Any]:
        return {"penalty": self.penalty}

    def _search(self, x: Floats, y: Codes, x_held: Floats, y_held: Codes) -> dict[str, Any]:
        penalties = sorted((float(p) for p in self.penalties), reverse=True)
        if not penalties or penalties[-1] <= 0:
            raise InputError("penalties of a text probe must be positive")
        start, found = None, []
        for penalty in penalties:  # from strong to weak: each solution starts the next
            start = self._solve(x, y, penalty, start)
            found.append(quality(x_held @ self._weights(start).T, y_held))
        return {"penalty": penalties[best_of(found)]}

    def _fit_with(self, x: Floats, y: Codes, chosen: dict[str, Any]) -> None:
        solution = self._solve(x, y, chosen["penalty"], None)
        self.coef_, self.alphas_ = self._weights(solution), self.scale_ + solution[:, -1]

    def _logits(self, x: Floats) -> Floats:
        logits: Floats = x @ self.coef_.T
        return logits

    def _weights(self, solution: Floats) -> Floats:
        weights: Floats = solution[:, :-1] + (self.scale_ + solution[:, -1:]) * self.text_vectors_
        return weights

    def _solve(self, x: Floats, y: Codes, penalty: float, start: Floats | None) -> Floats:
        """Return ``w_k`` and ``α_k - s`` side by side, shape (classes, dim + 1)."""
        from scipy.optimize import minimize

        shape = (len(self.classes_), x.shape[1] + 1)
        weights = class_weights(y, len(self.classes_))
        cosines = x @ self.text_vectors_.T
        rows = np.arange(len(y))

        def loss(flat: Floats) -> tuple[float, Floats]:
            found = flat.reshape(shape)
            logits = x @ found[:, :-1].T + (self.scale_ + found[:, -1]) * cosines
            pull, value = softmax_pull(logits, y, rows, weights)
            gradient = np.concatenate([pull.T @ x, (pull * cosines).sum(axis=0)[:, None]], axis=1)
            total = value + penalty / 2 * float((found**2).sum())
            return total, (gradient + penalty * found).ravel()

        first = np.zeros(shape) if start is None else start
        options = {"maxiter": self.max_iter, "gtol": 1e-6, "ftol": 1e-12}
        answer = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options)
        solution: Floats = answer.x.reshape(shape)
        return solution


def cache_logits(x: Floats, keys: Floats, values: Floats, *, beta: float) -> Floats:
    """Return ``exp(-β (1 - x keysᵀ)) values``, shape (rows, classes): equations 4 and 5 of Zhang et al. 2022."""
    logits: Floats = np.exp(-beta * (1.0 - x @ keys.T)) @ values
    return logits


def cache_loss(
    x: Floats,
    y: Codes,
    keys: Floats,
    values: Floats,
    base: Floats,
    *,
    alpha: float,
    beta: float,
    weights: Floats,
) -> tuple[float, Floats]:
    """Return the weighted cross-entropy of Tip-Adapter's logits and its gradient by the keys, shape of ``keys``."""
    affinity = np.exp(-beta * (1.0 - x @ keys.T))
    pull, value = softmax_pull(base + alpha * affinity @ values, y, np.arange(len(y)), weights)
    gradient: Floats = (alpha * beta * affinity * (pull @ values.T)).T @ x
    return value, gradient


def adapt(x: Floats, layers: tuple[Floats, Floats], *, ratio: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Return CLIP-Adapter's unit vectors, their length before that, and what both layers gave."""
    hidden = np.maximum(x @ layers[0], 0.0)
    out = np.maximum(hidden @ layers[1], 0.0)
    mixed = ratio * out + (1 - ratio) * x
    lengths = np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-12)
    return mixed / lengths, lengths, hidden, out


def adapter_loss(
    x: Floats,
    y: Codes,
    layers: tuple[Floats, Floats],
    texts: Floats,
    *,
    ratio: float,
    scale: float,
    weights: Floats,
) -> tuple[float, tuple[Floats, Floats]]:
    """Return the weighted cross-entropy of CLIP-Adapter's logits and its gradients by both layers."""
    unit, lengths, hidden, out = adapt(x, layers, ratio=ratio)
    pull, value = softmax_pull(scale * unit @ texts.T, y, np.arange(len(y)), weights)
    by_unit = scale * pull @ texts
    by_mixed = (by_unit - unit * (by_unit * unit).sum(axis=1, keepdims=True)) / lengths
    by_out = ratio * by_mixed * (out > 0)
    by_hidden = (by_out @ layers[1].T) * (hidden > 0)
    return value, (x.T @ by_hidden, hidden.T @ by_out)


def softmax_pull(logits: Floats, y: Codes, rows: Codes, weights: Floats) -> tuple[Floats, float]:
    """Return the gradient of a weighted cross-entropy by the logits, shape (rows, classes), and its value."""
    probabilities = softmax(logits)
    value = -float((weights * np.log(np.maximum(probabilities[rows, y], 1e-300))).sum())
    pull = probabilities * weights[:, None]
    pull[rows, y] -= weights
    return pull, value


class AdamW:
    """Adam with decoupled weight decay and a cosine schedule to zero, equal to torch's AdamW (Loshchilov, Hutter 2019).

    Args:
        shapes: Of the parameters.
        rate: Of the first step.
        decay: Weight decay.
        steps: Length of the schedule.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], *, rate: float, decay: float, steps: int) -> None:
        self.first = [np.zeros(s) for s in shapes]
        self.second = [np.zeros_like(m) for m in self.first]
        self.rate, self.decay, self.steps, self.step = rate, decay, max(1, steps), 0

    def update(self, parameters: Iterable[Floats], gradients: Iterable[Floats]) -> list[Floats]:
        """Return the parameters after one step."""
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.step += 1
        found = []
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            self.first[i] = 0.9 * self.first[i] + 0.1 * gradient
            self.second[i] = 0.999 * self.second[i] + 0.001 * gradient**2
            mean = self.first[i] / (1 - 0.9**self.step)
            spread = np.sqrt(self.second[i] / (1 - 0.999**self.step)) + 1e-8
            found.append(parameter * (1 - rate * self.decay) - rate * mean / spread)
        return found
