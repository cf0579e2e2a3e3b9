"""Which blocks lie on which stage of a pipeline, and which stages on which rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import nn

from lightning_bharat.plan.model_plan import ModelPlan

LOOPED, V = "looped", "V"


def balanced(costs: Sequence[float], stages: int, before: float = 0, after: float = 0) -> list[range]:
    """Blocks in ``stages`` runs of consecutive ones, so that the dearest stage costs least.

    Of equally good ones the one whose other stages are most alike. With no costs that are known, stages get equally
    many blocks, the first ones one more where that does not divide.

    Args:
        costs: of each block, at least as many as ``stages``.
        before, after: of what runs on the first stage before its blocks, and on the last one after them.

    >>> balanced([1, 1, 1, 1], 2), balanced([1, 1, 1, 1], 2, after=2)
    ([range(0, 2), range(2, 4)], [range(0, 3), range(3, 4)])
    """
    costs = [float(cost) for cost in costs] if any(costs) else [1.0] * len(costs)
    costs[0], costs[-1] = costs[0] + before, costs[-1] + after
    sums = [0.0, *accumulate(costs)]
    # best[n]: (dearest, sum of squares, ends) of the first n blocks in as many stages as rounds so far
    best: dict[int, tuple[float, float, tuple[int, ...]]]
    best = {n: (sums[n], sums[n] ** 2, (n,)) for n in range(1, len(costs) + 1)}
    for stage in range(1, stages):
        best = {
            n: min(
                (max(dearest, own := sums[n] - sums[m]), squares + own**2, (*ends, n))
                for m, (dearest, squares, ends) in best.items()
                if m < n
            )
            for n in range(stage + 1, len(costs) + 1)
        }
    *_, ends = best[len(costs)]
    return [range(start, end) for start, end in pairwise([0, *ends])]


def by_cost(plan: ModelPlan, stages: int) -> list[range]:
    """The blocks of each of ``stages`` stages of a plan, :func:`balanced` by its costs."""
    before, *blocks, after = plan.costs or [0] * (plan.depth + 2)
    return balanced(blocks, stages, before, after)


def spread(measured: Sequence[float], stages: Sequence[range], costs: Sequence[int]) -> tuple[int, ...]:
    """What stages cost, measured, as the costs of what is in them: in proportion to ``costs``, or equally.

    >>> spread([30, 10], [range(2), range(2, 3)], [0, 1, 2, 5, 5])
    (0, 10, 20, 5, 5)
    """
    ends = [0, *(blocks.stop + 1 for blocks in stages[:-1]), stages[-1].stop + 2]
    counted = costs if any(costs) else [0, *[1] * stages[-1].stop, 0]
    found: list[int] = []
    for total, (start, end) in zip(measured, pairwise(ends), strict=True):
        inside = counted[start:end] if any(counted[start:end]) else [1] * (end - start)
        found += [round(total * cost / sum(inside)) for cost in inside]
    return tuple(found)


def stages_of(rank: int, ranks: int, each: int, placement: str = LOOPED) -> list[int]:
    """The ``each`` stages of pipeline rank ``rank``, in order: round and round, or there and back (``V``).

    >>> stages_of(1, 4, 2), stages_of(1, 4, 2, V)
    ([1, 5], [1, 6])
    """
    if placement == V:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + turn * ranks for turn in range(each)]


def placed(module: nn.Module, plan: ModelPlan, stages: Sequence[range]) -> dict[str, set[int]]:
    """By name (the first of tied ones), the stages that hold each parameter: those with its block, and those that need
    it. A parameter of which no stage was seen to need anything is on all of them.

    Args:
        module: whole or cut over tensor ranks.
        stages: the blocks of each.
    """
    blocks = {name: i for i, name in enumerate(plan.block_names(module))}
    firsts: dict[int, str] = {}
    found: dict[str, set[int]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = firsts.setdefault(id(parameter), name)
        found[first] = found.get(first, set()) | _holders(plan, first, blocks.get(block_of(name, plan)), stages)
    return found


def block_of(name: str, plan: ModelPlan) -> str:
    """The block in which parameter ``name`` stands; "" for none."""
    prefix = f"{plan.blocks}."
    return prefix + name[len(prefix) :].split(".")[0] if name.startswith(prefix) else ""


def _holders(plan: ModelPlan, name: str, block: int | None, stages: Sequence[range]) -> set[int]:
    needed = {min(b, plan.depth - 1) for b in plan.needs.get(name, ())} | ({block} if block is not None else set())
    return {i for i, blocks in enumerate(stages) if not needed or needed & set(blocks)}
