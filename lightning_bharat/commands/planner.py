"""``bharat layout --cluster``: the fastest layouts of a project's module on a cluster, with their bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl

from lightning_bharat.commands.shares import proven_plans, share_of
from lightning_bharat.commands.table import size, table
from lightning_bharat.plan.cluster import Cluster
from lightning_bharat.plan.estimate import Share
from lightning_bharat.plan.layout import LayoutError
from lightning_bharat.plan.search import Choice, search

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
) -> tuple[list[Choice], list[str]]:
    """The best layouts, the fastest first, and remarks; see :func:`planned` and :func:`search`."""
    sizes = [n for n in range(1, cluster.devices + 1) if cluster.devices % n == 0]
    inside = [n for n in sizes if cluster.devices_per_node % n == 0]
    shares, notes = _shares(trainer, module, inside, time)
    try:
        found = search(shares, cluster, rows, accumulates)
    except LayoutError:
        beyond = [n for n in sizes if n not in inside]
        more, said = _shares(trainer, module, beyond, time) if beyond else ({}, [])
        if set(more) <= set(shares):
            raise
        found, notes = search(shares | more, cluster, rows, accumulates), [*notes, *said]
    return found, notes


_MEANING = (
    "Batch: micro-batches × rows of one. Bytes and seconds are those of the fullest and of the busiest rank. Gathered:",
    "weights and gradients that are whole over data ranks at once. Communication: its share that no compute hides.",
)


def _shares(
    trainer: pl.Trainer, module: pl.LightningModule, sizes: Iterable[int], time: int | None
) -> tuple[dict[int, Share], list[str]]:
    plans, notes = proven_plans(trainer, module, sizes)
    shares = {}
    for tensor, plan in plans.items():
        shares[tensor], note = share_of(trainer, module, plan, tensor, time)
        notes += [note] if note else []
        if plan.apart:
            notes.append(f"No layout with pipeline stages: {plan.apart}.")
    return shares, notes


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
