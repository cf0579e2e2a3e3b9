"""The modules of a tensor cut: what they exchange where a cut begins and ends.

Each class here is mixed into the class of a person's module (:func:`become`), whose ``forward`` and parameters stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.plan.exchange import Peers, copy, copy_all, gather, join, reduce, scatter, split
from lightning_bharat.plan.streams import TensorStream
from lightning_bharat.plan.vocabulary import VocabularyShard

SEQUENCE_DIM = 1  # hidden states are (batch, sequence, channels)


class Sums(Protocol):
    """What :func:`summed` must know: ``split_backward`` says that a schedule computes weights' gradients apart, one
    after the other."""

    peers: Peers
    split_backward: bool


class Flow:
    """What the peers do in the current forward: whether the hidden state between cuts is divided along the sequence."""

    def __init__(
        self, peers: Peers, may_divide: bool = False, random: bool = False, split_backward: bool = False
    ) -> None:
        self.peers, self.may_divide, self.divided = peers, may_divide, False
        self.split_backward = split_backward
        self.device = torch.device("cpu")
        self.stream = TensorStream(peers.rank) if random and peers.size > 1 else None

    def arrive(self, hidden: Tensor) -> Tensor:
        """At the first block: divide the sequence, if its length allows it this time."""
        fits = hidden.ndim == 3 and hidden.shape[SEQUENCE_DIM] % self.peers.size == 0
        self.divided, self.device = self.may_divide and fits, hidden.device
        return split(hidden, self.peers, SEQUENCE_DIM) if self.divided else hidden

    def depart(self, hidden: Tensor) -> Tensor:
        """After the last block: the whole sequence again."""
        return join(hidden, self.peers, SEQUENCE_DIM) if self.divided else hidden

    @contextmanager
    def own_tokens(self) -> Iterator[None]:
        """In a block: this rank's random stream for all of it, if it holds tokens of its own."""
        if not (self.stream and self.divided):
            yield
            return
        self.stream.enter(self.device)
        try:
            yield
        finally:
            self.stream.leave()

    def __deepcopy__(self, memo: dict) -> Flow:
        return self  # a copied module exchanges with the same peers


class Gate:
    """The two ends of one cut of one block: its columns and its rows."""

    def __init__(self, flow: Flow, columns: int = 1, gathered: bool = False) -> None:
        self.flow, self.columns, self.gathered = flow, columns, gathered
        self.passed: list[tuple[Tensor, Tensor]] = []
        self.entered = 0

    def enter(self, x: Tensor) -> Tensor:
        """What a column reads. Columns that read the same tensor share one exchange of its gradient."""
        self.entered += 1
        if self.entered == self.columns and self.flow.stream and not self.flow.divided:
            self.flow.stream.enter(x.device)
        for known, out in self.passed:
            if known is x:
                return out
        self.passed.append((x, self._entered(x)))
        return self.passed[-1][1]

    def _entered(self, x: Tensor) -> Tensor:
        if not self.flow.divided:
            return copy(x, self.flow.peers)
        if self.gathered:  # already whole, since the entry module: its gradient is summed there
            return x
        return gather(x, self.flow.peers, SEQUENCE_DIM)

    def leave(self, partial: Tensor) -> Tensor:
        """What a row returns: the sum over the peers."""
        self.passed.clear()
        self.entered = 0
        if self.flow.stream and not self.flow.divided:
            self.flow.stream.leave()
        if self.flow.divided:
            return scatter(partial, self.flow.peers, SEQUENCE_DIM)
        return reduce(partial, self.flow.peers)

    def __deepcopy__(self, memo: dict) -> Gate:
        return self


class CutColumn:
    gate: Gate

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate.enter(x))  # type: ignore[misc]


class CutRow:
    gate: Gate

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight if isinstance(self, nn.Linear) else self.weight.t()
        out = self.gate.leave(F.linear(x, weight))
        return out if self.bias is None else out + self.bias


class CutHead(CutColumn):
    shard_logits: bool

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        peers = self.gate.flow.peers
        self.gate.passed.clear()
        return VocabularyShard(out, peers) if self.shard_logits else join(out, peers, -1)


class CutVocabulary:
    """An embedding that looks up what it holds; the other rows are zero here and come from the peers."""

    gate: Gate

    def forward(self: Any, ids: Tensor) -> Tensor:
        size, start = self.weight.shape[0], self.gate.flow.peers.rank * self.weight.shape[0]
        local = ids - start
        elsewhere = (local < 0) | (local >= size)
        padding = None if self.padding_idx is None else self.padding_idx - start
        padding = padding if padding is not None and 0 <= padding < size else None
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight, padding)
        return reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.gate.flow.peers)


class CutBlock:
    """A block with cuts in it: sums partial gradients of what is whole; divides and joins the hidden state."""

    flow: Flow
    hidden: int | str
    ends: tuple[bool, bool]
    compiled: Callable | None = None
    partial: list[tuple[nn.Module, str]]
    partial_if_divided: list[tuple[nn.Module, str]]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the person's ``forward``; what is summed and divided around it stays eager."""
        self.compiled = torch.compile(super().forward, *args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.ends[0]:
            args, kwargs = _replace(args, kwargs, self.hidden, self.flow.arrive)
        inner = self.compiled or super().forward  # type: ignore[misc]
        owners = self.partial + (self.partial_if_divided if self.flow.divided else [])
        with summed(owners, self.flow), self.flow.own_tokens():
            out = inner(*args, **kwargs)
        if not self.ends[1]:
            return out
        if isinstance(out, Tensor):
            return self.flow.depart(out)
        return type(out)((self.flow.depart(out[0]), *out[1:]))


class CutEntry:
    """The module at whose input a divided hidden state is gathered for all columns in it."""

    flow: Flow

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def whole(x: Tensor) -> Tensor:
            return gather(x, self.flow.peers, SEQUENCE_DIM) if self.flow.divided else x

        args, kwargs = _replace(args, kwargs, 0 if args else "hidden_states", whole)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _replace(args: tuple, kwargs: dict, where: int | str, change: Any) -> tuple[tuple, dict]:
    if isinstance(where, int):
        return (*args[:where], change(args[where]), *args[where + 1 :]), kwargs
    return args, {**kwargs, where: change(kwargs[where])}


@contextmanager
def summed(owners: list[tuple[nn.Module, str]], flow: Sums) -> Iterator[None]:
    """Use these parameters as they are, with their gradients summed over the peers, if possible in one exchange."""
    found = [(owner, name, owner._parameters[name]) for owner, name in owners]
    used = [(owner, name, p) for owner, name, p in found if p is not None and p.requires_grad]
    if not used or not torch.is_grad_enabled():
        yield
        return
    try:
        together: dict[Any, list] = {}
        for item in used:
            together.setdefault(id(item[2]) if flow.split_backward else item[2].dtype, []).append(item)
        for alike in together.values():
            for (owner, name, _), same in zip(alike, copy_all([p for *_, p in alike], flow.peers), strict=True):
                owner._parameters[name] = cast(nn.Parameter, same)
        yield
    finally:
        for owner, name, parameter in used:
            owner._parameters[name] = parameter


@cache
def _subclass(kind: type, base: type) -> type:
    return type(f"{kind.__name__}{base.__name__}", (kind, base), {})


def become(module: nn.Module, kind: type, **attributes: Any) -> None:
    """Mix ``kind`` into the class of ``module`` and give it these attributes."""
    module.__class__ = _subclass(kind, cast(Any, type(module)))
    for name, value in attributes.items():
        object.__setattr__(module, name, value)
