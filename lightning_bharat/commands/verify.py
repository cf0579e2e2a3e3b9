"""``bharat verify``: a few steps of a module whole against the same steps cut, and a table of differences."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bharat.cluster.outcome import RanksFailed
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.inspection import quiet
from lightning_bharat.commands.project import BAD_PROJECT
from lightning_bharat.commands.signature import say_error
from lightning_bharat.commands.table import table
from lightning_bharat.commands.verify_ranks import Record, VerifyCLI, run_cut, run_whole
from lightning_bharat.commands.why import why
from lightning_bharat.plan.layout import Layout

# What is called equal: relative differences of losses, and of gradients and weights.
_TOLERANCES = {True: (1e-9, 1e-9), False: (1e-5, 1e-3)}


def main(words: list[str]) -> int:
    """Run ``bharat verify``: 0 where all layouts give what one rank gives, 1 where one does not, 2 for bad input."""
    server = WarmServer((*PRELOAD, "lightning_bharat.commands.verify_ranks"))
    server.warm_up()
    quiet()
    try:
        cli = VerifyCLI(words)
        layouts = [Layout.parse(text) for text in cli.config.layout]
    except BAD_PROJECT as error:
        say_error("bharat verify", error)
        return 2
    verdicts = []
    try:
        for layout, found in compared(server, cli, layouts):
            precision = "float64" if cli.config.double else "float32"
            print(f"1 rank against {layout}, {layout.devices} ranks, {precision}")
            print(found if isinstance(found, Comparison) else f"NOT EQUAL: {found}", end="\n\n", flush=True)
            verdicts.append(isinstance(found, Comparison) and found.equal)
    except RanksFailed as error:
        say_error("bharat verify", f"the module does not run whole: {why(error.outcomes)}")
        return 1
    return 0 if all(verdicts) else 1


def compared(
    server: WarmServer, cli: VerifyCLI, layouts: Sequence[Layout]
) -> Iterator[tuple[Layout, Comparison | str]]:
    """Run each of ``layouts``; yields how it differs from one rank, or why it does not run.

    Raises:
        RanksFailed: the module does not run on one rank.
    """
    words, timeout = cli.words, cli.config.timeout
    wholes: dict[int, Record] = {}
    for layout in layouts:
        if layout.data not in wholes:
            wholes[layout.data] = server.run(run_whole, 1, words, layout.data, timeout=timeout)[0]
        whole = wholes[layout.data]
        parts = (words, layout, whole.batches, whole.start)
        try:
            cut = _together(server.run(run_cut, layout.devices, *parts, timeout=timeout), layout)
        except RanksFailed as error:
            yield layout, why(error.outcomes)
        else:
            yield layout, Comparison(whole, cut, *_TOLERANCES[cli.config.double])


def _together(records: list[Record], layout: Layout) -> Record:
    """One record of all ranks: losses are means over data ranks; gradients and weights are whole on each rank, those
    of its pipeline stages."""
    losses = [records[layout.rank(data=i)].losses for i in range(layout.data)]
    stages = [records[layout.rank(pipeline=i)] for i in range(layout.pipeline)]
    return Record(
        losses=[sum(of_ranks) / layout.data for of_ranks in zip(*losses, strict=True)],
        gradients=[dict(ChainMap(*of_step)) for of_step in zip(*(r.gradients for r in stages), strict=True)],
        end=dict(ChainMap(*(r.end for r in stages))),
        notes=records[0].notes,
    )


@dataclass
class Comparison:
    """A whole run against a cut one.

    Args:
        whole, cut: what each did.
        loss_tolerance: relative difference of losses up to which they are equal.
        tolerance: the same for gradients and weights, relative to the largest entry of all of them.
    """

    whole: Record
    cut: Record
    loss_tolerance: float
    tolerance: float

    def __post_init__(self) -> None:
        steps = len(self.whole.gradients)
        self.losses = list(zip(_per_step(self.whole, steps), _per_step(self.cut, steps), strict=True))
        pairs = list(zip(self.whole.gradients, self.cut.gradients, strict=False))
        self.norms = [(_norm(a), _norm(b)) for a, b in pairs]
        self.worst = [_largest(a, b) for a, b in pairs]
        self.weights = _largest(self.whole.end, self.cut.end)

    @property
    def equal(self) -> bool:
        """Whether all differences are within the tolerances; a NaN never is."""
        gradients = [_relative(a, b) for a, b in self.norms] + [value for value, _ in (*self.worst, self.weights)]
        losses = [_relative(a, b) for a, b in self.losses]
        within = all(x <= self.loss_tolerance for x in losses) and all(x <= self.tolerance for x in gradients)
        return within and 0 < len(self.whole.gradients) == len(self.cut.gradients)

    def __str__(self) -> str:
        head = ("step", "loss whole", "cut", "difference", "gradient norm whole", "cut", "difference", "largest", "of")
        rows = [
            [str(i + 1), *_pair(*losses), *_pair(*norms), f"{value:.1e}", name]
            for i, (losses, norms, (value, name)) in enumerate(zip(self.losses, self.norms, self.worst, strict=False))
        ]
        value, name = self.weights
        lines = [table(head, rows), f"weights after {len(rows)} steps: largest difference {value:.1e}, of {name}"]
        verdict = "equal" if self.equal else "NOT EQUAL"
        lines.append(f"{verdict} (losses within {self.loss_tolerance:g}, gradients and weights {self.tolerance:g})")
        return "\n".join([*lines, *(self.whole.notes | self.cut.notes)])


def _per_step(record: Record, steps: int) -> list[float]:
    """Losses of optimizer steps; 0 where the training step returned none."""
    size = len(record.losses) // steps if steps else 0
    if not size:
        return [0.0] * steps
    return [sum(record.losses[i * size : (i + 1) * size]) for i in range(steps)]


def _norm(tensors: dict[str, Tensor]) -> float:
    return torch.stack([t.double().norm() for t in tensors.values()]).norm().item() if tensors else 0.0


def _pair(whole: float, cut: float) -> tuple[str, str, str]:
    return f"{whole:.6g}", f"{cut:.6g}", f"{_relative(whole, cut):.1e}"


def _relative(whole: float, cut: float) -> float:
    return 0.0 if whole == cut else abs(cut - whole) / max(abs(whole), 1e-300)


def _largest(whole: dict[str, Tensor], cut: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest entry of all, and where it is; what one side lacks is 1."""
    scale = max((t.abs().max().item() for t in whole.values() if t.numel()), default=0.0) or 1.0
    found = {name: 1.0 for name in whole.keys() ^ cut.keys()}
    for name in whole.keys() & cut.keys():
        found[name] = ((cut[name] - whole[name]).abs().max().item() if whole[name].numel() else 0.0) / scale
    nan = next((name for name, value in found.items() if value != value), None)
    name = nan or max(found, key=lambda name: found[name], default="")
    return found.get(name, 0.0), name if found.get(name) else "none"
