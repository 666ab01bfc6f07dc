"""Pages carry everything inside, escape what users typed, and read the same twice."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from chiasm.evaluate.page import (
    Commands,
    Figure,
    Gallery,
    KeyNumber,
    Note,
    Page,
    Picture,
    Section,
    Table,
    picture_source,
    render_page,
    save_page,
)
from chiasm.types import Interval

NAN = float("nan")


def make_page(text: str = "plain") -> Page:
    picture = Picture(picture_source(Image.new("I;16", (4, 2))), (text,), mark="right", alt=text)
    return Page(
        title=text,
        subtitle="sub",
        key_numbers=(KeyNumber("a", Interval(0.5, 0.4, 0.6, 3, 0.25)), KeyNumber("b", Interval(0.5, NAN, NAN, 1))),
        sections=(
            Section(
                "First part",
                text,
                (
                    Figure("<svg></svg>", text),
                    Table(("x", text), ((1, text), (2, "b")), text),
                    Gallery(((text, (picture,)),), text),
                    Commands(text, text),
                    Note(text, "warning"),
                ),
            ),
            Section("Second", "", ()),
            Section("Third", "", ()),
        ),
        footer=(text,),
    )


def test_every_text_is_escaped() -> None:
    html = render_page(make_page('<script>alert("x")</script>&'))
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") >= 12


def test_page_needs_no_network() -> None:
    html = render_page(make_page())
    links = re.findall(r'\s(?:src|href)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links), links
    assert "default-src 'none'" in html


def test_numbers_show_interval_and_chance() -> None:
    html = render_page(make_page())
    assert "0.400 – 0.600" in html
    assert "chance 0.250" in html
    assert "nan" not in html.lower().replace("dominant", "")


def test_anchors_and_saving(tmp_path: Path) -> None:
    page = make_page()
    assert page.sections[0].anchor == "first-part"
    path = save_page(page, tmp_path / "p.html")
    assert path.read_text(encoding="utf-8") == render_page(page)
    assert 'href="#first-part"' in path.read_text(encoding="utf-8")


def test_pictures_are_scaled() -> None:
    import base64
    import io

    source = picture_source(Image.new("L", (10, 20)), width_px=40)
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as back:
        assert back.size == (40, 80)
        assert back.mode == "RGB"
