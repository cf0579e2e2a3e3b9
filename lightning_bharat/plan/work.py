"""The work of a forward pass on one rank: operations, bytes that stay and come and go, exchanges; of any rows."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bharat.plan.blocks import PlanError
from lightning_bharat.plan.moved import NOTHING, Moved

MODES = (None, "selective", "full")


@dataclass(frozen=True)
class Part:
    """What runs before the blocks, in one block or after them, in a forward pass.

    Attributes:
        flops: floating-point operations.
        temporary: bytes at the fullest moment beyond those that stay.
        tensor, context, expert: what ranks of each cut exchange.
    """

    flops: float = 0
    temporary: float = 0
    tensor: Moved = NOTHING
    context: Moved = NOTHING
    expert: Moved = NOTHING


@dataclass(frozen=True)
class Kept:
    """Bytes that stay for the backward pass of ``parts``, in order, once for all of them."""

    bytes: float
    parts: tuple[int, ...]

    def is_of(self, parts: range) -> bool:
        """Whether one of ``parts`` needs it."""
        if self.parts[-1] < parts.start or self.parts[0] >= parts.stop:  # most are
            return False
        return any(i in parts for i in self.parts)


@dataclass(frozen=True)
class Work:
    """A forward pass of some rows on one tensor rank.

    Attributes:
        parts: before the blocks, of each block, and after them.
        kept: by mode of recomputation, what stays.
        hidden: bytes of the whole hidden state between blocks.
    """

    parts: tuple[Part, ...]
    kept: dict[str | None, tuple[Kept, ...]]
    hidden: float

    def kept_bytes(self, parts: range, mode: str | None) -> float:
        """Bytes that a stage of these parts keeps of a forward pass."""
        return sum(kept.bytes for kept in self.kept[mode] if kept.is_of(parts))

    def temporary_bytes(self, parts: range, mode: str | None) -> float:
        """Bytes that come and go: of the part that needs most; with recomputation what its block keeps meanwhile."""
        again = [0.0] * len(self.parts)
        if mode is not None:
            for kept, sign in ((self.kept[None], 1), (self.kept[mode], -1)):
                for entry in kept:
                    again[entry.parts[0]] += sign * entry.bytes
        return max(self.parts[i].temporary + max(again[i], 0.0) for i in parts)


@dataclass(frozen=True)
class Growth:
    """The work of any number of rows, from that of one and that of two.

    Raises:
        PlanError: the step does something else with two rows than with one.
    """

    one: Work
    two: Work

    def __post_init__(self) -> None:
        for mode in MODES:
            if [k.parts for k in self.one.kept[mode]] != [k.parts for k in self.two.kept[mode]]:
                raise PlanError(
                    "what a step keeps for its backward pass is not in proportion to its rows: with two rows it does "
                    "other things than with one, so that bytes of other batches can't be known"
                )

    def at(self, rows: int) -> Work:
        """The work of a micro-batch of ``rows`` rows."""

        def line(one: float, two: float) -> float:
            return max(one + (rows - 1) * (two - one), 0.0)

        def moved(one: Moved, two: Moved) -> Moved:
            return Moved(*map(line, vars(one).values(), vars(two).values()))

        parts = tuple(
            Part(
                line(one.flops, two.flops),
                line(one.temporary, two.temporary),
                *(moved(getattr(one, cut), getattr(two, cut)) for cut in ("tensor", "context", "expert")),
            )
            for one, two in zip(self.one.parts, self.two.parts, strict=True)
        )
        kept = {
            mode: tuple(
                Kept(line(one.bytes, two.bytes), one.parts)
                for one, two in zip(self.one.kept[mode], self.two.kept[mode], strict=True)
            )
            for mode in MODES
        }
        return Work(parts, kept, line(self.one.hidden, self.two.hidden))
