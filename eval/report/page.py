"""A self-contained HTML page with sections, tables, charts and pictures, for phones, desktops and paper."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

from m2f.data_pipeline.printable import printable

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1320px; padding: 16px; }
h1 { font-size: 1.5em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 32px 0 8px; padding-top: 8px; border-top: 1px solid #8885; }
p { margin: 6px 0; max-width: 75ch; }
.faint { opacity: 0.7; }
.headline span { display: inline-block; margin: 8px 32px 0 0; }
.headline b { font-size: 2.2em; line-height: 1.1; font-variant-numeric: tabular-nums; }
.note { border-left: 3px solid #d55e00; padding-left: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #8883; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
thead th { border-bottom: 2px solid #8886; vertical-align: bottom; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6em; }
@media (max-width: 600px) { th, td { padding: 3px 6px; } th { white-space: normal; }
  th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6.5em; max-width: 40vw; } }
.best { font-weight: bold; }
.good { color: #0072b2; } .bad { color: #d55e00; }
@media (prefers-color-scheme: dark) { .good { color: #56b4e9; } .bad { color: #ff8c42; } }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 20px; }
.small { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); margin: 12px 0; }
svg { width: 100%; height: auto; }
img { width: 100%; min-width: 800px; height: auto; display: block; margin: 8px 0; border-radius: 4px; }
summary { cursor: pointer; padding: 4px 0; }
nav a { margin-right: 14px; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } nav { display: none; }
  .grid { grid-template-columns: 1fr 1fr; } .small { grid-template-columns: repeat(5, 1fr); }
  svg, img, tr { break-inside: avoid; }
  .scroll { overflow: visible; } img { min-width: 0; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading."""

    title: str
    body: str
    """Content as HTML."""

    @property
    def anchor(self) -> str:
        """Name of the section in links."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Cell:
    """Content of a table cell: HTML, and a CSS class that states its meaning."""

    html: str
    kind: str = ""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the whole HTML document; `lead` is HTML below the title."""
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    bodies = "".join(f'<h2 id="{s.anchor}">{escape(s.title)}</h2>\n{s.body}\n' for s in sections)
    return printable(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{lead}\n<nav>{links}</nav>\n{bodies}</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """Return a table that scrolls sideways if it is too wide; plain strings are escaped."""
    kinds = [cell.kind if isinstance(cell, Cell) and cell.kind == "text" else "" for cell in rows[0]] if rows else []
    header = "".join(f'<th class="{k}">{escape(text)}</th>' for text, k in zip_longest(head, kinds, fillvalue=""))
    lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text; `kind` is empty, note or faint."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def headline(numbers: Mapping[str, str]) -> str:
    """Return a few large numbers with their names."""
    shown = "".join(f"<span><b>{escape(value)}</b> {escape(name)}</span>" for name, value in numbers.items())
    return f'<p class="headline">{shown}</p>'


def grid(items: Sequence[str], *, small: bool = False) -> str:
    """Return charts side by side, as many per row as fit. `small` is for small charts."""
    cells = "".join(f"<div>{item}</div>" for item in items)
    return f'<div class="{"grid small" if small else "grid"}">{cells}</div>'


def collapsible(summary: str, body: str) -> str:
    """Return HTML that is collapsed until the reader clicks on `summary`."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def picture(jpeg: bytes, text: str) -> str:
    """Return a wide image embedded in the page; `text` is its alternative text."""
    data = base64.b64encode(jpeg).decode()
    return f'<div class="scroll"><img alt="{escape(text)}" src="data:image/jpeg;base64,{data}"></div>'


def _cell(value: str | Cell) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="{value.kind}">{value.html}</td>' if value.kind else f"<td>{value.html}</td>"
