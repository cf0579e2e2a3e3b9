"""Real text that any machine can get without a hub: Python's documentation, and on Debian help in Indian languages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.folder import whole_or_nothing
from lightning_bharat.data.languages import LANGUAGES, is_written_in
from lightning_bharat.data.markup import html_strings, xml_strings

REPORT = "report.json"
FEWEST_WORDS = 5  # shorter strings are menu entries and headings, not prose
# Where a firewall swallows what is sent, apt-get by itself tries for many minutes.
APT_SECONDS, UPDATE_SECONDS = 120, 60
PATIENCE = ("-o", "Acquire::http::Timeout=15", "-o", "Acquire::https::Timeout=15", "-o", "Acquire::Retries=0")
PYTHON_LICENCE = "https://docs.python.org/3/license.html"


@dataclass
class Page:
    """One page of prose: a document of the corpus."""

    language: str
    source: str
    page: str
    strings: list[str]


@dataclass
class Fetched:
    """What was fetched: bytes of UTF-8 text for each language, by source, and what could not be had, in words."""

    languages: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def bytes(self, language: str) -> int:
        """Bytes of text in a language."""
        return sum(self.languages.get(language, {}).values())


def fetch_corpus(folder: str | os.PathLike[str], packages: bool = True) -> Fetched:
    """Fetch text into ``folder``: ``LANGUAGE.jsonl`` with a page a line, ``licences`` and ``report.json``.

    Strings of fewer than five words and strings that were seen before are left out, and of translations what is not in
    the language's own script. Where ``folder`` was fetched before, its report is returned at once. Fetch this text, do
    not publish it: it stands under the licences beside it.

    Args:
        folder: to make; it appears whole or not at all.
        packages: also read help pages of the packages in :data:`PACKAGES`, downloaded by apt-get, without being root.

    Raises:
        DataError: ``folder`` holds something else.
    """
    folder = Path(folder)
    if (folder / REPORT).is_file():
        return _read_report(folder / REPORT)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"folder={str(folder)!r} holds something else; write the name of a new folder")
    try:
        with whole_or_nothing(folder) as unfinished:
            report = Fetched()
            _add(unfinished, report, _python_topics())
            _python_licence(unfinished / "licences")
            with tempfile.TemporaryDirectory(prefix="bharat-fetch-") as scratch:
                for package in PACKAGES if packages else ():
                    _add_package(unfinished, report, package, Path(scratch))
            (unfinished / REPORT).write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    except FileExistsError:
        return _read_report(folder / REPORT)  # another process was first
    return report


def _read_report(file: Path) -> Fetched:
    try:
        return Fetched(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}); remove {file.parent} and fetch again") from error


def _add(folder: Path, report: Fetched, pages: Iterator[Page]) -> None:
    """Append the pages to their languages' files, without the strings that were seen before."""
    seen: dict[str, set[str]] = {}
    for page in pages:
        known = seen.setdefault(page.language, set())
        new = [string for string in dict.fromkeys(page.strings) if string not in known]
        known.update(new)
        if not new:
            continue
        text = "\n".join(new)
        line = {"text": text, "source": page.source, "page": page.page}
        with (folder / f"{page.language}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        sources = report.languages.setdefault(page.language, {})
        sources[page.source] = sources.get(page.source, 0) + len(text.encode())


def _python_topics() -> Iterator[Page]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Page("en", "python", name, [text])


def _python_licence(folder: Path) -> None:
    folder.mkdir()
    candidates = [Path(os.__file__).parent / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt"]
    found = next((file for file in candidates if file.is_file()), None)
    words = found.read_text(encoding="utf-8") if found else f"The whole licence: {PYTHON_LICENCE}\n"
    (folder / "python.txt").write_text(
        f"Topics of the Python documentation, from pydoc_data.topics. {sys.copyright}\n\n{words}", encoding="utf-8"
    )


def _gnome_folder(language: str) -> str:
    return "C" if language == "en" else language


def _gnome_pages(root: Path) -> Iterator[Page]:
    help_pages = root / "usr/share/help"
    for language in LANGUAGES:
        for file in _files(help_pages / _gnome_folder(language), "*.page"):
            try:
                strings = xml_strings(file.read_bytes(), ("p", "title"))
            except DataError:
                continue  # a few pages quote a whole document type: not worth a risk
            yield _page(language, "gnome-user-docs", file.relative_to(help_pages), strings)


def _libreoffice_pages(root: Path) -> Iterator[Page]:
    help_pages = root / "usr/share/libreoffice/help"
    elements = ("p", "td", "li", "h1", "h2", "h3", "h4", "h5", "h6")
    for file in _files(help_pages / "hi", "*.html"):
        strings = html_strings(file.read_text(encoding="utf-8", errors="replace"), elements)
        yield _page("hi", "libreoffice-help-hi", file.relative_to(help_pages), strings)


@dataclass(frozen=True)
class Package:
    """What is read of a Debian package: the files in these folders, by this function of where they were unpacked."""

    folders: tuple[PurePosixPath, ...]
    pages: Callable[[Path], Iterator[Page]]


# Both are translations, in part: the rest of a page is English.
PACKAGES = {
    "gnome-user-docs": Package(
        tuple(PurePosixPath("usr/share/help", _gnome_folder(language)) for language in LANGUAGES), _gnome_pages
    ),
    "libreoffice-help-hi": Package((PurePosixPath("usr/share/libreoffice/help/hi"),), _libreoffice_pages),
}


def _page(language: str, source: str, page: Path, strings: list[str]) -> Page:
    prose = [s for s in strings if len(s.split()) >= FEWEST_WORDS and is_written_in(s, language)]
    return Page(language, source, page.as_posix(), prose)


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern))


def _add_package(folder: Path, report: Fetched, package: str, scratch: Path) -> None:
    try:
        root = _unpack(package, scratch)
    except DataError as error:
        report.missing.append(f"{package}: {error}")
        return
    _add(folder, report, PACKAGES[package].pages(root))
    licence = root / _licence(package)
    if licence.is_file():
        shutil.copyfile(licence, folder / "licences" / f"{package}.txt")


def _licence(package: str) -> PurePosixPath:
    return PurePosixPath("usr/share/doc", package, "copyright")


def _unpack(package: str, scratch: Path) -> Path:
    """Download a package and unpack what is read of it (no script of it is run); nothing is installed."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} is not on this system; Debian and Ubuntu have it")
    archive = _download(package, scratch)
    root = scratch / package
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as files:
                _extract(files, (*PACKAGES[package].folders, _licence(package)), root)
        except tarfile.TarError as error:
            raise DataError(f"{archive.name} is no archive that can be read ({error})") from error
    return root


def _extract(files: tarfile.TarFile, wanted: tuple[PurePosixPath, ...], root: Path) -> None:
    """Write the regular files at and below ``wanted``: a package has twenty times as many, and links out of it."""
    for member in files:
        path = PurePosixPath(member.name)
        if member.isreg() and ".." not in path.parts and any(path.is_relative_to(folder) for folder in wanted):
            content = files.extractfile(member)
            assert content is not None  # it is None for what is no file
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content.read())


def _download(package: str, scratch: Path) -> Path:
    """By apt-get, which checks the archive's signature; with package lists of our own where the system's are empty."""
    own = scratch / "apt"
    lists = ["-o", f"Dir::State::Lists={own / 'lists'}", "-o", f"Dir::Cache={own / 'cache'}"]
    try:
        _run(["apt-get", *PATIENCE, "download", package], scratch)
    except DataError as error:
        if not own.exists():  # else the package before this one has tried
            for part in ("lists/partial", "cache/archives/partial"):
                (own / part).mkdir(parents=True)
            with suppress(DataError):
                _run(["apt-get", *PATIENCE, *lists, "update"], scratch, UPDATE_SECONDS)
        try:
            _run(["apt-get", *PATIENCE, *lists, "download", package], scratch)
        except DataError:
            raise DataError(
                f"{error}. Is the network there, and is a Debian or Ubuntu archive in /etc/apt/sources.list? "
                "Then `sudo apt-get update` may help"
            ) from error
    return next(scratch.glob(f"{package}_*.deb"))


def _run(command: list[str], folder: Path, seconds: float = APT_SECONDS) -> None:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    short = " ".join(command[:1] + command[-2:])  # the options in between are long
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"`{short}` took longer than {seconds:g} s") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith(("E:", "Err", "dpkg"))]
        raise DataError(f"`{short}` failed ({'; '.join(errors) or done.stderr.strip()})")
