"""The global order: complete, the same on every layout, and shared without a gap or a repeat."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bharat.data import DataError, GlobalOrder, OrderedBatches, Steps


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_an_epoch_holds_every_sample_once(length: int, seed: int, epoch: int) -> None:
    assert sorted(GlobalOrder(length, seed)(epoch, 0, length)) == list(range(length))


def test_a_position_is_known_without_those_before_it() -> None:
    order = GlobalOrder(10_007, seed=3)
    whole = order(5, 0, 10_007)
    assert (order(5, 4_000, 4_100) == whole[4_000:4_100]).all()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [GlobalOrder(1000, seed)(epoch, 0, 1000).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    # By chance two orders agree at one place of them; a shift or a mirror would agree at many or none of the pairs.
    assert all(np.equal(one, other).sum() < 10 for i, one in enumerate(orders) for other in orders[:i])


def test_every_sample_is_as_likely_at_every_place() -> None:
    length, draws = 10, 4000
    counts = np.zeros((length, length))
    for seed in range(draws):
        counts[np.arange(length), GlobalOrder(length, seed)(0, 0, length)] += 1
    expected = draws / length
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 144  # 81 degrees of freedom: above this by chance once in 50,000 times


def test_the_order_is_fixed_for_good() -> None:
    # A checkpoint's position means nothing when this changes: then Steps and GlobalOrder need a new format.
    assert GlobalOrder(10, seed=1)(2, 0, 10).tolist() == FIXED_ORDER


FIXED_ORDER = [3, 8, 0, 5, 1, 4, 7, 6, 2, 9]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("length", [24, 29, 31])
def test_ranks_together_are_one_process(length: int, drop_last: bool) -> None:
    def epoch(ranks: int) -> list[list[list[int]]]:
        shares = [
            OrderedBatches(length, 8 // ranks, num_replicas=ranks, rank=r, drop_last=drop_last) for r in range(ranks)
        ]
        return [list(share) for share in shares]

    (alone,) = epoch(1)
    for ranks in (2, 4):
        shares = epoch(ranks)
        assert {len(share) for share in shares} == {len(alone)}
        joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
        assert joined == alone
    samples = list(chain(*alone))
    assert len(set(samples)) == len(samples) == (length // 8 * 8 if drop_last else length)


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    ranks=st.integers(1, 5),
    start=st.integers(0, 59),
    drop_last=st.booleans(),
)
def test_steps_leave_no_gap_and_no_rank_empty(
    length: int, batch_size: int, ranks: int, start: int, drop_last: bool
) -> None:
    start = min(start, length)
    left = length - start
    if not drop_last and 0 < left < ranks:
        with pytest.raises(DataError, match="each needs one"):
            Steps(length, batch_size, ranks, drop_last, start)
        return
    steps = Steps(length, batch_size, ranks, drop_last, start)
    shares = [[steps.share(step, rank) for rank in range(ranks)] for step in range(len(steps))]
    positions = [place for step in shares for begin, end in step for place in range(begin, end)]
    whole = left // (batch_size * ranks) * batch_size * ranks if drop_last else left
    assert positions == list(range(start, start + whole))
    sizes = [end - begin for step in shares for begin, end in step]
    assert min(sizes, default=1) >= 1
    assert max(sizes, default=1) <= max(batch_size, 2)  # 2: with batch_size=1 a rest may join the step before it


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 samples are fewer .* batch_size=2 on 2 data ranks = 4; write batch_size=1"):
        OrderedBatches(3, 2, num_replicas=2)
    with pytest.raises(DataError, match="rank=2 is not one of the 2 data ranks"):
        OrderedBatches(30, 2, num_replicas=2, rank=2)
    with pytest.raises(DataError, match="batch_size=0"):
        OrderedBatches(30, 0)
