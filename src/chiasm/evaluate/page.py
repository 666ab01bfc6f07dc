"""Results to one self-contained HTML page: pictures and tables inside, no external request, readable without network.

A page is a title, a row of key numbers and sections; a section is a heading, a sentence and blocks. Blocks are small
frozen values (``Figure``, ``Table``, ``Gallery``, ``Excerpts``, ``Commands``, ``Note``), so every command composes its page from the
same parts and all pages look alike. All text is escaped by the template engine.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.types import Interval

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class KeyNumber:
    """A number that a reader must see first, with what chance would give."""

    name: str
    interval: Interval
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG text, with its caption (also the text for screen readers)."""

    svg: str
    caption: str
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Table:
    """Rows under a header; cells are printed as they are, intervals as ``value [low, high]``."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """One image of a gallery with lines of text under it; ``mark`` colours its frame (``right``, ``wrong`` or none)."""

    source: str
    lines: tuple[str, ...] = ()
    mark: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures in rows; each row has a heading (a query, a finding)."""

    rows: tuple[tuple[str, tuple[Picture, ...]], ...]
    caption: str = ""
    size_px: int = 132
    kind: str = "gallery"


@dataclass(frozen=True)
class Commands:
    """Shell or Python lines to go on with."""

    text: str
    caption: str = ""
    kind: str = "commands"


@dataclass(frozen=True)
class Note:
    """A paragraph that must not be missed (``tone``: ``plain`` or ``warning``)."""

    text: str
    tone: str = "plain"
    kind: str = "note"


@dataclass(frozen=True)
class Excerpt:
    """A picture beside a text, of which one part is marked; ``lines`` stand under the heading."""

    picture: Picture
    heading: str
    lines: tuple[str, ...] = ()
    before: str = ""
    marked: str = ""
    after: str = ""


@dataclass(frozen=True)
class Excerpts:
    """Pictures beside their texts, one under the other."""

    rows: tuple[Excerpt, ...]
    caption: str = ""
    size_px: int = 190
    kind: str = "excerpts"


Block = Figure | Table | Gallery | Commands | Note | Excerpts


@dataclass(frozen=True)
class Section:
    """A heading, one introducing sentence and its blocks."""

    title: str
    intro: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """Identifier of the heading, for links."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """Everything that one page shows."""

    title: str
    subtitle: str
    key_numbers: tuple[KeyNumber, ...] = ()
    sections: tuple[Section, ...] = ()
    footer: Sequence[str] = field(default_factory=tuple)


def picture_source(image: Image, *, width_px: int | None = None) -> str:
    """Return an image as a ``data:`` URL (PNG), optionally scaled to a width without smoothing up."""
    if width_px is not None and image.width != width_px:
        image = image.resize((width_px, max(1, round(image.height * width_px / image.width))))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def render_page(page: Page) -> str:
    """Return the page as HTML text, with its style and pictures inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(page=page, style=style)


def save_page(page: Page, path: str | Path) -> Path:
    """Write the page and return where it lies."""
    path = Path(path)
    path.write_text(render_page(page), encoding="utf-8")
    return path
