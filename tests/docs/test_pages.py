"""What pages point at exists: links, the modules and tests of features.md; and snippets that say so run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STATES = {"works on CPU ranks", "works on GPU", "written, not run", "not yet"}


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_slug, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path) -> None:
    for snippet in re.findall(r"```python\n# runnable\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(snippet, page.name, "exec"), {})


def test_features_has_all_rows_and_says_what_is_there() -> None:
    lines = (ROOT / "docs/features.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if re.match(r"\| \d\.\d\.\d ", line)]
    assert len(rows) == len({row[0] for row in rows}) == 130
    for number, _, state, module, test, command in rows:
        assert state in STATES, number
        if state == "not yet":
            assert module == test == command == "–", number
            continue
        assert "`" in command, number
        for path in (module, test):
            assert (ROOT / path.strip("`")).exists(), f"{number}: {path}"
