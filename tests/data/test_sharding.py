"""By length, by token budget and by file: disjoint, complete, equal steps, and gone on with anywhere on other ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from lightning_bharat.data import DataError, FileBatches, LengthBatches, OrderedLoader, TokenBatches
from lightning_bharat.data.lengths import padded
from lightning_bharat.data.shared_batches import SharedBatches

Steps = list[list[list[int]]]  # the samples of each rank in each step
ALL = settings(max_examples=60, deadline=None)
RANKS = st.integers(1, 8)


def on(ranks: int, kind: Callable[..., Any], *args: Any, **options: Any) -> list[SharedBatches]:
    return [kind(*args, num_replicas=ranks, rank=rank, **options) for rank in range(ranks)]


def steps_of(batches: list[SharedBatches], epoch: int | None = None) -> Steps:
    if epoch is not None:
        for rank in batches:
            rank.go_to(epoch)
    return [list(step) for step in zip(*batches, strict=True)]


def joined(steps: Steps) -> list[list[int]]:
    return [list(chain(*step)) for step in steps]


def check_epochs(batches: list[SharedBatches], samples: int, drop_last: bool, most_dropped: int) -> list[Steps]:
    epochs = [steps_of(batches, epoch) for epoch in (0, 5)]
    for steps in epochs:
        read = list(chain.from_iterable(joined(steps)))
        assert len(set(read)) == len(read) and set(read) <= set(range(samples))
        assert len(steps) == len(batches[0]) == len(batches[-1])
        assert all(batch for step in steps for batch in step), "no rank stands without a sample"
        assert samples - len(read) <= (most_dropped if drop_last else 0)
    return epochs


@ALL
@given(st.lists(st.integers(1, 99), min_size=1, max_size=90), st.integers(1, 5), RANKS, st.booleans())
def test_by_length(lengths: list[int], batch_size: int, ranks: int, drop_last: bool) -> None:
    try:
        batches = on(ranks, LengthBatches, lengths, batch_size, drop_last=drop_last)
    except DataError:
        assert len(lengths) < (batch_size * ranks if drop_last else ranks)
        return
    for steps in check_epochs(batches, len(lengths), drop_last, batch_size * ranks - 1):
        spans = sorted((min(found), max(found)) for found in _widths(steps, lengths))
        assert all(one[1] <= other[0] for one, other in pairwise(spans)), "buckets do not overlap"


def _widths(steps: Steps, lengths: list[int]) -> list[list[int]]:
    return [[padded(lengths[sample]) for sample in step] for step in joined(steps)]


@ALL
@given(st.lists(st.integers(1, 64), min_size=1, max_size=90), st.integers(64, 400), RANKS, st.booleans())
def test_by_tokens(lengths: list[int], max_tokens: int, ranks: int, drop_last: bool) -> None:
    try:
        batches = on(ranks, TokenBatches, lengths, max_tokens, drop_last=drop_last)
    except DataError as error:
        if drop_last:
            assert len(lengths) < max(8, ranks), error
        else:  # each rank has one sample in a step, and there is one too many or too few
            assert len(lengths) % ranks and (len(lengths) < 2 * ranks or 2 * padded(max(lengths)) > max_tokens), error
        return
    for steps in check_epochs(batches, len(lengths), drop_last, max(8, ranks) - 1):
        for batch in chain.from_iterable(steps):
            assert len(batch) * max(padded(lengths[sample]) for sample in batch) <= max_tokens


@ALL
@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 4), RANKS, st.booleans())
def test_by_file(sizes: list[int], batch_size: int, ranks: int, drop_last: bool) -> None:
    try:
        batches = on(ranks, FileBatches, sizes, batch_size, drop_last=drop_last)
    except DataError:
        assert sum(map(bool, sizes)) < ranks or sum(sizes) < batch_size * ranks
        return
    epochs = check_epochs(batches, sum(sizes), drop_last, batch_size * ranks - 1)
    files = np.repeat(np.arange(len(sizes)), sizes)
    ends = np.cumsum(list(map(len, joined(epochs[0]))))
    own = int((ends <= round(batches[0].own_share * sum(sizes))).sum())
    read = [{files[s] for steps in epochs for step in steps[:own] for s in step[rank]} for rank in range(ranks)]
    assert sum(map(len, read)) == len(set().union(*read)), "each file by one rank, in all epochs"


def test_lanes_are_as_even_as_can_be() -> None:
    sizes = np.array([70, 10, 40, 30, 50])
    batches = FileBatches(sizes, 4)
    assert sorted(int(sizes[files].sum()) for files in batches.files.files) == [40, 40, 50, 70]
    assert batches.own_share == 4 * 40 / 200


LENGTHS = np.random.default_rng(3).integers(1, 120, 300)
FILES = np.random.default_rng(4).integers(5, 60, 12)
WAYS: dict[str, tuple[Callable[..., Any], Any, int, int]] = {
    "length": (LengthBatches, LENGTHS, 16, 300),
    "tokens": (TokenBatches, LENGTHS, 1600, 300),
    "file": (FileBatches, FILES, 16, int(FILES.sum())),
}
way = pytest.mark.parametrize("way", WAYS)


def made(way: str, ranks: int, whole: int | None = None, **options: Any) -> list[SharedBatches]:
    kind, counts, every, _ = WAYS[way]
    return on(ranks, kind, counts, (whole or every) // ranks, **options)


@way
def test_ranks_together_are_one_process(way: str) -> None:
    for epoch in (0, 1):
        alone = joined(steps_of(made(way, 1), epoch))
        for ranks in (2, 4, 8):
            steps = joined(steps_of(made(way, ranks), epoch))
            if way == "file":  # ranks take turns: the same rows in another order
                assert list(map(sorted, steps)) == list(map(sorted, alone))
            else:
                assert steps == alone


@way
def test_epochs_and_seeds_have_orders_of_their_own(way: str) -> None:
    orders = [joined(steps_of(made(way, 2, seed=seed), epoch)) for seed in (0, 1) for epoch in (0, 1)]
    members = [{frozenset(step) for step in order} for order in orders]
    for i, one in enumerate(members):
        assert all(len(one & other) < len(one) / 2 for other in members[:i]), "who is together is drawn anew"
    assert joined(steps_of(made(way, 2, shuffle=False), 0)) == joined(steps_of(made(way, 2, shuffle=False), 1))


@way
@pytest.mark.parametrize("before, after", [(1, 2), (4, 2), (2, 8)])
def test_gone_on_with_behind_every_step_on_other_ranks(way: str, before: int, after: int) -> None:
    whole = [sorted(step) for step in joined(steps_of(made(way, before), 2))]
    (stopped, *_), resumed = made(way, before), made(way, after)
    stopped.go_to(2)
    for done in range(len(whole) + 1):
        for rank in resumed:
            rank.load_state_dict(stopped.state_dict(done))
        assert resumed[0].left() == len(whole) - done
        assert [sorted(step) for step in joined(steps_of(resumed))] == whole[done:]
        assert resumed[-1].state_dict() == {**stopped.state_dict(done), **_own(resumed[-1].state_dict())}


def _own(state: dict[str, Any]) -> dict[str, Any]:
    return {"rules": state["rules"]} if "rules" in state else {}


@way
@pytest.mark.parametrize("ranks, whole", [(3, 0.75), (1, 1.5), (6, 3)])
def test_gone_on_with_otherwise_what_is_left_is_read_once(way: str, ranks: int, whole: float) -> None:
    """Twice in an epoch, with other rows in a step, on numbers of ranks that divide nothing."""
    samples, every = WAYS[way][3], WAYS[way][2]
    first, second = made(way, 2, drop_last=False), made(way, ranks, int(every * whole), drop_last=False)
    third = made(way, 2, every * 2, drop_last=False)
    for stop in (0, 1, 4):
        read = list(chain.from_iterable(joined(steps_of(first, 1)[:stop])))
        for rank in second:
            rank.go_to(0)
            first[0].go_to(1)
            rank.load_state_dict(first[0].state_dict(stop))
        read += chain.from_iterable(joined(list(islice(steps_of(second), 2))))
        for rank in third:
            rank.load_state_dict(second[0].state_dict(2))
        last = steps_of(third)
        assert {len(rank) for rank in last} == {2} and len(last) == third[0].left()
        read += chain.from_iterable(joined(last))
        assert sorted(read) == list(range(samples))


class Numbers(Dataset[int]):
    """The samples are their own numbers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


@way
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_counts_what_was_consumed(way: str, workers: int) -> None:
    def loader(ranks: int = 1) -> list[OrderedLoader]:
        dataset = Numbers(WAYS[way][3])
        return [OrderedLoader(dataset, batches, num_workers=workers, collate_fn=list) for batches in made(way, ranks)]

    (whole,), (stopped,) = loader(), loader()
    list(stopped)
    list(whole)
    second = list(whole)
    running = iter(stopped)
    seen = list(islice(running, 3))  # with workers, more were fetched
    state = stopped.state_dict()
    assert seen == second[:3] and state["epoch"] == 1 and state["position"] == sum(map(len, seen))
    resumed = loader(2)
    for rank in resumed:
        rank.load_state_dict(state)
    rest = [sorted(step) for step in joined([list(step) for step in zip(*resumed, strict=True)])]
    assert rest == list(map(sorted, second[3:]))
    assert [len(list(rank)) for rank in resumed] == [len(whole)] * 2, "the next epoch is a whole one"


@way
def test_a_size_that_comes_after_the_place(way: str) -> None:
    """The strategy keeps the batch of all ranks together when the loader has been given its place already."""
    (stopped,) = made(way, 1)
    state, every = stopped.state_dict(3), WAYS[way][2]
    late = made(way, 2, every * 2)
    for rank in late:
        rank.load_state_dict(state)
        rank.resize(every // 2)
    assert list(map(sorted, joined(steps_of(late)))) == list(map(sorted, joined(steps_of([stopped]))))[3:]


REFUSED: dict[str, Callable[[], Any]] = {
    r"sample 1 has 65 tokens, padded to 72, over max_tokens=70 .* write max_tokens=72": lambda: tokens([8, 65], 70),
    r"max_tokens=0: write a whole number": lambda: tokens([8], 0),
    r"lengths\[1\]=0: write 1 or more, or leave that sample out": lambda: tokens([8, 0], 80),
    r"lengths\[0\]=-3": lambda: LengthBatches([-3, 4], 1),
    r"lengths of shape \(0,\)": lambda: LengthBatches([], 1),
    r"lengths of shape \(1, 2\)": lambda: LengthBatches(np.ones((1, 2), int), 1),
    r"lengths of shape \(2,\) and float64: give one whole number": lambda: tokens([8.5, 2.0], 80),
    r"2 samples are fewer than one step of batch_size=4": lambda: LengthBatches([3, 4], 4),
    r"batch_size=0": lambda: LengthBatches([3, 4], 0),
    r"rank=2 is not one of the 2": lambda: LengthBatches([3, 4], 1, num_replicas=2, rank=2),
    r"3 samples are fewer than one step of max_tokens=80": lambda: tokens([3] * 3, 80, num_replicas=4),
    r"3 samples can't be shared by 2": lambda: tokens([8] * 3, 8, num_replicas=2, drop_last=False),
    r"sizes of shape \(0,\)": lambda: FileBatches([], 1),
    r"sizes\[1\]=-1": lambda: FileBatches([3, -1], 1),
    r"2 files with samples are fewer than 3 data ranks": lambda: FileBatches([9, 0, 9], 1, num_replicas=3),
    r"has 5 samples, and LengthBatches shares 4": lambda: OrderedLoader(Numbers(5), LengthBatches([1] * 4, 1)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_can_not_be_used_is_refused(words: str) -> None:
    with pytest.raises(DataError, match=words):
        REFUSED[words]()


def tokens(lengths: list, *args: Any, **options: Any) -> TokenBatches:
    return TokenBatches(lengths, *args, **options)


@pytest.mark.parametrize(
    "other, words",
    [
        (lambda: LengthBatches(LENGTHS, 16), "samples were shared in another way"),
        (lambda: TokenBatches(LENGTHS[::-1], 1600), "the lengths of samples"),
        (lambda: TokenBatches(LENGTHS, 1600, seed=1), "another seed"),
    ],
)
def test_a_place_in_another_order_is_refused(other: Callable[[], Any], words: str) -> None:
    saved, loader = (OrderedLoader(Numbers(300), batches) for batches in (TokenBatches(LENGTHS, 1600), other()))
    with pytest.raises(DataError, match=words):
        loader.load_state_dict(saved.state_dict())
