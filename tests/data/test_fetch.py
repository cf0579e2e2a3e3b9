"""Pages to text: parsers that expand nothing, real archives, and a report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from shutil import which

import pytest

from lightning_bharat.data import DataError, fetch
from lightning_bharat.data.fetch import Fetched, fetch_corpus
from lightning_bharat.data.languages import is_written_in
from lightning_bharat.data.markup import html_strings, xml_strings

TAMIL = "உங்கள் சொடுக்கியை வேலை செய்யத் தொடங்க வைக்கவும்."
HINDI = "यह दस्तावेज़ खोलने के लिए एक उदाहरण वाक्य है।"
ENGLISH = "Click on a mouse button to wake it up."

MALLARD = f"""<?xml version="1.0" encoding="utf-8"?>
<page xmlns="http://projectmallard.org/1.0/" id="a"><info><desc>left out</desc></info>
  <title>A  title</title>
  <p>{TAMIL}
     <gui>inline &lt;b&gt;</gui></p><p>{TAMIL}</p><list><item><p>{ENGLISH}</p></item></list>
</page>"""


def test_strings_of_xml() -> None:
    assert xml_strings(MALLARD.encode(), ("p", "title")) == ["A title", f"{TAMIL} inline <b>", TAMIL, ENGLISH]


@pytest.mark.parametrize(
    "page",
    [
        '<!DOCTYPE p [<!ENTITY a "haha"><!ENTITY b "&a;&a;&a;&a;">]><p>&b;</p>',
        '<!DOCTYPE p [<!ENTITY f SYSTEM "file:///etc/passwd">]><p>&f;</p>',
        '<!DOCTYPE p SYSTEM "http://127.0.0.1:9/x.dtd"><p>x</p>',
        '<!DOCTYPE p [<!ENTITY % e SYSTEM "file:///etc/passwd"> %e;]><p>x</p>',
    ],
)
def test_entities_are_not_expanded(page: str) -> None:
    with pytest.raises(DataError, match="declares a document type"):
        xml_strings(page.encode(), ("p",))


@pytest.mark.parametrize("page", ["<p>", "<p>&undefined;</p>", "", "\x00"])
def test_broken_xml_is_refused(page: str) -> None:
    with pytest.raises(DataError, match="not well-formed"):
        xml_strings(page.encode(), ("p",))


def test_strings_of_html() -> None:
    page = """<html><head><style>p {x}</style><script>"<p>code</p>"</script></head><body><h1>A&nbsp;title</h1>
    <ul><li>one<p>inner &amp; text</p>after</li></ul><div>not asked</div><p>never <b>closed</body></html>"""
    assert html_strings(page, ("p", "h1", "li")) == ["A title", "inner & text", "oneafter", "never closed"]


def test_languages_are_told_by_their_script() -> None:
    assert is_written_in(TAMIL, "ta") and is_written_in(HINDI, "hi") and is_written_in(ENGLISH, "en")
    assert not is_written_in(ENGLISH, "hi") and not is_written_in(TAMIL, "hi") and not is_written_in(HINDI, "en")


def test_the_python_documentation_is_always_there(tmp_path: Path) -> None:
    report = fetch_corpus(tmp_path / "corpus", packages=False)
    assert list(report.languages) == ["en"] and report.bytes("en") > 300_000
    lines = (tmp_path / "corpus" / "en.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(len(json.loads(line)["text"].encode()) for line in lines) == report.bytes("en")
    assert "Python Software Foundation" in (tmp_path / "corpus" / "licences" / "python.txt").read_text()
    assert fetch_corpus(tmp_path / "corpus") == report, "fetched before: nothing is done"


def test_a_folder_of_something_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds something else"):
        fetch_corpus(tmp_path, packages=False)
    (tmp_path / "mine.txt").rename(tmp_path / "report.json")
    with pytest.raises(DataError, match="report.json is damaged"):
        fetch_corpus(tmp_path, packages=False)


def build_package(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A real archive of these files, with a link out of it."""
    root = folder / "tree"
    for file, content in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(content, encoding="utf-8")
    (root / "usr/share/help/ta/link.page").symlink_to(folder / "outside.page")
    (folder / "outside.page").write_text(MALLARD.replace(TAMIL, "வெளியே உள்ள ஒரு பக்கத்தின் உரை இது."))
    (root / "DEBIAN").mkdir()
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    (root / "DEBIAN/control").write_text(control)
    archive = folder / f"{name}_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(root), str(archive)], check=True, capture_output=True)
    return archive


@pytest.mark.skipif(which("dpkg-deb") is None, reason="needs dpkg-deb, which Debian and Ubuntu have")
def test_packages_are_unpacked_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build").mkdir()
    archive = build_package(
        tmp_path / "build",
        "gnome-user-docs",
        {
            "usr/share/help/ta/a/one.page": MALLARD,
            "usr/share/help/ta/two.page": MALLARD,  # all of it was seen before
            "usr/share/help/C/one.page": f"<page><p>{ENGLISH}</p><p>too short</p></page>",
            "usr/share/help/ta/bad.page": '<!DOCTYPE p [<!ENTITY a "x">]><p>&a;</p>',
            "usr/share/doc/gnome-user-docs/copyright": "CC-BY-SA-3.0",
        },
    )
    monkeypatch.setattr(fetch, "_download", lambda package, scratch: archive)
    monkeypatch.setattr(fetch, "PACKAGES", {"gnome-user-docs": fetch.PACKAGES["gnome-user-docs"]})
    report = fetch_corpus(tmp_path / "corpus")
    (line,) = (tmp_path / "corpus" / "ta.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "text": f"{TAMIL} inline <b>\n{TAMIL}",
        "source": "gnome-user-docs",
        "page": "ta/a/one.page",
    }
    assert report.languages["en"]["gnome-user-docs"] == len(ENGLISH)
    assert report.missing == []
    assert (tmp_path / "corpus" / "licences" / "gnome-user-docs.txt").read_text() == "CC-BY-SA-3.0"


def test_a_system_without_apt_gets_english_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = fetch_corpus(tmp_path / "corpus")
    assert list(report.languages) == ["en"]
    assert len(report.missing) == 2
    assert "apt-get is not on this system; Debian and Ubuntu have it" in report.missing[0]


def test_a_download_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("apt-get", "dpkg-deb"):
        tool = tmp_path / "bin" / name
        tool.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    report = fetch_corpus(tmp_path / "corpus")
    assert "Unable to locate package" in report.missing[0] and "sudo apt-get update" in report.missing[0]


def test_a_report_counts_all_sources() -> None:
    assert Fetched({"hi": {"a": 2, "b": 3}}).bytes("hi") == 5
    assert Fetched().bytes("hi") == 0
