"""The models that have a name: a table of configurations and facts. Light: torch is not imported.

In: the entries of ``encoders.models`` and what is known about them (``encoders.facts``). Out: :data:`CATALOG`, and
:data:`ARCHITECTURES` under open_clip's names. Figures are published ones, each with its source; chiasm did not measure
them.
"""

from __future__ import annotations

from collections.abc import Iterator

from chiasm.encoders.entry import CatalogEntry, Figure, WeightSource
from chiasm.encoders.facts import join_facts
from chiasm.encoders.models import (
    bioclip,
    biomedclip,
    biovil,
    chexzero,
    conch,
    dino,
    gloria,
    histology,
    imagenet,
    kaiko,
    medclip,
    openai,
    plip,
    quiltnet,
    text_encoders,
    uni,
)
from chiasm.encoders.models.openai import ARCHITECTURES, with_gelu
from chiasm.errors import UnknownName
from chiasm.registry import Registry

__all__ = ["ARCHITECTURES", "CATALOG", "Catalog", "CatalogEntry", "Figure", "WeightSource", "with_gelu"]

FAMILIES = (
    openai,
    biovil,
    conch,
    uni,
    kaiko,
    dino,
    histology,
    medclip,
    gloria,
    chexzero,
    biomedclip,
    bioclip,
    plip,
    quiltnet,
    imagenet,
    text_encoders,
)


class Catalog(Registry[CatalogEntry]):
    """The table, searchable by name and by alias; plug-ins add to it through ``chiasm.encoders``."""

    def get(self, name: str) -> CatalogEntry:
        """Return the entry called ``name``; a plug-in is imported if needed.

        Raises:
            UnknownName: No entry has this name or alias.
        """
        entry = self.find(name)
        if entry is None:
            short = [a for e in self._items.values() for a in e.aliases if not a.startswith("openai/")]
            known = [*self.names(), *ARCHITECTURES, *short]
            raise UnknownName(self.kind, name, known, hint=self.hint)
        return entry

    def find(self, name: str) -> CatalogEntry | None:
        """Return the entry of a name or alias, or None."""
        if name in self:
            return join_facts(super().get(name))
        found = next((e for e in self._items.values() if name in e.aliases), None)
        return None if found is None else join_facts(found)

    def entries(self) -> Iterator[CatalogEntry]:
        """Yield the built-in entries."""
        yield from map(join_facts, self._items.values())


CATALOG = Catalog(
    "model", "chiasm.encoders", hint="`chiasm models` lists them; a path works if a file or folder lies there"
)
for _family in FAMILIES:
    for _entry in _family.ENTRIES:
        CATALOG.add(_entry.name, _entry)
