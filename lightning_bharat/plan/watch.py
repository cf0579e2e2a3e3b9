"""Follows a dry run: the operations, exchanges and bytes of each part of a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_bharat.plan.flops import FlopCounter
from lightning_bharat.plan.moved import NOTHING, Counters, Moved
from lightning_bharat.plan.work import MODES, Kept, Part, Work

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


@dataclass
class _Tally:
    """Of one part, as far as it ran."""

    flops: int = 0
    temporary: int = 0
    moved: dict[str, Moved] = field(default_factory=dict)


class Watch(FlopCounter):
    """Counts by part what runs while it is entered."""

    def __init__(self, shell: nn.Module, blocks: tuple[str, ...], counters: Counters) -> None:
        super().__init__()
        self.counters, self.part, self.last = counters, 0, len(blocks) + 1
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
        self._flops, self._moved = self.total, self.counters.moved()
        self._began = self._most = self.live

    def end(self) -> None:
        """The part that runs has ended."""
        tally = self.tallies[self.part]
        tally.flops += self.total - self._flops
        tally.temporary = max(tally.temporary, self._most - max(self.live, self._began))
        for cut, moved in self.counters.moved().items():
            tally.moved[cut] = tally.moved.get(cut, NOTHING) + moved - self._moved[cut]

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
        parts = tuple(Part(t.flops, t.temporary, **t.moved) for t in self.tallies)
        return Work(parts, {mode: _together(entries.values()) for mode, entries in self.kept.items()}, self.hidden)


def _together(entries: Iterable[tuple[int, set[int]]]) -> tuple[Kept, ...]:
    """The bytes of what the same parts keep, added up."""
    sums: dict[tuple[int, ...], int] = {}
    for size, parts in entries:
        key = tuple(sorted(parts))
        sums[key] = sums.get(key, 0) + size
    return tuple(Kept(size, parts) for parts, size in sorted(sums.items()))
