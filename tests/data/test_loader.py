"""Resume in the middle of an epoch: exactly what is left, on any number of data ranks, with and without workers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pytest
from torch.utils.data import Dataset

from lightning_bharat.data import DataError, OrderedBatches, OrderedLoader

SAMPLES = 48


class Numbers(Dataset[list[int]]):
    """The samples are their own numbers."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


def loaders(ranks: int, batch_size: int, workers: int = 0, data: str = "d", **options: Any) -> list[OrderedLoader]:
    def batches(rank: int) -> OrderedBatches:
        return OrderedBatches(SAMPLES, batch_size, num_replicas=ranks, rank=rank, **options)

    return [OrderedLoader(Numbers(), batches(rank), num_workers=workers, data=data) for rank in range(ranks)]


def global_batches(ranks: list[OrderedLoader]) -> Iterator[list[int]]:
    """What all ranks get in each step of an epoch, one rank behind another."""
    for parts in zip(*map(iter, ranks), strict=True):
        yield list(chain(*parts))


def samples(batches: Iterator[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (2, 1), (1, 4), (4, 2)])
def test_resume_in_the_middle_of_an_epoch(before: int, after: int, workers: int) -> None:
    whole = loaders(1, 8)
    first, second = samples(global_batches(whole)), samples(global_batches(whole))

    stopped = loaders(before, 8 // before, workers)
    list(global_batches(stopped))  # the first epoch
    running = global_batches(stopped)
    seen = samples(islice(running, 2))  # with workers, more than two steps were fetched
    states = [rank.state_dict() for rank in stopped]
    running.close()
    assert all(state == states[0] for state in states), "the state does not depend on the rank"
    assert states[0]["position"] == 16 and states[0]["epoch"] == 1

    resumed = loaders(after, 8 // after, workers)
    for rank in resumed:
        rank.load_state_dict(states[0])
    assert seen + samples(global_batches(resumed)) == second
    third = samples(global_batches(resumed))
    assert third == samples(global_batches(whole)) and third not in (first, second)


def test_resume_with_another_whole_batch_takes_what_is_left() -> None:
    whole = samples(global_batches(loaders(1, 8)))
    stopped = loaders(2, 3)
    seen = samples(islice(global_batches(stopped), 3))  # 18 samples
    resumed = loaders(2, 5)
    for rank in resumed:
        rank.load_state_dict(stopped[0].state_dict())
    assert seen + samples(global_batches(resumed)) == whole  # 30 are left: three steps of 10


def test_the_state_is_not_changed_by_going_on() -> None:
    (loader,) = loaders(1, 8)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    kept = dict(state)
    next(batches)
    loader.load_state_dict(state)
    next(iter(loader))
    assert state == kept


def test_an_epoch_left_early_is_followed_by_the_next() -> None:
    (whole,), (loader,) = loaders(1, 8), loaders(1, 8)
    list(whole)
    next(iter(loader))
    assert list(loader) == list(whole)


def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next() -> None:
    (whole,), (loader,) = loaders(1, 8), loaders(1, 8)
    list(whole)
    state = whole.state_dict()
    loader.load_state_dict(state)
    assert list(loader) == list(whole)


def test_an_announced_epoch_is_begun_or_gone_on_with() -> None:
    (whole,) = loaders(1, 8)
    epochs = [list(whole) for _ in range(4)]
    (loader,) = loaders(1, 8)
    loader.batch_sampler.set_epoch(3)
    assert list(loader) == epochs[3]
    loader.batch_sampler.set_epoch(3)
    batches = iter(loader)
    assert [next(batches), next(batches)] == epochs[3][:2], "announced again: from its beginning"
    state = loader.state_dict()
    loader.load_state_dict(state)
    loader.batch_sampler.set_epoch(3)
    assert list(loader) == epochs[3][2:], "announced after a state: from its position"


@pytest.mark.parametrize(
    "other, words",
    [
        ({"data": "e"}, "these are other data"),
        ({"seed": 1}, "another seed"),
        ({"shuffle": False}, "one is shuffled and the other is not"),
    ],
)
def test_a_position_in_another_order_is_refused(other: dict[str, Any], words: str) -> None:
    (saved,), (loader,) = loaders(1, 8), loaders(1, 8, **other)
    with pytest.raises(DataError, match=words):
        loader.load_state_dict(saved.state_dict())


def test_a_rest_too_small_for_the_ranks_is_refused() -> None:
    (saved,) = loaders(1, 9, drop_last=False)
    batches = iter(saved)
    list(islice(batches, 5))  # 3 of 48 are left
    state = saved.state_dict()
    with pytest.raises(DataError, match="3 samples are left of this epoch for 4 data ranks"):
        loaders(4, 2, drop_last=False)[0].load_state_dict(state)
