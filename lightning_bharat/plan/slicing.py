"""A tensor cut carried out: modules hold their rank's slice of the weights and exchange at the ends of each cut.

The module tree, the names of parameters and the person's ``forward`` stay; only the classes of cut modules change, to
subclasses made here. Works on real and on ``meta`` modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bharat.plan.exchange import Peers, copy, copy_all, gather, join, reduce, scatter, split
from lightning_bharat.plan.model_plan import Cut
from lightning_bharat.plan.shards import TensorSlice
from lightning_bharat.plan.streams import TensorStream
from lightning_bharat.plan.vocabulary import VocabularyShard

SEQUENCE_DIM = 1  # hidden states are (batch, sequence, channels)


class Flow:
    """What the peers do in the current forward: whether the hidden state between cuts is divided along the sequence."""

    def __init__(self, peers: Peers, may_divide: bool = False, random: bool = False) -> None:
        self.peers, self.may_divide, self.divided = peers, may_divide, False
        self.stream = TensorStream(peers.rank) if random and peers.size > 1 else None

    def arrive(self, hidden: Tensor) -> Tensor:
        """At the first block: divide the sequence, if its length allows it this time."""
        fits = hidden.ndim == 3 and hidden.shape[SEQUENCE_DIM] % self.peers.size == 0
        self.divided = self.may_divide and fits
        return split(hidden, self.peers, SEQUENCE_DIM) if self.divided else hidden

    def depart(self, hidden: Tensor) -> Tensor:
        """After the last block: the whole sequence again."""
        return join(hidden, self.peers, SEQUENCE_DIM) if self.divided else hidden

    def __deepcopy__(self, memo: dict) -> Flow:
        return self  # a copied module exchanges with the same peers


class Gate:
    """The two ends of one cut of one block: its columns and its rows."""

    def __init__(self, flow: Flow, columns: int = 1, gathered: bool = False) -> None:
        self.flow, self.columns, self.gathered = flow, columns, gathered
        self.passed: dict[int, tuple[Tensor, Tensor]] = {}
        self.entered = 0

    def enter(self, x: Tensor) -> Tensor:
        """What a column reads. Columns that read the same tensor share one exchange of its gradient."""
        if id(x) not in self.passed:
            if not self.flow.divided:
                out = copy(x, self.flow.peers)
            elif self.gathered:  # already whole, since the entry module: its gradient is summed there
                out = x
            else:
                out = gather(x, self.flow.peers, SEQUENCE_DIM)
            self.passed[id(x)] = x, out
        self.entered += 1
        if self.entered == self.columns and self.flow.stream:
            self.flow.stream.enter(x.device)
        return self.passed[id(x)][1]

    def leave(self, partial: Tensor) -> Tensor:
        """What a row returns: the sum over the peers."""
        self.passed.clear()
        self.entered = 0
        if self.flow.stream:
            self.flow.stream.leave()
        if self.flow.divided:
            return scatter(partial, self.flow.peers, SEQUENCE_DIM)
        return reduce(partial, self.flow.peers)

    def __deepcopy__(self, memo: dict) -> Gate:
        return self


class _Column:
    gate: Gate

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate.enter(x))  # type: ignore[misc]


class _Row:
    gate: Gate

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight if isinstance(self, nn.Linear) else self.weight.t()
        out = self.gate.leave(F.linear(x, weight))
        return out if self.bias is None else out + self.bias


class _Head(_Column):
    shard_logits: bool

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        peers = self.gate.flow.peers
        self.gate.passed.clear()
        return VocabularyShard(out, peers) if self.shard_logits else join(out, peers, -1)


class _Vocabulary:
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


class _Block:
    """A block with cuts in it: sums partial gradients of what is whole, divides and joins the hidden state at the ends."""

    flow: Flow
    hidden: int | str
    ends: tuple[bool, bool]
    partial: list[tuple[nn.Module, str]]
    partial_if_divided: list[tuple[nn.Module, str]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.ends[0]:
            args, kwargs = _replace(args, kwargs, self.hidden, self.flow.arrive)
        owners = self.partial + (self.partial_if_divided if self.flow.divided else [])
        with _summed(owners, self.flow.peers):
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not self.ends[1]:
            return out
        if isinstance(out, Tensor):
            return self.flow.depart(out)
        return type(out)((self.flow.depart(out[0]), *out[1:]))


class _Entry:
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
def _summed(owners: list[tuple[nn.Module, str]], peers: Peers) -> Iterator[None]:
    """Use these parameters as they are, with their gradients summed over the peers, in one exchange for a dtype."""
    found = [(owner, name, owner._parameters[name]) for owner, name in owners]
    used = [(owner, name, p) for owner, name, p in found if p is not None and p.requires_grad]
    if not used or not torch.is_grad_enabled():
        yield
        return
    try:
        for dtype in {p.dtype for _, _, p in used}:
            alike = [item for item in used if item[2].dtype == dtype]
            for (owner, name, _), same in zip(alike, copy_all([p for *_, p in alike], peers), strict=True):
                owner._parameters[name] = cast(nn.Parameter, same)
        yield
    finally:
        for owner, name, parameter in used:
            owner._parameters[name] = parameter


@cache
def _subclass(kind: type, base: type) -> type:
    return type(f"{kind.__name__.strip('_')}{base.__name__}", (kind, base), {})


def _become(module: nn.Module, kind: type, **attributes: Any) -> None:
    module.__class__ = _subclass(kind, type(module))
    for name, value in attributes.items():
        object.__setattr__(module, name, value)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``: a linear with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_cuttable(module: nn.Module) -> bool:
    """Whether it is a linear whose ``forward`` is the well-known one."""
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or is_conv1d(module)


def features(module: nn.Module) -> tuple[int, int]:
    """Input and output size of a cuttable module."""
    rows, columns = cast(Tensor, module.weight).shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


class Slicer:
    """Cuts modules of one tree for one rank; remembers what it cut, so that tied parameters stay tied."""

    def __init__(self, peers: Peers) -> None:
        self.peers, self.slices = peers, dict[str, TensorSlice]()
        self._new: dict[int, nn.Parameter] = {}  # by id of what was cut
        self._cut_up: list[nn.Parameter] = []  # kept, so that no other parameter gets the id of one of them

    def block(
        self,
        block: nn.Module,
        prefix: str,
        cuts: Sequence[Cut],
        summed: Sequence[str],
        flow: Flow,
        hidden: int | str,
        ends: tuple[bool, bool],
    ) -> None:
        """Carry out ``cuts`` in ``block``, whose name in the model is ``prefix``."""
        divided = set[str]()
        for cut in cuts:
            gate = Gate(flow, len(cut.columns), bool(cut.entry))
            divided |= self._cut(block, prefix, cut, gate)
            if cut.entry:
                _become(block.get_submodule(cut.entry), _Entry, flow=flow)
        whole = [name for name, _ in block.named_parameters() if name not in divided]
        owners = {name: _owner(block, name) for name in whole}
        _become(
            block,
            _Block,
            flow=flow,
            hidden=hidden,
            ends=ends,
            partial=[owners[name] for name in whole if name in summed],
            partial_if_divided=[owners[name] for name in whole if name not in summed],
        )

    def outside(self, model: nn.Module, cut: Cut, shard_logits: bool) -> None:
        """Carry out the cut of embedding (row) and head (column) along the vocabulary."""
        gate = Gate(Flow(self.peers))
        for column in cut.columns:
            module = model.get_submodule(column.module)
            self._slice_columns(module, column.module, column.parts)
            _become(module, _Head, gate=gate, shard_logits=shard_logits)
        for row in cut.rows:
            embedding = cast(nn.Embedding, model.get_submodule(row))
            self._slice(embedding, "weight", row, 0, (embedding.num_embeddings,))
            _become(embedding, _Vocabulary, gate=gate)

    def _cut(self, block: nn.Module, prefix: str, cut: Cut, gate: Gate) -> set[str]:
        before = set(self.slices)
        for column in cut.columns:
            module = block.get_submodule(column.module)
            self._slice_columns(module, f"{prefix}.{column.module}", column.parts)
            _become(module, _Column, gate=gate)
        for row in cut.rows:
            module = block.get_submodule(row)
            dim = 0 if is_conv1d(module) else 1
            self._slice(module, "weight", f"{prefix}.{row}", dim, (features(module)[0],))
            _become(module, _Row, gate=gate)
        for attribute in cut.attributes:
            owner, _, name = attribute.rpartition(".")
            module = block.get_submodule(owner)
            setattr(module, name, _divide(getattr(module, name), self.peers.size))
        return {name.removeprefix(f"{prefix}.") for name in set(self.slices) - before}

    def _slice_columns(self, module: nn.Module, name: str, parts: tuple[int, ...]) -> None:
        self._slice(module, "weight", name, 1 if is_conv1d(module) else 0, parts)
        if module.bias is not None:
            self._slice(module, "bias", name, 0, parts)

    def _slice(self, module: nn.Module, leaf: str, name: str, dim: int, parts: tuple[int, ...]) -> None:
        whole = cast(nn.Parameter, module.get_parameter(leaf))
        cut = TensorSlice(dim, parts, self.peers.size, self.peers.rank)
        if id(whole) not in self._new:
            piece = nn.Parameter(cut.take(whole.detach()), requires_grad=whole.requires_grad)
            piece.__dict__.update(whole.__dict__)
            self._new[id(whole)] = piece
            self._cut_up.append(whole)
        module.register_parameter(leaf, self._new[id(whole)])
        self.slices[f"{name}.{leaf}"] = cut
        _resize(module)


def _resize(module: nn.Module) -> None:
    """Make the sizes that a module shows those of what it holds."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif is_conv1d(module) or hasattr(module, "nf"):
        module.nx, module.nf = module.weight.shape  # type: ignore[union-attr]


def _divide(value: Any, ranks: int) -> Any:
    return value // ranks if isinstance(value, int) else type(value)(v // ranks for v in value)


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return root.get_submodule(owner), leaf
