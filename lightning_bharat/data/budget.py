"""Batches of as many samples of like length as fit in a number of tokens."""

from __future__ import annotations

import numpy as np

from lightning_bharat.data.counts import Counts
from lightning_bharat.data.errors import DataError
from lightning_bharat.data.lengths import LengthBatches, Rule

ROWS = 8  # rows of a step are a multiple of it on the numbers of data ranks that divide it


class TokenBatches(LengthBatches):
    """By token budget: a step takes as many samples of like length as fit in ``max_tokens`` on each data rank.

    What counts are the tokens of a rank's batch with padding: its rows × its longest sample, rounded up to a multiple
    of 8. Otherwise it is :class:`LengthBatches`, and depends on ``max_tokens`` × data ranks in place of rows.

    Rows of a step are a multiple of 8 over all data ranks, or 4, 2 or 1 where fewer fit, so that the steps of 1, 2, 4
    and 8 data ranks with the same tokens together are the same steps; on other numbers of data ranks they are a
    multiple of that number. (fairseq's ``required_batch_size_multiple`` is 8 on each rank.)

    Args:
        lengths: of each sample, in tokens.
        max_tokens: of a data rank in a step.
        num_replicas: number of data ranks.
        rank: which of them this is.
        seed: of the order.
        shuffle: as in :class:`LengthBatches`.
        drop_last: leave out the rest of fewer rows than such a multiple, of the shortest samples; or it is a smaller
            step.

    Raises:
        DataError: a length is below 1 or, rounded up, over ``max_tokens``; or samples cannot be shared by the ranks.
    """

    sharding = "tokens"
    unit = "tokens"

    def __init__(
        self,
        lengths: Counts,
        max_tokens: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        share = {"num_replicas": num_replicas, "rank": rank}
        super().__init__(lengths, max_tokens, **share, seed=seed, shuffle=shuffle, drop_last=drop_last)

    def resize(self, batch_size: int) -> None:
        if batch_size < 1:
            raise DataError(f"max_tokens={batch_size}: write a whole number from 1 up")
        longest = int(self._widths.argmax())
        if self._widths[longest] > batch_size:
            raise DataError(
                f"sample {longest} has {self._lengths[longest]} tokens, padded to {self._widths[longest]}, over "
                f"max_tokens={batch_size} of each of {self.num_replicas} data ranks; write "
                f"max_tokens={self._widths[longest]} or more, or cut samples shorter"
            )
        super().resize(batch_size)

    def _refuse_no_step(self) -> None:
        raise DataError(
            f"{self.length} samples are fewer than one step of max_tokens={self.batch_size} takes on "
            f"{self.num_replicas} data ranks; give more samples, or write drop_last=False"
        )

    def _slots(self, samples: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        slots = self._sorted(samples)
        order, sizes = fill(self._widths[slots], *rule)
        return slots[order], sizes


def fill(widths: np.ndarray, max_tokens: int, ranks: int, drop_last: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cut samples into steps of which each rank's equal share of rows, × the longest, is at most ``max_tokens``.

    Args:
        widths: of the samples, from the widest on; none is over ``max_tokens``.
        max_tokens: of a rank in a step.
        ranks: that share a step.
        drop_last: leave out a rest of fewer rows than a step may have, at the end; or it is a smaller step.

    Returns:
        The places of ``widths`` in the order of the steps, and the rows of each step.

    Raises:
        DataError: a rest of fewer rows than ranks must be kept, and no step has a row to spare for it.
    """
    sizes: list[int] = []
    place, multiple = 0, ROWS if ROWS % ranks == 0 else ranks
    while place < len(widths):
        rows = _rounded(max_tokens * ranks // int(widths[place]), multiple)
        if rows > len(widths) - place:
            rows = (len(widths) - place) // min(rows, multiple) * min(rows, multiple) if drop_last else 0
        if not rows:
            break
        sizes.append(rows)
        place += rows
    order = np.arange(len(widths))
    if (left := len(widths) - place) and not drop_last:
        if left < ranks:
            order = _borrow(order, sizes, ranks - left, ranks)
        sizes.append(max(left, ranks))
    return order, np.array(sizes, dtype=np.int64)


def _rounded(rows: int, multiple: int) -> int:
    """The largest multiple up to ``rows``, or the largest of its halves."""
    while multiple > rows:
        multiple //= 2
    return rows - rows % multiple


def _borrow(order: np.ndarray, sizes: list[int], rows: int, ranks: int) -> np.ndarray:
    """Move ``rows`` from the last step that keeps one for each rank to the end."""
    lenders = [step for step, size in enumerate(sizes) if size >= ranks + rows]
    if not lenders:
        raise DataError(
            f"drop_last=False: {len(order)} samples can't be shared by {ranks} data ranks such that each has one in "
            "every step, within max_tokens; write drop_last=True, or a larger max_tokens"
        )
    sizes[lenders[-1]] -= rows
    end = sum(sizes[: lenders[-1] + 1])
    return np.concatenate([order[:end], order[end + rows :], order[end : end + rows]])
