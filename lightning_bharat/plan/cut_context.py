"""The context cut carried out: blocks get a part of the sequence, and what is outside of them the whole.

The hidden state is divided at the first block's entry and joined after the last one. What else a block is given along
the sequence (positions, rotary tables) is divided at each block, since the model gives it whole to each. Gradients of a
block's parameters, which each rank has of its part, are summed in the backward pass, once for a block; so every rank
has all gradients whole, and nothing else in a step needs to know of context ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path

from lightning_bharat.plan.blocks import block_names
from lightning_bharat.plan.compare_parts import difference
from lightning_bharat.plan.cut_modules import SEQUENCE_DIM, become, summed
from lightning_bharat.plan.exchange import Peers, copy, join, split
from lightning_bharat.plan.experts import CutExperts
from lightning_bharat.plan.streams import TensorStream
from lightning_bharat.plan.whole_attention import ContextError, WholeAttention

_PLAIN = (Tensor, str, int, float, bool, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class ContextCut:
    """Where a model's sequence is cut: plain data, found and proven by :func:`find_context_cut`.

    Attributes:
        hidden: path of the hidden state, (batch, time, channels), among a block's arguments.
        axes: by kind of block the tensors among its arguments, by path, each with its axis of time; -1 where it has
            none, or two (a mask): it stays whole.
        heads: query heads and key-value heads of attention; empty if there is none.
        kinds: of the blocks, in order.
        random: whether blocks draw random numbers in training.
    """

    hidden: str
    kinds: tuple[str, ...]
    axes: dict[str, dict[str, int]] = field(default_factory=dict)
    heads: tuple[int, int] | tuple[()] = ()
    random: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :meth:`from_dict` reads it back, also after a trip through JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ContextCut:
        """Inverse of :meth:`to_dict`."""
        return cls(**{**data, "kinds": tuple(data["kinds"]), "heads": tuple(data["heads"])})


class ContextFlow:
    """What context ranks do in the current forward: whether the sequence is divided.

    Args:
        peers: the context ranks.
        cut: as proven.
        split_backward: whether a schedule computes gradients of weights apart, one after the other.

    Attributes:
        in_backward: whether a backward pass is running, in which blocks may be called to compute again.
    """

    in_backward: Callable[[], bool]

    def __init__(self, peers: Peers, cut: ContextCut, split_backward: bool = False) -> None:
        self.in_backward = lambda: False
        self.peers, self.cut, self.split_backward = peers, cut, split_backward
        self.stream = TensorStream(peers.rank) if cut.random else None
        self.time, self.divided, self.device = 0, False, torch.device("cpu")
        self.on_the_way = ""  # from the first block to the last: the block that was called last

    def arrive(self, hidden: Tensor, remembers: bool) -> None:
        """At the first block, with the whole hidden state.

        Raises:
            ContextError: in training, a length that does not divide.
        """
        ranks, self.time, self.device = self.peers.size, hidden.shape[SEQUENCE_DIM], hidden.device
        # One position a rank would look like a step of generation to attention.
        fits = self.time % ranks == 0 and self.time > ranks
        if not fits and torch.is_grad_enabled():
            raise ContextError(
                f"the sequence of {self.time} can't be divided over context_parallel_size={ranks} ranks; give batches "
                f"a length that is a multiple of {ranks}, from {2 * ranks} up, by padding or cutting them"
            )
        # What is kept in a cache, a later call reads: of that, each rank needs all.
        self.divided = fits and (torch.is_grad_enabled() or not remembers)

    def ended(self) -> None:
        """A step has returned.

        Raises:
            ContextError: it went on with parts of the sequence, since the last block did not run.
        """
        left, self.on_the_way = self.on_the_way, ""
        if left:
            raise ContextError(
                f"the step left the blocks after {left}, before the last one: what it went on with is a part of the "
                "sequence, which context ranks gather after the last block. Run all blocks in each step, or write "
                "context_parallel_size=1"
            )

    @contextmanager
    def parts(self) -> Iterator[None]:
        """In a block: attention sees the whole, and random numbers are this rank's own."""
        if self.stream:
            self.stream.enter(self.device)
        try:
            with WholeAttention(self.peers, self.time):
                yield
        finally:
            if self.stream:
                self.stream.leave()

    def __deepcopy__(self, memo: dict) -> ContextFlow:
        return self  # a copied module exchanges with the same peers


class ContextBlock:
    """A block that gets a part of the sequence."""

    context_flow: ContextFlow
    context_place: Place
    context_axes: dict[str, int]
    context_met: set[frozenset[str]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flow, place = self.context_flow, self.context_place
        if place.first:
            _arrive(flow, args, kwargs)
        if not flow.divided:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        args, kwargs = self.context_part(args, kwargs)
        with summed(self._context_owners(), flow), flow.parts():
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not place.last:
            return out
        flow.on_the_way = ""
        if isinstance(out, Tensor):
            return join(out, flow.peers, SEQUENCE_DIM)
        return type(out)((join(out[0], flow.peers, SEQUENCE_DIM), *out[1:]))

    def context_part(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """This rank's part of all arguments."""
        flow = self.context_flow

        def part(path: Any, x: Any) -> Any:
            at = keystr(path)
            if not isinstance(x, Tensor) or (at == flow.cut.hidden and not self.context_place.first):
                return x
            axis = self.context_axes[at] if at in self.context_axes else _axis(x, flow.time)
            if axis >= 0 and x.shape[axis] == flow.time:
                return split(x, flow.peers, axis)
            return copy(x, flow.peers) if x.requires_grad else x

        return tree_map_with_path(part, (args, kwargs))

    def context_meet(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a call: compare with the whole once, on the values and the length that are trained with, and again
        where other tensors are given (a mask, since some rows are padded).

        Raises:
            ContextError: on all context ranks: it is not the same.
        """
        flow = self.context_flow
        if self.context_place.first:
            _arrive(flow, args, kwargs)
        elif flow.divided:
            self._context_follow(_leaves(args, kwargs)[flow.cut.hidden])
        if flow.divided and not flow.in_backward():
            flow.on_the_way = self.context_place.name
        given = frozenset(path for path, x in _leaves(args, kwargs).items() if isinstance(x, Tensor))
        if not flow.divided or given in self.context_met:
            return
        args, kwargs = tree_map_with_path(lambda _, x: x if isinstance(x, _PLAIN) else None, (args, kwargs))
        pieces, named = self.context_part(args, kwargs)
        inner = super().forward  # type: ignore[misc]

        def on_parts() -> Any:
            with flow.parts():
                return inner(*pieces, **named)

        def on_whole(hidden: Tensor) -> Any:
            whole = tree_map_with_path(lambda p, x: hidden if keystr(p) == flow.cut.hidden else x, (args, kwargs))
            return inner(*whole[0], **whole[1])

        mine = _leaves(pieces, named)[flow.cut.hidden]
        away, wrong = difference(on_parts, on_whole, mine, flow.peers)
        if wrong:
            new = ", ".join(sorted(map(_words, given - self.context_axes.keys())))
            said = f" It is given {new}, unlike in the step that was proven." if new else ""
            raise ContextError(
                f"{self.context_place.name} does not compute the same on parts of the sequence of {flow.time}: its "
                f"output differs by {away:.1e} of what it adds to the hidden state.{said} Write context_parallel_size=1"
            )
        self.context_met.add(given)

    def _context_follow(self, hidden: Tensor) -> None:
        flow = self.context_flow
        if hidden.shape[SEQUENCE_DIM] * flow.peers.size != flow.time:
            raise ContextError(
                f"{self.context_place.name} gets a hidden state {tuple(hidden.shape)}, and not the "
                f"{flow.time // flow.peers.size} positions of the sequence of {flow.time} that the block before it "
                "returned to a context rank. Run all blocks in each step, or write context_parallel_size=1"
            )

    def _context_owners(self: Any) -> list[tuple[nn.Module, str]]:
        apart = (m for m in self.modules() if not isinstance(m, CutExperts))  # experts' tokens come to them
        return [(owner, name) for owner in apart for name in owner._parameters]


@dataclass(frozen=True)
class Place:
    """A block's name, and whether the whole sequence arrives at it, and whether it is to leave it."""

    name: str
    first: bool
    last: bool


def _leaves(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {keystr(path): x for path, x in tree_flatten_with_path((args, kwargs))[0]}


def _arrive(flow: ContextFlow, args: tuple, kwargs: dict[str, Any]) -> None:
    leaves = _leaves(args, kwargs)
    flow.arrive(leaves[flow.cut.hidden], any(not isinstance(x, _PLAIN) for x in leaves.values()))


def _axis(x: Tensor, time: int) -> int:
    """Of a tensor that was not seen before: its one axis of time; -1 where it has none or several."""
    found = [axis for axis, size in enumerate(x.shape) if size == time]
    return found[0] if len(found) == 1 else -1


def _words(path: str) -> str:
    """``[1]['attention_mask']`` is an argument by name, ``[0][1]`` one by position."""
    return f"argument {path[3:]}"


def cut_context(
    module: nn.Module,
    cut: ContextCut,
    peers: Peers,
    stages: Sequence[range] = (),
    split_backward: bool = False,
    compared: bool = True,
) -> ContextFlow:
    """Divide the sequence in the blocks of ``module``, in place, over ``peers``; other cuts of blocks come before.

    Args:
        module: real or on ``meta``.
        cut: proven for this number of ranks.
        peers: the context ranks.
        stages: the blocks of each pipeline stage, between which the sequence is whole.
        split_backward: whether a schedule computes gradients of weights apart from those of hidden states.
        compared: blocks of each kind are compared with the whole when they first run.
    """
    flow, names = ContextFlow(peers, cut, split_backward), block_names(module)
    stages = stages or [range(len(names))]
    met: dict[str, set[frozenset[str]] | None] = {kind: set() if compared else None for kind in cut.kinds}
    firsts, lasts = {stage.start for stage in stages}, {stage.stop - 1 for stage in stages}
    for i, (name, kind) in enumerate(zip(names, cut.kinds, strict=True)):
        divide_block(module.get_submodule(name), kind, flow, Place(name, i in firsts, i in lasts), met[kind])
    return flow


def divide_block(
    block: nn.Module, kind: str, flow: ContextFlow, place: Place, met: set[frozenset[str]] | None = None
) -> None:
    """Make ``block`` work on parts. ``met``: with which tensors blocks of this kind were compared with the whole;
    ``None``: it is not compared."""
    axes = flow.cut.axes[kind]
    met = {frozenset(axes)} if met is None else met
    become(block, ContextBlock, context_flow=flow, context_place=place, context_axes=axes, context_met=met)
    # Not in its forward, which may be computed again.
    block.register_forward_pre_hook(_meet, with_kwargs=True)


def _meet(block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    block.context_meet(args, kwargs)
