"""What a step of one tensor rank computes, keeps for its backward pass and exchanges, counted in a dry run.

The person's own step runs on fake tensors, on batches of one and of two rows; what grows between them is that of a row.
Korthikanti et al. (2022, https://arxiv.org/abs/2205.05198) give a transformer's activations as a formula; here they are
what autograd keeps, so that they are those of any model, of its attention's kernel and of its precision.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from lightning_bharat.plan.alone import Alone
from lightning_bharat.plan.blocks import PlanError, kinds_of
from lightning_bharat.plan.exchange import OnePeer
from lightning_bharat.plan.fake_mode import FakeMode
from lightning_bharat.plan.flops import FlopCounter
from lightning_bharat.plan.observe import Answers, Step, fake_copy

# Expensive to compute: "selective" recomputation keeps their results.
EXPENSIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
MODES = (None, "selective", "full")


class CountingPeers(OnePeer):
    """The first of ``size`` tensor ranks, alone: exchanges have their shapes and no values, and are counted.

    Attributes:
        summed, gathered: bytes of the whole results of all-reduces, and of all-gathers and reduce-scatters, so far.
        times: how many there were; an all-reduce is two, a reduce-scatter and an all-gather.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.summed = self.gathered = self.times = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        self.summed += x.numel() * x.itemsize
        self.times += 2
        return x.clone()

    all_max = all_reduce

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        self.gathered += x.numel() * x.itemsize * self.size
        self.times += 1
        return torch.cat([x] * self.size, dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        self.gathered += x.numel() * x.itemsize
        self.times += 1
        return x.chunk(self.size, dim)[0].clone()


@dataclass(frozen=True)
class Part:
    """What runs before the blocks, in one block or after them, in a forward pass.

    Attributes:
        flops: floating-point operations.
        temporary: bytes at the fullest moment beyond those that stay.
        summed, gathered, times: of tensor ranks' exchanges, as in :class:`CountingPeers`.
    """

    flops: float = 0
    temporary: float = 0
    summed: float = 0
    gathered: float = 0
    times: float = 0


@dataclass(frozen=True)
class Kept:
    """Bytes that stay for the backward pass of ``parts``, in order, once for all of them."""

    bytes: float
    parts: tuple[int, ...]


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
        return sum(kept.bytes for kept in self.kept[mode] if any(i in parts for i in kept.parts))

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

        parts = tuple(
            Part(*(line(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))
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


def count_work(
    module: nn.Module,
    blocks: tuple[str, ...],
    step: Step,
    batch: Any,
    time: int | None = None,
    peers: CountingPeers | None = None,
) -> Growth:
    """Count the work of a step, for any number of rows.

    Args:
        module: as one tensor rank holds it, with ``peers`` as what it exchanges with; real or on ``meta``.
        blocks: names of the blocks, in order.
        step: as for :func:`~lightning_bharat.plan.find.find_plan`.
        batch: as the loader gives it; only shapes and types are read.
        time: length of the sequences; ``None``: as in ``batch``.

    Raises:
        PlanError: the batch has no such shape, or the step can't be run on fake tensors.
    """
    peers = peers or CountingPeers(1)
    one, two = (_count(module, blocks, step, resized(batch, rows, time), peers) for rows in (1, 2))
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


@dataclass
class _Tally:
    """Of one part, as far as it ran."""

    flops: int = 0
    temporary: int = 0
    exchanged: tuple[int, ...] = (0, 0, 0)


class _Watch(FlopCounter):
    """Counts by part what runs while it is entered."""

    def __init__(self, shell: nn.Module, blocks: tuple[str, ...], peers: CountingPeers) -> None:
        super().__init__()
        self.peers, self.part, self.last = peers, 0, len(blocks) + 1
        self.tallies = [_Tally() for _ in range(self.last + 1)]
        self.kept: dict[str | None, dict[int, tuple[int, set[int]]]] = {mode: {} for mode in MODES}
        self.hidden = self.live = 0
        self.out: Any = None  # of the latest block
        self.numbers: dict[int, int] = {}
        self.given = iter(count())
        self.own = {id(s): s for s in (w.untyped_storage() for w in (*shell.parameters(), *shell.buffers()))}
        self.handles = []
        for i, name in enumerate(blocks, 1):
            block = shell.get_submodule(name)
            self.handles += [
                block.register_forward_pre_hook(self._entering(i), with_kwargs=True),
                block.register_forward_hook(self._leaving(i)),
            ]

    @property
    def in_block(self) -> bool:
        return 0 < self.part < self.last

    # ---- parts

    def begin(self, part: int) -> None:
        """A part begins."""
        self.part = part
        self._flops, self._exchanged = self.total, self._exchanges()
        self._began = self._most = self.live

    def end(self) -> None:
        """The part that runs has ended."""
        tally = self.tallies[self.part]
        tally.flops += self.total - self._flops
        tally.temporary = max(tally.temporary, self._most - max(self.live, self._began))
        now = zip(tally.exchanged, self._exchanges(), self._exchanged, strict=True)
        tally.exchanged = tuple(so_far + after - before for so_far, after, before in now)

    def _exchanges(self) -> tuple[int, ...]:
        return self.peers.summed, self.peers.gathered, self.peers.times

    def _entering(self, part: int) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.end()
            self.begin(part)
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    for mode in ("full", "selective"):
                        self._keep(x, mode)

        return hook

    def _leaving(self, part: int) -> Callable:
        def hook(_: nn.Module, args: tuple, out: Any) -> None:
            self.out = out
            hidden = next((x for x in tree_leaves(out) if isinstance(x, Tensor)), None)
            if hidden is not None:
                self.hidden = max(self.hidden, hidden.numel() * hidden.itemsize)
            if part == self.last - 1:
                self.end()
                self.begin(self.last)

        return hook

    # ---- bytes

    def pack(self, tensor: Tensor) -> Tensor:
        """Autograd keeps ``tensor``; with recomputation it does so outside of blocks alone."""
        for mode in MODES:
            if mode is None or not self.in_block:
                self._keep(tensor, mode)
        return tensor

    def _keep(self, tensor: Tensor, mode: str | None) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.own:
            self.kept[mode].setdefault(self._number(storage), (storage.nbytes(), set()))[1].add(self.part)

    def _number(self, storage: Any, made: bool = False) -> int:
        """A number of its own for each storage: ids are given again."""
        if id(storage) not in self.numbers:
            size = storage.nbytes() if made else 0
            self.numbers[id(storage)] = next(self.given)
            weakref.finalize(storage, self._gone, id(storage), size)
            self.live += size
            self._most = max(self._most, self.live)
        return self.numbers[id(storage)]

    def _gone(self, name: int, size: int) -> None:
        del self.numbers[name]
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                if id(x.untyped_storage()) not in self.own:
                    self._number(x.untyped_storage(), made=True)
                if func in EXPENSIVE and self.in_block:
                    self._keep(x, "selective")
        return out

    def work(self) -> Work:
        """What was counted."""
        parts = tuple(Part(t.flops, t.temporary, *t.exchanged) for t in self.tallies)
        return Work(parts, {mode: _together(entries.values()) for mode, entries in self.kept.items()}, self.hidden)


def _together(entries: Iterable[tuple[int, set[int]]]) -> tuple[Kept, ...]:
    """The bytes of what the same parts keep, added up."""
    sums: dict[tuple[int, ...], int] = {}
    for size, parts in entries:
        key = tuple(sorted(parts))
        sums[key] = sums.get(key, 0) + size
    return tuple(Kept(size, parts) for parts, size in sorted(sums.items()))


def _skipped(module: nn.Module, blocks: tuple[str, ...]) -> dict[int, int]:
    """Of a row of like blocks all but the first two and the last: part -> the second one, which is as they are."""
    kinds = kinds_of([module.get_submodule(name) for name in blocks])
    found: dict[int, int] = {}
    for i in range(2, len(kinds) - 1):
        if len({*kinds[i - 2 : i + 2]}) == 1:
            found[i + 1] = found.get(i, i)
    return found


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


def _count(module: nn.Module, blocks: tuple[str, ...], step: Step, batch: Any, peers: CountingPeers) -> Work:
    """Like blocks compute and keep alike: of many in a row most need not run."""
    skipped = _skipped(module, blocks)
    work = _filled(_run(module, blocks, step, batch, peers, skipped), skipped)
    return work or _run(module, blocks, step, batch, peers, {})


def _run(
    module: nn.Module,
    blocks: tuple[str, ...],
    step: Step,
    batch: Any,
    peers: CountingPeers,
    skipped: Collection[int],
) -> Work:
    mode = FakeMode()
    watch = _Watch(shell := fake_copy(module, mode).train(), blocks, peers)
    for part in skipped:
        _stand_in(shell.get_submodule(blocks[part - 1]), lambda: watch.out)
    try:
        with mode:
            fake = tree_map(lambda x: torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x, batch)
            with saved_tensors_hooks(watch.pack, lambda tensor: tensor), watch, Answers(), Alone():
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
