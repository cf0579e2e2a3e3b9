"""Which blocks lie on which stage of a pipeline, and which stages on which rank."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_bharat.plan.model_plan import ModelPlan

LOOPED, V = "looped", "V"


def even(depth: int, stages: int) -> list[range]:
    """``depth`` blocks in ``stages`` stages of equal size; the first ones have one more if it does not divide.

    >>> even(5, 2)
    [range(0, 3), range(3, 5)]
    """
    size, more = divmod(depth, stages)
    ends = [(i + 1) * size + min(i + 1, more) for i in range(stages)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def stages_of(rank: int, ranks: int, each: int, placement: str = LOOPED) -> list[int]:
    """The ``each`` stages of pipeline rank ``rank``, in order: round and round, or there and back (``V``).

    >>> stages_of(1, 4, 2), stages_of(1, 4, 2, V)
    ([1, 5], [1, 6])
    """
    if placement == V:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + turn * ranks for turn in range(each)]


def holders(plan: ModelPlan, name: str, block: int | None, stages: Iterable[range]) -> set[int]:
    """The stages that hold parameter ``name``, which stands in ``block`` or outside of all (``None``).

    A parameter of which no stage was seen to need anything is on all of them.
    """
    needed = {min(b, plan.depth - 1) for b in plan.needs.get(name, ())} | ({block} if block is not None else set())
    return {i for i, blocks in enumerate(stages) if not needed or needed & set(blocks)}
