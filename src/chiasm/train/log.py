"""Numbers of a run: ``results.jsonl`` always, TensorBoard and Weights & Biases on request.

Comes in: records with a step. Goes out: lines and events. On resume the lines after the checkpoint's step are taken
out, because the run will write them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from chiasm.errors import MissingExtra
from chiasm.io.manifest import JsonlWriter, read_jsonl


class Sink(Protocol):
    """Where records go."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Take one record; ``kind`` is ``train`` or ``validation``."""

    def close(self) -> None:
        """Flush and release."""


class JsonlSink:
    """``results.jsonl``: one object a line, ``{"kind", "step", ...}``.

    Args:
        path: The file.
        after: Drop the lines of later steps first; 0 starts the file anew.
    """

    def __init__(self, path: Path, *, after: int = 0) -> None:
        _cut(path, after)
        self._writer = JsonlWriter(path)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        self._writer.write({"kind": kind, "step": step, **values})

    def close(self) -> None:
        """Sync to disk."""
        self._writer.close()


def _cut(path: Path, after: int) -> None:
    """Truncate the file at its first line of a later step: one call, so that a kill leaves no half of it."""
    if not path.exists():
        return
    records = read_jsonl(path)
    kept = next((i for i, r in enumerate(records) if r.get("step", 0) > after or not after), len(records))
    with path.open("rb+") as file:
        size = sum(len(file.readline()) for _ in range(kept))
        file.truncate(size)


class TensorBoardSink:
    """TensorBoard events.

    Raises:
        MissingExtra: When ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path, *, after: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "track") from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add every number as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush the events."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine.

    Raises:
        MissingExtra: When ``wandb`` is not installed.
    """

    def __init__(self, folder: Path, *, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "track") from error
        self._run: Any = wandb.init(
            project="chiasm", name=name, id=f"{name}-{config.get('digest', '')}", resume="allow", dir=str(folder),
            config=dict(config), settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log every number."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class RunLog:
    """All sinks of a run, as one; use as a context manager.

    Args:
        sinks: Where records go; empty on every process but the first.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = list(sinks)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Hand one record to every sink."""
        for sink in self.sinks:
            sink.write(kind, step, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for sink in self.sinks:
            sink.close()


def open_log(
    out: Path, names: Sequence[str], *, after: int = 0, run_name: str = "run", config: Mapping[str, Any] | None = None
) -> RunLog:
    """Open ``out/results.jsonl`` and the sinks asked for.

    Args:
        out: Folder of the run.
        names: ``tensorboard``, ``wandb``.
        after: Step that the run goes on from.
        run_name: Shown by Weights & Biases.
        config: Recorded by Weights & Biases.

    Raises:
        MissingExtra: When a sink's package is not installed.
    """
    extra: list[Sink] = []
    if "tensorboard" in names:
        extra.append(TensorBoardSink(out / "tensorboard", after=after))
    if "wandb" in names:
        extra.append(WandbSink(out, name=run_name, config=config or {}))
    return RunLog([JsonlSink(out / "results.jsonl", after=after), *extra])
