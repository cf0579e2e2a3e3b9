"""What each tensor of a dry run was computed from: parameters, and the outputs of blocks.

A stage of a pipeline holds its blocks' parameters, and of those outside of blocks the ones that it needs. That a value
has a gradient is not asked: a mask made by comparing embeddings needs the embedding as much as a sum does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class FromParameter:
    """A parameter, read outside the block that it belongs to (or of no block)."""

    name: str


@dataclass(frozen=True)
class FromBlock:
    """What block ``index`` returned: its hidden state, or (``extra``) something beside it."""

    index: int
    extra: bool = False


Source = FromParameter | FromBlock
NOTHING: frozenset[Source] = frozenset()


@dataclass
class Sources:
    """Follows values through a dry run.

    Attributes:
        owners: id of a parameter -> its name, and the blocks that it belongs to.
        needs: name of a parameter -> the blocks that read it, or what is computed from it, though it is not theirs;
            one more than the last block stands for what comes after it.
        skips: "" or a value that goes from one block to another past the hidden state between them.
    """

    blocks: tuple[str, ...]
    owners: dict[int, tuple[str, frozenset[int]]] = field(default_factory=dict)
    needs: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    skips: str = ""
    _known: dict[int, tuple[Tensor, frozenset[Source]]] = field(default_factory=dict)

    def own(self, parameter: Tensor, name: str, block: int | None) -> None:
        """Parameter ``name`` stands in ``block`` (``None``: outside of all)."""
        first, blocks = self.owners.get(id(parameter), (name, frozenset()))
        self.owners[id(parameter)] = first, blocks | ({block} if block is not None else frozenset())

    def mark(self, tensors: Any, sources: frozenset[Source]) -> None:
        """All tensors in ``tensors`` come from ``sources``, and from nothing else."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._known[id(tensor)] = tensor, sources  # kept: its id stays its own

    def of(self, values: Any, block: int | None = None) -> frozenset[Source]:
        """What ``values`` come from, for ``block``, whose own parameters do not count."""
        found: set[Source] = set()
        for x in tree_leaves(values):
            if id(x) in self.owners:
                name, blocks = self.owners[id(x)]
                if block not in blocks or len(blocks) > 1:
                    found.add(FromParameter(name))
            elif id(x) in self._known:
                found |= self._known[id(x)][1]
        return frozenset(found)

    def follow(self, inputs: Any, outputs: Any, in_place: bool, block: int | None) -> None:
        """A function made ``outputs`` of ``inputs`` (a tuple), in ``block`` or outside."""
        sources = self.of(inputs, block)
        if block is not None:
            self.read(sources, (block,))
        if sources:
            self.mark(outputs, sources)
        if in_place and sources:
            self.mark(inputs[0], sources)

    def read(self, sources: Iterable[Source], by: Iterable[int]) -> None:
        """The blocks ``by`` need ``sources``. What is computed after the last block counts as one block more."""
        for source in sources:
            for block in by:
                self._read(source, block)

    def _read(self, source: Source, block: int) -> None:
        if isinstance(source, FromParameter):
            self.needs[source.name].add(block)
        elif source.extra or source.index != block - 1:
            what = "an output beside the hidden state" if source.extra else "the output"
            reader = self.blocks[block] if block < len(self.blocks) else "the loss"
            self.skips = self.skips or f"{what} of {self.blocks[source.index]} is read in {reader}"
