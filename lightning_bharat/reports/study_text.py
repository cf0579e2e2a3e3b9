"""A study's report as one HTML file that needs no network, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import jinja2
from plotly.offline import get_plotlyjs

from lightning_bharat.reports.study_sections import Section

# What means something to Markdown, or to the HTML that it may hold.
_MARKED = re.compile(r"([\\`*\[\]|~#])")


def as_html(name: str, sections: Sequence[Section]) -> str:
    """One page about the study ``name``, with its pictures and all that draws them; texts of the study stay text."""
    page: str = _template().render(name=name, sections=sections, plotly=get_plotlyjs())
    return page


def as_markdown(name: str, sections: Sequence[Section]) -> str:
    """The same without pictures."""
    parts = [f"# Study {escaped(name)}"]
    for section in sections:
        if body := _body(section):
            parts += [f"## {escaped(section.title)}", *body]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text as it is in Markdown and in a cell of its tables."""
    text = " ".join(text.split())
    return _MARKED.sub(r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _body(section: Section) -> list[str]:
    body = [escaped(line) for line in section.text]
    body += [escaped(picture.why) for picture in section.pictures if picture.why]
    if section.rows:
        lines = [_line(section.head), _line(["---"] * len(section.head), raw=True), *map(_line, section.rows)]
        body.append("\n".join(lines))
    return body


def _line(cells: Sequence[str], raw: bool = False) -> str:
    return "| " + " | ".join(cell if raw else escaped(cell) for cell in cells) + " |"


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_bharat.reports", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return found.get_template("study.html.jinja")
