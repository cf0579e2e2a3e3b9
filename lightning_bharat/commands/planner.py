"""``bharat layout --cluster``: the fastest layouts of a project's module on a cluster, with their bytes and seconds."""

from __future__ import annotations

from itertools import product

import lightning.pytorch as pl

from lightning_bharat.commands.counted import Cuts
from lightning_bharat.commands.shares import proven_plans, proven_sequences, share_of, spreads
from lightning_bharat.commands.table import size, table
from lightning_bharat.plan.cluster import Cluster
from lightning_bharat.plan.cut_context import ContextCut
from lightning_bharat.plan.layout import LayoutError
from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.search import Choice, search
from lightning_bharat.plan.share import Share

SHOWN = 10
_HEAD = (
    *("layout", "batch", "schedule", "saved by"),
    *("parameters", "gradients", "optimizer", "gathered", "activations", "buffers", "together"),
    *("step", "communication", "bubble"),
)


def planned(trainer: pl.Trainer, module: pl.LightningModule, cluster: Cluster, rows: int, time: int | None) -> str:
    """The best layouts for batches of ``rows`` rows of ``time`` tokens, as a table; ``None``: as in the data.

    Raises:
        LayoutError: nothing fits.
        PlanError: the step can't be counted.
    """
    found, notes = best(trainer, module, cluster, rows, time)
    return "\n".join([f"{cluster}", "", layouts_table(found), "", *dict.fromkeys((*cluster.notes, *notes, *_MEANING))])


def best(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    cluster: Cluster,
    rows: int,
    time: int | None = None,
    accumulates: bool = True,
    spread: bool = True,
) -> tuple[list[Choice], list[str]]:
    """The best layouts, the fastest first, and remarks; see :func:`planned` and :func:`search`. ``spread``: whether
    context and expert ranks are tried."""
    known = Shares(trainer, module, cluster, time, spread)
    shares, notes = known.of(inside=True)
    try:
        found = search(shares, cluster, rows, accumulates)
    except LayoutError:
        more, notes = known.of(inside=False)
        if not more:
            raise
        found = search(shares | more, cluster, rows, accumulates)
    return found, notes


_MEANING = (
    "Batch: micro-batches × rows of one. Bytes and seconds are those of the fullest and of the busiest rank. Gathered:",
    "weights and gradients that are whole over data ranks at once. Communication: its share that no compute hides.",
)


class Shares:
    """What ranks hold and do, by number of tensor and of context ranks: of one batch, so that they exchange much."""

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, cluster: Cluster, time: int | None, spread: bool
    ) -> None:
        self.trainer, self.module, self.cluster, self.time, self.spread = trainer, module, cluster, time, spread
        self._sizes = [n for n in range(1, cluster.devices + 1) if cluster.devices % n == 0]
        self._experts, self._notes = spreads(module, self._sizes if spread else ())
        self._plans: dict[int, ModelPlan] = {}
        self._sequences: dict[int, ContextCut] = {}

    def of(self, inside: bool) -> tuple[dict[tuple[int, int], Share], list[str]]:
        """Of those that are all on a node, or of the others; and what is to be said about them."""
        self._prove([n for n in self._sizes if self._on_a_node(n) == inside])
        shares: dict[tuple[int, int], Share] = {}
        for tensor, context in product(sorted(self._plans), (1, *self._sequences)):
            if self.cluster.devices % (tensor * context) == 0 and self._on_a_node(tensor * context) == inside:
                cuts = Cuts(self._plans[tensor], tensor, context, self._sequences.get(context), self._experts)
                shares[tensor, context], said = share_of(
                    self.trainer, self.module, cuts, self.time, shares.get((tensor, 1))
                )
                self._notes += said
        return shares, self._notes

    def _prove(self, sizes: list[int]) -> None:
        plans, notes = proven_plans(self.trainer, self.module, sizes)
        sequences, refused = proven_sequences(self.trainer, self.module, sizes if self.spread else (), self.time)
        self._plans |= plans
        self._sequences |= sequences
        apart = [f"No layout with pipeline stages: {plan.apart}." for plan in plans.values() if plan.apart]
        self._notes += [*notes, *refused, *apart]

    def _on_a_node(self, ranks: int) -> bool:
        return self.cluster.devices_per_node % ranks == 0


def layouts_table(found: list[Choice]) -> str:
    """The first of ``found``, and what they take."""
    rows = [_row(choice) for choice in found[:SHOWN]]
    kept = [i for i, name in enumerate(_HEAD) if name not in ("schedule", "saved by") or any(row[i] for row in rows)]
    return table([_HEAD[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _row(choice: Choice) -> list[str]:
    setting, bytes, seconds = choice.setting, choice.bytes, choice.seconds
    saved = [*([setting.recompute + " recomputation"] if setting.recompute else []), *["offload"] * setting.offload]
    sizes = (bytes.parameters, bytes.gradients, bytes.optimizer, bytes.gathered, bytes.activations, bytes.buffers)
    return [
        str(setting.layout).removeprefix("Layout(").removesuffix(")") or "data=1",
        f"{setting.microbatches} × {setting.rows}",
        setting.schedule.name,
        ", ".join(saved),
        *map(size, (*sizes, bytes.total)),
        duration(seconds.total),
        f"{seconds.communication:.1%}",
        f"{seconds.bubble:.1%}",
    ]


def duration(seconds: float) -> str:
    """In a unit of three digits.

    >>> duration(0.0123), duration(123.4), duration(2e-5)
    ('12.3 ms', '123 s', '20 µs')
    """
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
