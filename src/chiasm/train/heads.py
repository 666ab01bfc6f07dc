"""A small network on embeddings that predicts a risk: Cox's partial likelihood, early stopping on held-out patients.

Comes in: features of patients (n, p) with times and event flags. Goes out: a fitted estimator in scikit-learn's style
that fits wherever :mod:`chiasm.tasks.survival_models` does (``fit``, ``predict``, ``predict_survival``), and its folder
on disk (``head.safetensors``, ``head.json``).

Notable choices: the last layer begins at zero, and the untrained network is a candidate of early stopping: where nothing
can be learned all patients get one risk. Several members, each with its own held-out patients, are averaged.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import write_bytes_atomic, write_json_atomic
from chiasm.losses.survival import cox_loss
from chiasm.metrics.survival import BaselineHazard, Floats, breslow_baseline, from_target

FORMAT = "chiasm-neural-cox-1"
#: Standardised features are cut here, so that one strange patient does not leave the range of training.
FARTHEST = 6.0


class NeuralCox(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Cox's model with a multilayer perceptron in place of the linear predictor.

    Args:
        hidden: Widths of the hidden layers; none: a linear model.
        dropout: Of hidden activations.
        weight_decays: Candidates; the one with the best held-out partial likelihood is kept.
        learning_rate: Of AdamW.
        epochs: Most steps; each sees all training patients (one risk set).
        patience: Steps without a better held-out likelihood before training ends.
        validation: Share of patients held out for early stopping, stratified by event.
        members: Networks that are averaged, each with other held-out patients.
        ties: Of the partial likelihood.
        seed: Of everything drawn; the same seed gives the same network on the same machine.
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (32,),
        dropout: float = 0.2,
        weight_decays: Sequence[float] = (0.01, 1.0),
        learning_rate: float = 5e-3,
        epochs: int = 200,
        patience: int = 25,
        validation: float = 0.25,
        members: int = 3,
        ties: Literal["breslow", "efron"] = "efron",
        seed: int = 0,
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.weight_decays = weight_decays
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.patience = patience
        self.validation = validation
        self.members = members
        self.ties = ties
        self.seed = seed

    def fit(
        self,
        features: ArrayLike,
        target: NDArray[np.void],
        groups: Sequence[Hashable] | NDArray[Any] | None = None,
    ) -> Self:
        """Train on patients.

        Args:
            features: (n, p); NaN is replaced by the median of training.
            target: From :func:`chiasm.metrics.survival.survival_target`.
            groups: (n,) patients, kept on one side of the held-out split; None: one row a patient.

        Raises:
            InputError: Fewer than two events on either side of the held-out split, or other shapes.
        """
        x = np.asarray(features, dtype=np.float64)
        time, event = from_target(target)
        if x.ndim != 2 or len(x) != len(time):
            raise InputError(f"features must have shape ({len(time)}, columns), got {x.shape}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column without any value
            self.median_ = np.nan_to_num(np.nanmedian(np.where(np.isfinite(x), x, np.nan), axis=0))
        filled = np.where(np.isfinite(x), x, self.median_)
        self.mean_ = filled.mean(axis=0)
        deviation = filled.std(axis=0)
        self.scale_ = np.where(deviation > 1e-9 * np.maximum(np.abs(self.mean_), 1.0), deviation, np.inf)
        scaled = torch.from_numpy(self._scaled(x))
        times, flags = torch.from_numpy(time), torch.from_numpy(event)
        self.networks_: list[nn.Sequential] = []
        self.chosen_: dict[str, Any] = {"weight_decay": [], "steps": []}
        for member in range(self.members):
            held_out = _held_out(event, groups, self.validation, self.seed + member)
            found = [
                self._train(scaled, times, flags, torch.from_numpy(held_out), decay, self.seed + member)
                for decay in self.weight_decays
            ]
            best = min(range(len(found)), key=lambda k: found[k][1])
            self.networks_.append(found[best][0])
            self.chosen_["weight_decay"].append(float(self.weight_decays[best]))
            self.chosen_["steps"].append(found[best][2])
        self.baseline_ = breslow_baseline(time, event, self.predict(x))
        return self

    def predict(self, features: ArrayLike) -> Floats:
        """Return the log risk of each patient (n,), higher is worse: the mean over members."""
        if not hasattr(self, "networks_"):
            raise NotFittedError("this NeuralCox is not fitted; call `fit` first")
        scaled = torch.from_numpy(self._scaled(np.asarray(features, dtype=np.float64)))
        with torch.no_grad():
            risks = [network.eval()(scaled).squeeze(1) for network in self.networks_]
        mean: Floats = torch.stack(risks).mean(0).double().numpy()
        return mean

    def predict_survival(self, features: ArrayLike, times: ArrayLike) -> Floats:
        """Return the probability of no event until each of ``times``, shape (n, times).

        Raises:
            InputError: A time beyond the follow-up of training.
        """
        return self.baseline_.survival(self.predict(features), times)

    def save(self, folder: str | Path) -> Path:
        """Write the fitted head and return its folder."""
        from safetensors.torch import save

        if not hasattr(self, "networks_"):
            raise NotFittedError("this NeuralCox is not fitted; there is nothing to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {
            name: torch.from_numpy(np.asarray(getattr(self, f"{name}_"), dtype=np.float64))
            for name in ("median", "mean", "scale")
        }
        tensors["baseline.time"] = torch.from_numpy(self.baseline_.time)
        tensors["baseline.cumulative"] = torch.from_numpy(self.baseline_.cumulative)
        for k, network in enumerate(self.networks_):
            tensors |= {f"members.{k}.{name}": value.contiguous() for name, value in network.state_dict().items()}
        write_bytes_atomic(folder / "head.safetensors", save(tensors))
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in self.get_params().items()}
        written = {"format": FORMAT, "settings": settings, "longest": self.baseline_.longest, "chosen": self.chosen_}
        write_json_atomic(folder / "head.json", written)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Return the head that :meth:`save` wrote.

        Raises:
            FileFormatError: Something else lies there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        folder = Path(folder)
        try:
            written = json.loads((folder / "head.json").read_text(encoding="utf-8"))
            tensors = load((folder / "head.safetensors").read_bytes())
            if written["format"] != FORMAT:
                raise FileFormatError(f"a head of format {FORMAT} was expected in `{folder.name}`")
            return cls(**written["settings"])._restore(written, tensors)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise FileFormatError(
                f"`{folder.name}` holds no neural Cox head that can be read: {type(error).__name__}",
                hint="give the folder that `NeuralCox.save` wrote",
            ) from error

    def _restore(self, written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        self.median_, self.mean_, self.scale_ = (tensors[k].numpy() for k in ("median", "mean", "scale"))
        self.chosen_ = dict(written["chosen"])
        self.baseline_ = BaselineHazard(
            tensors["baseline.time"].numpy(), tensors["baseline.cumulative"].numpy(), float(written["longest"])
        )
        self.networks_ = []
        for k in range(self.members):
            network = self._network(len(self.mean_))
            prefix = f"members.{k}."
            network.load_state_dict({n[len(prefix) :]: v for n, v in tensors.items() if n.startswith(prefix)})
            self.networks_.append(network.eval())
        return self

    def _scaled(self, x: Floats) -> NDArray[np.float32]:
        if x.ndim != 2 or x.shape[1] != len(self.mean_):
            raise InputError(f"features must have shape (n, {len(self.mean_)}), got {x.shape}")
        filled = np.where(np.isfinite(x), x, self.median_)
        scaled: NDArray[np.float32] = np.clip((filled - self.mean_) / self.scale_, -FARTHEST, FARTHEST).astype(
            np.float32
        )
        return scaled

    def _network(self, width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for size in self.hidden:
            layers += [nn.Linear(width, size), nn.GELU(), nn.Dropout(self.dropout)]
            width = size
        last = nn.Linear(width, 1, bias=False)  # a constant cancels in the partial likelihood
        nn.init.zeros_(last.weight)
        return nn.Sequential(*layers, last)

    def _train(
        self, x: Tensor, time: Tensor, event: Tensor, held_out: Tensor, weight_decay: float, seed: int
    ) -> tuple[nn.Sequential, float, int]:
        """Return the network at its best step, its held-out loss there, and that step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self._network(x.shape[1])
            optimiser = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=weight_decay)
            kept, best, best_step = _copy(network), float("inf"), 0
            for step in range(self.epochs + 1):
                network.eval()
                with torch.no_grad():
                    loss = float(cox_loss(network(x[held_out]).squeeze(1), time[held_out], event[held_out]))
                if loss < best - 1e-6:
                    kept, best, best_step = _copy(network), loss, step
                if step - best_step >= self.patience or not np.isfinite(loss):
                    break
                network.train()
                optimiser.zero_grad()
                risk = network(x[~held_out]).squeeze(1)
                torch.autograd.backward(cox_loss(risk, time[~held_out], event[~held_out], ties=self.ties))
                optimiser.step()
        network.load_state_dict(kept)
        return network.eval(), best, best_step


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _held_out(
    event: NDArray[np.bool_], groups: Sequence[Hashable] | NDArray[Any] | None, share: float, seed: int
) -> NDArray[np.bool_]:
    """Return which rows are held out: whole groups, as many of those with an event as of those without."""
    if not 0 < share < 1:
        raise InputError(f"the held-out share must lie between 0 and 1, got {share}")
    names = np.arange(len(event)) if groups is None else np.unique([str(g) for g in groups], return_inverse=True)[1]
    died = np.zeros(names.max() + 1, dtype=bool)
    np.logical_or.at(died, names, event)
    random = np.random.default_rng(seed)
    chosen = np.zeros(len(died), dtype=bool)
    for flag in (True, False):
        members = random.permutation(np.flatnonzero(died == flag))
        chosen[members[: round(share * len(members))]] = True
    if min(died[chosen].sum(), died[~chosen].sum()) < 2:
        raise InputError(
            f"{int(died.sum())} patients with an event are too few to hold some out for early stopping",
            hint="a linear Cox model (`CoxNet`) needs fewer",
        )
    held_out: NDArray[np.bool_] = chosen[names]
    return held_out
