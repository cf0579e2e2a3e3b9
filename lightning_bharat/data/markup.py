"""Strings out of XML and HTML pages, by parsers that expand no entity and run no script."""

from __future__ import annotations

from collections.abc import Collection
from html.parser import HTMLParser
from xml.parsers import expat

from lightning_bharat.data.errors import DataError


class _Strings:
    """Collects the text of some elements. One inside another is a string of its own, and not part of the outer's."""

    def __init__(self, elements: Collection[str], ignored: Collection[str]) -> None:
        self._elements = elements
        self._ignored = ignored
        self._open: list[tuple[str, list[str]]] = []
        self._silent = 0
        self.found: list[str] = []

    def start(self, element: str) -> None:
        if element in self._ignored:
            self._silent += 1
        elif element in self._elements:
            self._open.append((element, []))

    def text(self, text: str) -> None:
        if self._open and not self._silent:
            self._open[-1][1].append(text)

    def end(self, element: str) -> None:
        if element in self._ignored:
            self._silent = max(0, self._silent - 1)
        elif any(element == name for name, _ in self._open):
            while self._close() != element:  # HTML may leave inner elements open
                pass

    def _close(self) -> str:
        name, parts = self._open.pop()
        if string := " ".join("".join(parts).split()):
            self.found.append(string)
        return name

    def finish(self) -> list[str]:
        while self._open:
            self._close()
        return self.found


def xml_strings(page: bytes, elements: Collection[str]) -> list[str]:
    """The text of each of these elements, whatever their namespace, with single spaces.

    Raises:
        DataError: the page is not well-formed, or declares entities or a document type, which could make a small page
            huge or name other files.
    """
    strings = _Strings(elements, ())
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = lambda name, _: strings.start(name.rpartition(" ")[2])
    parser.EndElementHandler = lambda name: strings.end(name.rpartition(" ")[2])
    parser.CharacterDataHandler = strings.text
    parser.StartDoctypeDeclHandler = _refuse_document_type
    try:
        parser.Parse(page, True)
    except expat.ExpatError as error:
        raise DataError(f"the page is not well-formed XML: {error}") from error
    return strings.finish()


def _refuse_document_type(name: str, *_: object) -> None:
    raise DataError(f"the page declares a document type ({name}), which may define entities: not read")


class _Html(HTMLParser):
    def __init__(self, strings: _Strings) -> None:
        super().__init__(convert_charrefs=True)
        self._strings = strings

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._strings.start(tag)

    def handle_endtag(self, tag: str) -> None:
        self._strings.end(tag)

    def handle_data(self, data: str) -> None:
        self._strings.text(data)


def html_strings(page: str, elements: Collection[str]) -> list[str]:
    """The text of each of these elements, with single spaces; nothing of scripts and styles."""
    strings = _Strings(elements, ("script", "style"))
    parser = _Html(strings)
    parser.feed(page)
    parser.close()
    return strings.finish()
