"""docs/callbacks.md names every callback of the Lightning that is installed, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from lightning.pytorch import callbacks

PAGE = Path(__file__).parents[2] / "docs/callbacks.md"


def test_every_callback_has_a_row() -> None:
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[1])]
    assert sorted(names) == sorted(callbacks.__all__)
    for row in rows:
        (test,) = re.findall(r"`([\w./]+\.py)`", row[4])
        assert (Path(__file__).parent / test).is_file(), test
