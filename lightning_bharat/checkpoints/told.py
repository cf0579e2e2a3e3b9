"""What each rank has of its own for a checkpoint (states of generators, positions of loaders), told to rank 0 when the
checkpoint is written: no rank waits for another before training goes on."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_bharat.checkpoints.document import as_plain, state_bytes, state_of
from lightning_bharat.checkpoints.errors import on_all_ranks


@dataclass(frozen=True)
class Told:
    """An entry of a checkpoint's dict that is made of what all ranks have.

    Attributes:
        own: this rank's, in types that a checkpoint may hold; ``None`` where its word is not needed.
        together: from those of all ranks, in their order, to the entry; ``None`` leaves it out.
    """

    own: Any
    together: Callable[[list[Any]], Any]


def apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Told]]:
    """``checkpoint`` without its entries of this kind, and these."""
    told = {key: value for key, value in checkpoint.items() if isinstance(value, Told)}
    return {key: value for key, value in checkpoint.items() if key not in told}, told


def with_all(checkpoint: Mapping[str, Any], told: Mapping[str, Told], of_ranks: Sequence[Any]) -> dict[str, Any]:
    """``checkpoint`` with the entries that ``of_ranks`` make: for each rank what it has, by key."""
    made = {key: entry.together([own[key] for own in of_ranks]) for key, entry in told.items()}
    return {**checkpoint, **{key: value for key, value in made.items() if value is not None}}


def gathered(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """``checkpoint`` with all of its entries, by the process group. All ranks must call it."""
    rest, told = apart(checkpoint)
    own = {key: entry.own for key, entry in told.items()}
    return with_all(rest, told, on_all_ranks(own)) if told else rest


def as_text(own: Any) -> str:
    """Plain data and tensors in letters; :func:`from_text` reads them without running code."""
    return base64.b64encode(state_bytes(own)).decode()


def from_text(text: str) -> Any:
    """What :func:`as_text` was given."""
    return state_of(base64.b64decode(text))


def own_of(told: Mapping[str, Told]) -> dict[str, Any]:
    """What this rank has, by key, as it is now.

    Raises:
        CheckpointError: an object that can't be read back without running code.
    """
    return {key: as_plain(entry.own, key, copy=True) for key, entry in told.items()}
