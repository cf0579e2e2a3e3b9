"""A tensor cut carried out: modules keep their rank's slice of the weights.

The module tree, the names of parameters and the person's ``forward`` stay; only the classes of cut modules change, to
subclasses that exchange at the ends of each cut. Works on real and on ``meta`` modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from lightning_bharat.plan.cut_modules import (
    CutBlock,
    CutColumn,
    CutEntry,
    CutHead,
    CutRow,
    CutVocabulary,
    Flow,
    Gate,
    become,
)
from lightning_bharat.plan.exchange import Peers
from lightning_bharat.plan.model_plan import Cut
from lightning_bharat.plan.shards import TensorSlice


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
                become(block.get_submodule(cut.entry), CutEntry, flow=flow)
        whole = [name for name, _ in block.named_parameters() if name not in divided]
        owners = {name: _owner(block, name) for name in whole}
        become(
            block,
            CutBlock,
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
            become(module, CutHead, gate=gate, shard_logits=shard_logits)
        for row in cut.rows:
            embedding = cast(nn.Embedding, model.get_submodule(row))
            self._slice(embedding, "weight", row, 0, (embedding.num_embeddings,))
            become(embedding, CutVocabulary, gate=gate)

    def _cut(self, block: nn.Module, prefix: str, cut: Cut, gate: Gate) -> set[str]:
        before = set(self.slices)
        for column in cut.columns:
            module = block.get_submodule(column.module)
            self._slice_columns(module, f"{prefix}.{column.module}", column.parts)
            become(module, CutColumn, gate=gate)
        for row in cut.rows:
            module = block.get_submodule(row)
            dim = 0 if is_conv1d(module) else 1
            self._slice(module, "weight", f"{prefix}.{row}", dim, (features(module)[0],))
            become(module, CutRow, gate=gate)
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
        whole = module.get_parameter(leaf)
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
        module.nx, module.nf = cast(Any, module.weight).shape


def _divide(value: Any, ranks: int) -> Any:
    return value // ranks if isinstance(value, int) else type(value)(v // ranks for v in value)


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return root.get_submodule(owner), leaf
