"""A batch in equal parts along its batch dimension, for the schedules of pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Split = Callable[[Any, int], list[Any]]


class MicrobatchError(ValueError):
    """A batch that can't be split; the message says what to write."""


def batch_size(batch: Any) -> int:
    """Samples in ``batch``: the length of its first tensor (or list) along dimension 0.

    Raises:
        MicrobatchError: it has none.
    """
    for leaf in tree_flatten(batch, is_leaf=_is_samples)[0]:
        if _length(leaf) is not None:
            return _length(leaf) or 0
    raise MicrobatchError(
        f"the batch ({type(batch).__name__}) has no tensor with a batch dimension, so a pipeline can't split it into "
        "micro-batches; write microbatch_fn=function(batch, number) that returns a list of batches"
    )


def parts(size: int, wanted: int) -> int:
    """The most equal parts, up to ``wanted``, that ``size`` samples can be split into.

    >>> parts(8, 4), parts(6, 4), parts(5, 4)
    (4, 3, 1)
    """
    return max(n for n in range(1, max(min(size, wanted), 1) + 1) if size % n == 0)


def split(batch: Any, number: int) -> list[Any]:
    """``batch`` in ``number`` equal parts: tensors and lists as long as the batch are divided along dimension 0, all
    else is in each part.
    """
    if number == 1:
        return [batch]
    size = batch_size(batch)
    leaves, spec = tree_flatten(batch, is_leaf=_is_samples)
    each = size // number
    whole = [_length(leaf) == size for leaf in leaves]
    return [
        tree_unflatten(
            [leaf[i * each : (i + 1) * each] if cut else leaf for leaf, cut in zip(leaves, whole, strict=True)], spec
        )
        for i in range(number)
    ]


def doubt(batch: Any) -> str:
    """Words that say so where a vector of ``batch`` may have a time dimension as long as the batch; else ""."""
    size = batch_size(batch)
    tensors = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
    vectors = [t for t in tensors if t.ndim == 1 and len(t) == size]
    square = next((t for t in tensors if t.ndim > 1 and t.shape[0] == t.shape[1] == size), None)
    if vectors and square is not None and not all(t.ndim == 1 for t in tensors):
        return (
            f"The batch has a tensor of shape {list(square.shape)} and one of [{size}], which was split with it. If "
            "the latter has no batch dimension, write microbatch_fn=function(batch, number) that returns a list of "
            f"batches, or use another batch size than {size}"
        )
    return ""


def _is_samples(value: Any) -> bool:
    """A list with something for each sample that is not a tensor (texts)."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, (str, bytes)) for x in value)


def _length(leaf: Any) -> int | None:
    if isinstance(leaf, Tensor):
        return len(leaf) if leaf.ndim else None
    return len(leaf) if _is_samples(leaf) else None
