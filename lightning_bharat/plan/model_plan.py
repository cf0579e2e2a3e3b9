"""Where a model can be cut: plain data, made by observing and proving, printed for people, kept in manifests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Column:
    """A module whose output is divided over tensor ranks.

    ``parts`` are the sizes of what is fused in its output, each divided alike: ``(out,)`` for a plain linear,
    ``(d, d, d)`` for a fused query-key-value.
    """

    module: str
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Weights that are cut together.

    Module names are those inside a block for :attr:`ModelPlan.cuts`, and those in the model for
    :attr:`ModelPlan.outside`. ``columns`` have their outputs divided, ``rows`` their inputs, alike; ``attributes`` are
    whole numbers of modules (``"attn.num_heads"``) that a rank divides by the number of tensor ranks. ``entry`` is the
    module at whose input a sequence-sharded hidden state is gathered (``""``: at the columns).
    """

    unit: str
    units: int
    columns: tuple[Column, ...]
    rows: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    entry: str = ""


@dataclass(frozen=True)
class ModelPlan:
    """Where a model can be cut, and what was proven about it.

    Attributes:
        blocks: name of the list of repeated blocks.
        kinds: the kind of each block, in order; blocks of one kind have the same cuts.
        cuts: the cuts in a block, by kind.
        outside: cuts outside the blocks: embedding and head along the vocabulary.
        before, after: modules with parameters that run before and after the blocks.
        tied: names of parameters that are one tensor, first the one that stays.
        sequence: ``""`` where the hidden state between cuts may be sharded along the sequence, else why not.
        loss: ``""`` where the training step never needs gathered logits, else why not.
        whole: what is not cut over tensor ranks, and why.
        proven: for how many tensor ranks the cuts were proven.
        summed: by kind, whole parameters in a block whose gradients are partial on each tensor rank.
        hidden: where a block takes the hidden state: a position or a keyword.
        single: whether the model has no list of blocks, so that it is one block.
        random: whether blocks draw random numbers in training.
        apart: "" where the blocks may lie on different pipeline stages, else why not.
        needs: parameter -> the blocks (the depth: what comes after them) that need it though it is not theirs.
        outputs: how many values a block returns in a tuple, of which the first is the hidden state; 0 for a tensor.
        wire: type of the hidden state that goes from block to block.
        costs: what it takes before the blocks, in each block, and after them, relative to each other: floating-point
            operations counted in the dry run, or the time that a run has measured.
    """

    blocks: str
    kinds: tuple[str, ...]
    cuts: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    outside: tuple[Cut, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    sequence: str = "not tried"
    loss: str = "not tried"
    whole: dict[str, str] = field(default_factory=dict)
    proven: tuple[int, ...] = ()
    summed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    hidden: int | str = 0
    single: bool = False
    random: bool = False
    apart: str = "not tried"
    needs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: int = 0
    wire: str = "float32"
    costs: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """Number of repeated blocks."""
        return len(self.kinds)

    def block_names(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the blocks in ``module``, in order."""
        if self.single:
            return (self.blocks,)
        return tuple(f"{self.blocks}.{child}" for child, _ in module.get_submodule(self.blocks).named_children())

    def shared(self) -> list[str]:
        """Parameters that are needed in more than one place: on several stages, if there are as many as blocks."""

        def places(name: str, blocks: tuple[int, ...]) -> int:
            return len({min(b, self.depth - 1) for b in blocks}) + name.startswith(f"{self.blocks}.")

        return [name for name, blocks in self.needs.items() if places(name, blocks) > 1]

    def all_cuts(self) -> Iterator[Cut]:
        """Every distinct cut: those in blocks, then those outside."""
        for cuts in self.cuts.values():
            yield from cuts
        yield from self.outside

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelPlan:
        """Inverse of :meth:`to_dict`, also after a trip through JSON."""
        return cls(
            **{
                **data,
                "kinds": tuple(data["kinds"]),
                "cuts": {kind: tuple(map(_cut, cuts)) for kind, cuts in data["cuts"].items()},
                "outside": tuple(map(_cut, data["outside"])),
                "before": tuple(data["before"]),
                "after": tuple(data["after"]),
                "tied": tuple(map(tuple, data["tied"])),
                "proven": tuple(data["proven"]),
                "summed": {kind: tuple(names) for kind, names in data["summed"].items()},
                "costs": tuple(data.get("costs", ())),
                "needs": {name: tuple(blocks) for name, blocks in data.get("needs", {}).items()},
            }
        )

    def __str__(self) -> str:
        """A picture: what runs before, in and after the blocks, and what of it is cut how."""
        lines = [f"{'model' if self.single else self.blocks or 'model'}: {self._count()}"]
        lines += [f"  before  {_with_cut(name, self.outside)}" for name in self.before]
        for kind, cuts in self.cuts.items():
            lines.append(f"  block{'' if len(self.cuts) == 1 else ' ' + kind} × {self.kinds.count(kind)}")
            lines += [f"    {line}" for cut in cuts for line in _picture(cut)]
            lines += [f"    {name} whole, its gradient summed" for name in self.summed.get(kind, ())]
        lines += [f"  after   {_with_cut(name, self.outside)}" for name in self.after]
        lines += [f"  tied    {' = '.join(names)}" for names in self.tied]
        lines += [f"  whole   {name}: {why}" for name, why in self.whole.items()]
        if self.apart != "not tried":
            shared = self.shared()
            several = f"; on several: {', '.join(shared[:4])}{', ...' * (len(shared) > 4)}" if shared else ""
            where = f"may begin at every block{several}" if not self.apart else f"none, since {self.apart}"
            lines.append(f"  stages  {where}")
        if self.proven:
            lines.append(f"  proven for {', '.join(map(str, self.proven))} tensor ranks, in float64")
            lines.append(
                f"  sequence between cuts: {'may be divided' if not self.sequence else f'whole, since {self.sequence}'}"
            )
            lines.append(f"  logits: {'may be divided' if not self.loss else f'whole, since {self.loss}'}")
        return "\n".join(lines)

    def _count(self) -> str:
        return "one block" if self.single else f"{self.depth} blocks"


def _picture(cut: Cut) -> list[str]:
    names = [c.module + (f" ({' + '.join(map(str, c.parts))})" if len(c.parts) > 1 else "") for c in cut.columns]
    divided = f", divides {', '.join(cut.attributes)}" if cut.attributes else ""
    said = f"─▶ {', '.join(cut.rows)}   {cut.units} {cut.unit}{divided}"
    width, last = max(map(len, names)), len(names) - 1
    middle = len(names) // 2 if len(names) > 2 else 0
    lines = []
    for i, name in enumerate(names):
        bar = "─" if not last else "┐" if i == 0 else "┘" if i == last else "┤"
        if i == middle:
            bar = {"┐": "┬", "┤": "┼"}.get(bar, bar) + said
        lines.append(f"{name:<{width}} {bar}")
    return lines


def _with_cut(name: str, outside: tuple[Cut, ...]) -> str:
    for cut in outside:
        if name in cut.rows or any(c.module == name for c in cut.columns):
            return f"{name}   divided along the {cut.unit} of {cut.units}"
    return name


def _cut(data: dict[str, Any]) -> Cut:
    columns = tuple(Column(c["module"], tuple(c["parts"])) for c in data["columns"])
    return Cut(**{**data, "columns": columns, "rows": tuple(data["rows"]), "attributes": tuple(data["attributes"])})
