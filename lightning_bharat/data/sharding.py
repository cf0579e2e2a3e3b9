"""The ways in which data ranks share prepared tokens, by name."""

from __future__ import annotations

from typing import Any, Literal

from lightning_bharat.data.budget import TokenBatches
from lightning_bharat.data.documents import TokenDocuments
from lightning_bharat.data.errors import DataError
from lightning_bharat.data.files import FileBatches
from lightning_bharat.data.lengths import LengthBatches
from lightning_bharat.data.order import OrderedBatches
from lightning_bharat.data.prepared import Prepared
from lightning_bharat.data.shared_batches import SharedBatches
from lightning_bharat.data.windows import TokenWindows

Sharding = Literal["rank", "file", "length", "tokens"]
TokenData = TokenWindows | TokenDocuments


def refuse_sharding(sharding: str, max_tokens: int | None) -> None:
    """Raise where the arguments do not fit together.

    Raises:
        DataError: says what to write.
    """
    if sharding not in (names := Sharding.__args__):  # type: ignore[attr-defined]
        raise DataError(f"sharding={sharding!r}: write one of {', '.join(map(repr, names))}")
    if sharding == "tokens" and max_tokens is None:
        raise DataError('sharding="tokens" needs max_tokens=, the tokens of a data rank in a step, with padding')
    if sharding != "tokens" and max_tokens is not None:
        raise DataError(f'max_tokens={max_tokens} is for sharding="tokens", and sharding={sharding!r}; leave one out')


def token_data(prepared: Prepared, split: str, sequence_length: int, sharding: Sharding) -> TokenData:
    """The samples of a split: documents by length and by tokens, else windows of packed documents."""
    stream = prepared.stream(split)
    if sharding in ("length", "tokens"):
        return TokenDocuments(stream, sequence_length, prepared.end_of_text)
    return TokenWindows(stream, sequence_length)


def token_batches(
    data: TokenData, sharding: Sharding, batch_size: int, max_tokens: int | None, **order: Any
) -> SharedBatches:
    """Batches of ``data`` for one data rank.

    Args:
        data: of :func:`token_data`.
        sharding: the way.
        batch_size: rows of a data rank in a step.
        max_tokens: its tokens, in place of rows.
        order: the other arguments of :class:`~lightning_bharat.data.OrderedBatches`.
    """
    if isinstance(data, TokenDocuments) and sharding == "tokens":
        assert max_tokens is not None
        return TokenBatches(data.lengths, max_tokens, **order)
    if isinstance(data, TokenDocuments) and sharding == "length":
        return LengthBatches(data.lengths, batch_size, **order)
    if isinstance(data, TokenWindows) and sharding == "file":
        return FileBatches(data.files(), batch_size, **order)
    return OrderedBatches(len(data), batch_size, **order)
