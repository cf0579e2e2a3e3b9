"""The statistics and the turns that benchmarks stand on, by numbers that are known."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from itertools import permutations

import pytest

from benchmarks.paired import Interval, Turns, alternate, is_void, median_interval, orders, paired_ratio


def test_interval_of_two_hundred_values_lies_between_the_tabled_ones() -> None:
    assert median_interval(range(1, 201)) == Interval(100.5, 86, 115)


def test_interval_covers_the_true_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    skewed = ([draw.lognormvariate(0, 1) for _ in range(40)] for _ in range(2000))  # its median is 1
    found = [median_interval(values) for values in skewed]
    covered = sum(interval.low <= 1 <= interval.high for interval in found) / len(found)
    assert 0.95 <= covered < 0.98


def test_too_few_values_have_no_interval() -> None:
    assert median_interval([1, 2, 3, 4, 5, 6]) == Interval(3.5, 1, 6)
    with pytest.raises(ValueError, match="5 values are too few"):
        median_interval([1, 2, 3, 4, 5])


def test_ratio_is_that_of_pairs_whatever_disturbs_both() -> None:
    draw = random.Random(0)
    disturbed = [draw.uniform(1, 50) for _ in range(200)]
    ratio = paired_ratio([1.2 * x for x in disturbed], disturbed)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.2, 1.2, 1.2))


@pytest.mark.parametrize(("null", "void"), [(0.96, True), (0.97, False), (1.0, False), (1.03, False), (1.04, True)])
def test_a_peer_that_differs_from_itself_makes_a_run_void(null: float, void: bool) -> None:
    assert is_void(Interval(null, null - 0.1, null + 0.1)) == void


def test_orders_are_the_same_on_all_ranks_and_equally_often() -> None:
    names = ["ours", "peer", "null"]
    found = list(orders(names, 60, seed=1))
    assert found == list(orders(names, 60, seed=1)) != list(orders(names, 60, seed=2))
    assert Counter(found) == dict.fromkeys(permutations(names), 10)


class Clock:
    """Goes on only when a loop works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_step_is_all_that_a_loop_does_between_two_batches() -> None:
    clock, taken, setup = Clock(), [], []

    def loop(batches: Iterable[int]) -> None:
        clock.now += 1000
        setup.append(next(iter(batches)))  # a look ahead of the loop
        for batch in batches:
            taken.append(batch)
            clock.now += batch

    turns = Turns(loop, [1, 2, 3, 4, 5], clock)
    turns.begin()
    assert (setup, taken) == ([1], [1])
    assert [turns.step(), turns.step(), turns.step()] == [2, 3, 4]
    turns.end()
    assert taken == [1, 2, 3, 4]


def test_loops_take_turns_after_all_ranks_have_met() -> None:
    clock, log = Clock(), []

    def loop(name: str, seconds: int, batches: Iterable[int]) -> None:
        for _ in batches:
            log.append(name)
            clock.now += seconds

    loops = {
        name: Turns(lambda batches, name=name, seconds=seconds: loop(name, seconds, batches), range(10), clock)
        for name, seconds in (("a", 1), ("b", 2))
    }
    for turns in loops.values():
        turns.begin()
    log.clear()
    found = alternate(loops, 4, lambda: log.append("together"))
    assert found == {"a": [1] * 4, "b": [2] * 4}
    assert log[::2] == ["together"] * 8
    assert Counter(log[1::2]) == {"a": 4, "b": 4}


def test_an_error_in_a_loop_is_raised_where_it_is_told_to_advance() -> None:
    def loop(batches: Iterable[int]) -> None:
        for batch in batches:
            if batch == 3:
                raise ZeroDivisionError("batch 3")

    turns = Turns(loop, [1, 2, 3, 4])
    turns.begin()
    turns.step()
    with pytest.raises(ZeroDivisionError, match="batch 3"):
        turns.step()
