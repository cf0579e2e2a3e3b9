"""Steps of as many samples as fit in a number of tokens."""

from __future__ import annotations

import numpy as np

from lightning_bharat.data.errors import DataError

ROWS = 8  # rows of a step are a multiple of it on the numbers of data ranks that divide it


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
