"""Named things that plug-ins may add: encoders, readers, tasks. Built-ins enter through the same door.

A plug-in package declares an entry point in the group ``chiasm.encoders``, ``chiasm.readers`` or ``chiasm.tasks``;
its code is imported only when its name is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from chiasm.errors import ConfigError, UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of names with lazy plug-ins and did-you-mean errors.

    Args:
        kind: What the names stand for, as it appears in messages ("encoder").
        group: Entry-point group that plug-ins use ("chiasm.encoders").
        hint: One action shown when a name is unknown.
    """

    def __init__(self, kind: str, group: str, *, hint: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self.hint = hint
        self._items: dict[str, T] = {}
        self._plugins: dict[str, EntryPoint] | None = None

    def add(self, name: str, item: T) -> T:
        """Register ``item``; a name that is taken raises ``ConfigError``."""
        if name in self._items:
            raise ConfigError(f"{self.kind} `{name}` is registered twice")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under ``name``."""
        return lambda item: self.add(name, item)

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._plugins is None:
            self._plugins = {e.name: e for e in entry_points(group=self.group)}
        return self._plugins

    def get(self, name: str) -> T:
        """Return the item called ``name``, importing a plug-in if needed.

        Raises:
            UnknownName: When neither a built-in nor a plug-in has this name.
        """
        if name not in self._items and name in self._entry_points():
            self._items[name] = self._entry_points()[name].load()
        if name not in self._items:
            raise UnknownName(self.kind, name, self.names(), hint=self.hint)
        return self._items[name]

    def names(self) -> list[str]:
        """Return all names, sorted; plug-ins are listed without being imported."""
        return sorted({*self._items, *self._entry_points()})

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
