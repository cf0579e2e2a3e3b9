"""A few of `make chaos`'s kills of controllers and ranks: see kills.py."""

from __future__ import annotations

import pytest

from tests.tuning import kills


@pytest.mark.parametrize(
    ("point", "at"),
    [
        ("after ask", 2),
        ("attributes written, not told", 1),
        ("failed, successor not there", 1),
        ("rank in a checkpoint", 2),
    ],
)
def test_a_study_goes_on_after_a_kill(point: str, at: int) -> None:
    assert kills.check(point, at) == []
