"""What a step of one rank computes, keeps for its backward pass and exchanges, counted in a dry run.

The person's own step runs on fake tensors, on batches of one and of two rows; what grows between them is that of a row.
Korthikanti et al. (2022, https://arxiv.org/abs/2205.05198) give a transformer's activations as a formula; here they are
what autograd keeps, so that they are those of any model, of its attention's kernel and of its precision. Experts get
as many tokens each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from lightning_bharat.plan.alone import Alone
from lightning_bharat.plan.answers import Answers
from lightning_bharat.plan.blocks import PlanError, kinds_of
from lightning_bharat.plan.fake_mode import FakeMode
from lightning_bharat.plan.moved import Counters
from lightning_bharat.plan.observe import Step, fake_copy
from lightning_bharat.plan.watch import Watch
from lightning_bharat.plan.work import Growth, Kept, Work


def count_work(
    module: nn.Module,
    blocks: tuple[str, ...],
    step: Step,
    batch: Any,
    time: int | None = None,
    counters: Counters | None = None,
) -> Growth:
    """Count the work of a step, for any number of rows.

    Args:
        module: as one rank holds it, real or on ``meta``; it exchanges with ``counters``.
        blocks: names of the blocks, in order.
        step: as for :func:`~lightning_bharat.plan.find.find_plan`.
        batch: as the loader gives it; only shapes and types are read.
        time: length of the sequences; ``None``: as in ``batch``.

    Raises:
        PlanError: the batch has no such shape, or the step can't be run on fake tensors.
    """
    counters = counters or Counters()
    one, two = (_count(module, blocks, step, resized(batch, rows, time), counters) for rows in (1, 2))
    return Growth(one, two)


def resized(batch: Any, rows: int, time: int | None = None) -> Any:
    """A batch on ``meta`` with the shapes of ``batch``, but ``rows`` rows, of ``time`` tokens each.

    Raises:
        PlanError: ``time`` is given and the batch has no token ids of shape (rows, time).
    """
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim]
    if not tensors:
        raise PlanError(f"the batch ({type(batch).__name__}) has no tensor with a batch dimension")
    ids = next((x for x in tensors if x.ndim == 2 and not x.is_floating_point()), None)
    if time is not None and ids is None:
        raise PlanError(f"--sequence_length {time}: the batch has no token ids of shape (rows, time); leave it out")
    has_rows, has_time = len(tensors[0]), ids.shape[1] if ids is not None else None

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = list(x.shape)
        if shape and shape[0] == has_rows:
            shape[0] = rows
        if time is not None:
            shape[1:] = [time if size == has_time else size for size in shape[1:]]
        return torch.empty(shape, dtype=x.dtype, device="meta")

    return tree_map(of, batch)


def _skipped(module: nn.Module, blocks: tuple[str, ...]) -> dict[int, int]:
    """Of a row of like blocks all but the first two and the last: part -> the second one, which is as they are."""
    kinds = kinds_of([module.get_submodule(name) for name in blocks])
    found: dict[int, int] = {}
    for i in range(2, len(kinds) - 1):
        if len({*kinds[i - 2 : i + 2]}) == 1:
            found[i + 1] = found.get(i, i)
    return found


def _alike(module: nn.Module, blocks: tuple[str, ...], skipped: Mapping[int, int]) -> list[tuple[nn.Module, nn.Module]]:
    """The blocks that do not run, and those whose parameters they may have meanwhile: none where some are tied."""
    pairs = [(module.get_submodule(blocks[i - 1]), module.get_submodule(blocks[n - 1])) for i, n in skipped.items()]
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return [pair for pair in pairs if all(uses[id(p)] == 1 for block in pair for p in block.parameters())]


def _filled(work: Work, skipped: dict[int, int]) -> Work | None:
    """The work with that of blocks which did not run; ``None`` where like blocks were not seen to keep alike."""
    parts = tuple(work.parts[skipped.get(i, i)] for i in range(len(work.parts)))
    kept = {}
    for mode, entries in work.kept.items():
        sums: dict[tuple[int, ...], float] = {}
        for entry in entries:
            ran = {i for i in entry.parts if i not in skipped}
            if len(ran) > 1 and any((s in ran) != (n in ran) for i, s in skipped.items() for n in _ran(i, s, skipped)):
                return None
            alike = {i for i, source in skipped.items() if source in ran}
            for key in [(i,) for i in ran | alike] if len(ran) == 1 else [tuple(sorted(ran | alike))] if ran else []:
                sums[key] = sums.get(key, 0) + entry.bytes
        kept[mode] = tuple(Kept(size, parts) for parts, size in sorted(sums.items()))
    return replace(work, parts=parts, kept=kept)


def _ran(part: int, source: int, skipped: dict[int, int]) -> tuple[int, int]:
    """The first and the last block of the row in which ``part`` was skipped."""
    while part in skipped:
        part += 1
    return source - 1, part


def _stand_in(block: nn.Module, out: Callable[[], Any]) -> None:
    """Let ``block`` return what the block before it has returned."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out())

    object.__setattr__(block, "forward", forward)


def _count(module: nn.Module, blocks: tuple[str, ...], step: Step, batch: Any, counters: Counters) -> Work:
    """Like blocks compute and keep alike: of many in a row most need not run."""
    skipped = _skipped(module, blocks)
    work = _filled(_run(module, blocks, step, batch, counters, skipped), skipped)
    return work or _run(module, blocks, step, batch, counters, {})


def _run(
    module: nn.Module,
    blocks: tuple[str, ...],
    step: Step,
    batch: Any,
    counters: Counters,
    skipped: Mapping[int, int],
) -> Work:
    mode = FakeMode()
    alike = _alike(module, blocks, skipped)
    watch = Watch(shell := fake_copy(module, mode, alike).train(), blocks, counters)
    answers = Answers(shell)
    for part in skipped:
        _stand_in(shell.get_submodule(blocks[part - 1]), lambda: watch.out)
    try:
        with mode:
            fake = tree_map(lambda x: torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x, batch)
            with saved_tensors_hooks(watch.pack, lambda tensor: tensor), watch, answers, Alone():
                watch.begin(0)
                loss = step(shell, fake)  # held: with it, what is kept for its backward pass
                watch.end()
        del loss
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            "the training step could not be run on fake tensors with the batch that is planned: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in watch.handles:
            handle.remove()
    return watch.work()
