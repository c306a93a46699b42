"""The pieces of a self-contained page: no script, no font, no image that is not inside the file.

Everything that came from outside is escaped here. The content security policy in the page's head forbids the
browser what the page promises not to do, loading anything.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from corun import __version__
from corun.report.exhibit import Data, Exhibit, shown
from corun.report.look import LOOKS, Look, png

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PHONE = "(max-width: 640px)"
DARK = "(prefers-color-scheme: dark)"


@dataclass(frozen=True)
class Drawn:
    """An exhibit with its renderings as PNG, by the name of the look; none for one that has nothing to draw."""

    exhibit: Exhibit
    images: Mapping[str, bytes]


def drawn(exhibit: Exhibit) -> Drawn:
    """Draw all renderings of an exhibit."""
    return Drawn(exhibit, {look.name: png(exhibit.draw, look) for look in LOOKS} if exhibit.draw else {})


def document(title: str, header: str, main: str, footer: str) -> str:
    """The whole page around its header, main part and footer (all of them HTML)."""
    css = resources.files("corun.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="corun {__version__}">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">Skip to the numbers</a>\n<header>\n{header}\n</header>\n'
        f'<main id="main">\n{main}\n</main>\n<footer>\n{footer}\n</footer>\n</body>\n</html>\n'
    )


def navigation(links: Iterable[tuple[str, str]]) -> str:
    """Links to the parts of the page: (id, title)."""
    items = "".join(f'<li><a href="#{escape(key)}">{escape(title)}</a></li>' for key, title in links)
    return f'<nav aria-label="Parts of this page"><ul>{items}</ul></nav>'


def section(key: str, title: str, body: str) -> str:
    """A titled part of the page; body is HTML."""
    return f'<section id="{escape(key)}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{style}"' if style else ""
    return f"<p{attribute}>{escape(text)}</p>"


def figure(item: Drawn) -> str:
    """A figure with caption, picture in four renderings, and its data; a sentence when there is none."""
    exhibit = item.exhibit
    head = f'<h2 id="{exhibit.key}-title">{escape(exhibit.title)}</h2>\n{paragraph(exhibit.caption, "caption")}'
    if not item.images:
        return f'<section id="{exhibit.key}">\n{head}\n</section>'
    data = data_details(exhibit.data, exhibit.key) if exhibit.data else ""
    return f'<figure id="{exhibit.key}" aria-labelledby="{exhibit.key}-title">\n{head}\n{_picture(item)}\n{data}\n</figure>'


def _picture(item: Drawn) -> str:
    sources = "\n".join(_source(look, item.images[look.name]) for look in reversed(LOOKS) if look.dark or look.narrow)
    plain = item.images["light"]
    width, tall = _size(plain)
    return (
        f"<picture>\n{sources}\n"
        f'<img src="{_uri(plain)}" width="{width}" height="{tall}" alt="{escape(item.exhibit.alt)}">\n</picture>'
    )


def _source(look: Look, image: bytes) -> str:
    media = " and ".join([PHONE] * look.narrow + [DARK] * look.dark)
    width, tall = _size(image)
    return f'<source media="{media}" srcset="{_uri(image)}" width="{width}" height="{tall}">'


def _size(image: bytes) -> tuple[int, int]:
    """Width and height of a PNG, from its IHDR chunk."""
    return int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")


def _uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def data_details(data: Data, name: str) -> str:
    """The numbers behind a figure: closed at first, as a table and as a CSV file to keep."""
    count = f"{len(data.rows)} row{'s' * (len(data.rows) != 1)}"
    link = download(f"{name}.csv", data.csv(), "text/csv")
    body = table(data.columns, data.rows, f"Data of {name}", tall=True)
    return f"<details>\n<summary>Data ({count})</summary>\n{link}\n{body}\n</details>"


def download(name: str, text: str, kind: str) -> str:
    """A link that saves a file which lies inside the page."""
    encoded = base64.b64encode(text.encode()).decode()
    return (
        f'<a class="download" download="{escape(name)}" href="data:{kind};base64,{encoded}">Save {escape(name)}</a>'
    )


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], label: str, tall: bool = False, strong: Sequence[int] = ()
) -> str:
    """A table that scrolls inside its own box; numbers stand right, missing cells are empty.

    strong: indexes of rows to emphasise. label: what the table is, for screen readers.
    """
    rows = list(rows)
    numeric = [
        any(_is_number(row[place]) for row in rows) and all(_is_number(row[place]) or not row[place] for row in rows)
        for place in range(len(columns))
    ]
    classes = [' class="number"' if right else "" for right in numeric]
    head = "".join(f'<th scope="col"{c}>{escape(name)}</th>' for name, c in zip(columns, classes, strict=True))
    styles = [' class="ratio"' if index in strong else "" for index in range(len(rows))]
    body = "\n".join(f"<tr{style}>{_cells(row, classes)}</tr>" for style, row in zip(styles, rows, strict=True))
    return (
        f'<div class="scroll{" tall" * tall}" tabindex="0" role="region" aria-label="{escape(label)}">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _cells(row: Sequence[Any], classes: Sequence[str]) -> str:
    return "".join(f"<td{_long(cell) or c}>{_cell(cell)}</td>" for cell, c in zip(row, classes, strict=True))


def _cell(cell: Any) -> str:
    return cell.html if isinstance(cell, Link) else escape(shown(cell))


@dataclass(frozen=True)
class Link:
    """A table cell that leads somewhere, relative to the page."""

    text: str
    href: str

    @property
    def html(self) -> str:
        return f'<a href="{escape(self.href)}">{escape(self.text)}</a>'


def _is_number(cell: Any) -> bool:
    """A number, a factor such as ×1.25, or n/a in a number's place."""
    text = isinstance(cell, str) and (cell == "n/a" or cell.startswith("×"))
    return text or (isinstance(cell, int | float) and not isinstance(cell, bool))


def _long(cell: Any) -> str:
    return ' class="long"' if isinstance(cell, str) and len(cell) > 48 else ""


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """A list of names and values; missing values are left out."""
    rows = [(name, value) for name, value in pairs if value not in (None, "", [], {})]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows)
    return f"<dl>{items}</dl>"


def folded(summary: str, body: str) -> str:
    """HTML that is closed at first."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{body}\n</details>"


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"
