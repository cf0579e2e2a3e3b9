"""benchmarks/context.py: what a rank keeps is its part of the sequence, and the longest one is found."""

from __future__ import annotations

import pytest

from benchmarks import context
from tests.ranks import run_ranks


def test_each_rank_keeps_its_part() -> None:
    (whole,), parts = run_ranks(context.kept, 1, 1, 64), run_ranks(context.kept, 2, 2, 128)
    assert parts[0] == parts[1]
    assert parts[0] == pytest.approx(whole, rel=0.08)


@pytest.mark.parametrize(("outside", "longest"), [(0, 512), (10, 464), (100, 336)])
def test_the_longest_is_found(outside: int, longest: int) -> None:
    """Of a model that keeps 100 bytes a position in blocks, and some outside of them."""

    def kept(ranks: int, time: int) -> int:
        return time * (100 // ranks + outside)

    found = context.longest(2, 256, 25_600 + 256 * outside, kept)
    assert (found.longest, found.next) == (longest, longest + 16)
    assert found.kept <= 256 * (100 + outside) < found.over
