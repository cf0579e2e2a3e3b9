"""The one error of checkpoints, and how all ranks come to raise it together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that can't be written, or can't be loaded here; the message says what is wrong and what to do."""


class WriteError(CheckpointError):
    """A checkpoint that could be written if the disk, or another rank, let it; training can go on without it."""


@contextmanager
def disk_errors() -> Iterator[None]:
    """What is raised in here is for the disk or the other ranks to mend.

    Raises:
        WriteError: in place of a :class:`CheckpointError` or ``OSError``.
    """
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise WriteError(in_words(error)) from error


def on_rank_zero(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, given to every rank. All ranks must call it; only rank 0 runs ``function``.

    Raises:
        CheckpointError: on every rank, with rank 0's words, where ``function`` failed.
    """
    if not dist.is_initialized():
        return function()
    box: list[Any] = [None, ""]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as raised:
            error, box[1] = raised, in_words(raised)
    dist.broadcast_object_list(box, src=0)
    if box[1]:
        raise CheckpointError(box[1]) from error
    return box[0]


def together(function: Callable[[], T]) -> T:
    """Run ``function`` on every rank; where one fails, all raise. All ranks must call it.

    Raises:
        CheckpointError: with the words of the first rank that failed.
    """
    if not dist.is_initialized():
        return function()
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    words: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(words, in_words(error) if error else "")
    for said in words:
        if said and isinstance(error, CheckpointError) and str(error) == said:
            raise error  # as it is: a chain would print the words twice
        if said:
            raise CheckpointError(said) from error
    return result  # type: ignore[return-value]


def on_all_ranks(value: T) -> list[T]:
    """What every rank has, by ranks. All ranks must call it."""
    if not dist.is_initialized():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def highest_of_all(values: Sequence[int]) -> list[int]:
    """Each of ``values`` as the rank has it that has most. All ranks must call it."""
    return [max(column) for column in zip(*on_all_ranks(list(values)), strict=True)]


def in_words(error: Exception) -> str:
    """An error as other ranks are told of it."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
