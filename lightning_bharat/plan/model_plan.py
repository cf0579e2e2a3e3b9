"""Where a model can be cut: plain data, made by observing and proving, printed for people, kept in manifests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """A module whose output is divided over tensor ranks.

    ``parts`` are the sizes of what is fused in its output, each divided alike: ``(out,)`` for a plain linear,
    ``(d, d, d)`` for a fused query-key-value.
    """

    module: str
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Weights that are cut together.

    Module names are those inside a block for :attr:`ModelPlan.cuts`, and those in the model for
    :attr:`ModelPlan.outside`. ``columns`` have their outputs divided, ``rows`` their inputs, alike; ``attributes`` are
    whole numbers of modules (``"attn.num_heads"``) that a rank divides by the number of tensor ranks. ``entry`` is the
    module at whose input a sequence-sharded hidden state is gathered (``""``: at the columns).
    """

    unit: str
    units: int
    columns: tuple[Column, ...]
    rows: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    entry: str = ""


@dataclass(frozen=True)
class ModelPlan:
    """Where a model can be cut, and what was proven about it.

    Attributes:
        blocks: name of the list of repeated blocks.
        kinds: the kind of each block, in order; blocks of one kind have the same cuts.
        cuts: the cuts in a block, by kind.
        outside: cuts outside the blocks: embedding and head along the vocabulary.
        before, after: modules with parameters that run before and after the blocks.
        tied: names of parameters that are one tensor, first the one that stays.
        sequence: ``""`` where the hidden state between cuts may be sharded along the sequence, else why not.
        loss: ``""`` where the training step never needs gathered logits, else why not.
        whole: what is not cut over tensor ranks, and why.
        proven: for how many tensor ranks the cuts were proven.
    """

    blocks: str
    kinds: tuple[str, ...]
    cuts: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    outside: tuple[Cut, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    sequence: str = "not tried"
    loss: str = "not tried"
    whole: dict[str, str] = field(default_factory=dict)
    proven: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """Number of repeated blocks."""
        return len(self.kinds)

    def all_cuts(self) -> Iterator[Cut]:
        """Every distinct cut: those in blocks, then those outside."""
        for cuts in self.cuts.values():
            yield from cuts
        yield from self.outside

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelPlan:
        """Inverse of :meth:`to_dict`, also after a trip through JSON."""
        return cls(
            **{
                **data,
                "kinds": tuple(data["kinds"]),
                "cuts": {kind: tuple(map(_cut, cuts)) for kind, cuts in data["cuts"].items()},
                "outside": tuple(map(_cut, data["outside"])),
                "before": tuple(data["before"]),
                "after": tuple(data["after"]),
                "tied": tuple(map(tuple, data["tied"])),
                "proven": tuple(data["proven"]),
            }
        )


def _cut(data: dict[str, Any]) -> Cut:
    columns = tuple(Column(c["module"], tuple(c["parts"])) for c in data["columns"])
    return Cut(
        **{**data, "columns": columns, "rows": tuple(data["rows"]), "attributes": tuple(data["attributes"])}
    )
