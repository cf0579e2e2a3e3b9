"""Numbers of samples or tokens that a person gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_bharat.data.errors import DataError

Counts = Sequence[int] | np.ndarray


def checked(name: str, counts: Counts, of_each: str, least: int) -> np.ndarray:
    """``counts`` as int64, shape (n,).

    Args:
        name: of the argument.
        counts: one whole number of at least ``least`` for each.
        of_each: what each number belongs to.
        least: the smallest that there may be.

    Raises:
        DataError: they are something else.
    """
    found = np.asarray(counts)
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{name} of shape {found.shape} and {found.dtype}: give one whole number for each {of_each}")
    if found.min() < least:
        number = int(found.argmin())
        raise DataError(f"{name}[{number}]={found[number]}: write {least} or more, or leave that {of_each} out")
    return found.astype(np.int64)
