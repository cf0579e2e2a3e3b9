"""What a step that went wrong says of its causes: asked on all ranks together, answered with the same words on all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import lightning.pytorch as pl
from torch import Tensor

from lightning_bharat.callbacks.health_pieces import piece
from lightning_bharat.callbacks.health_replay import Kept, Replay
from lightning_bharat.health.exchange import gathered
from lightning_bharat.health.finding import Finding
from lightning_bharat.health.gradients import not_finite
from lightning_bharat.health.origin import Origin
from lightning_bharat.health.recompute import Computed, differs, is_exact
from lightning_bharat.health.trace import Trace
from lightning_bharat.plan.elsewhere import is_elsewhere

Name = Callable[[int], str]


@dataclass
class _Seen:
    """What one rank saw."""

    rank: int
    gradients: list[str]
    values: list[str]
    origin: str = ""
    forward: bool = False
    batch: int = 0
    numbers_are_known: bool = True
    host: str = field(default_factory=lambda: os.uname().nodename)


def why_not_finite(
    trainer: pl.Trainer, window: Sequence[Kept], replay: Replay | None, numbers_are_known: bool, name: Name
) -> Finding:
    """Names the module that made the first value that is not finite, and the rank. All ranks must call it.

    Args:
        replay: runs the step again; ``None`` where that can't be done (a step that optimizes by hand).
        numbers_are_known: whether it surely draws the same random numbers.
    """
    mine = _Seen(trainer.global_rank, *not_finite(_named(trainer), piece), numbers_are_known=numbers_are_known)
    for i, kept in enumerate(window if replay is not None else ()):
        assert replay is not None
        origin = Origin()
        with origin.watching(trainer.lightning_module), replay.run([kept]):
            if origin.words and not mine.origin:
                mine.origin, mine.forward, mine.batch = origin.words, origin.forward, i
    every = gathered(mine)
    is_same = replay is not None and all(seen.numbers_are_known for seen in every)
    return _named_first(every, trainer.global_step, name, is_same)


def _named_first(every: Sequence[_Seen], step: int, name: Name, is_same: bool) -> Finding:
    made = [seen for seen in every if seen.origin]
    first = min(made, key=lambda seen: (seen.batch, not seen.forward), default=None)
    facts = {"weights": any(seen.values for seen in every)}
    if first is not None:
        module = first.origin
        words = f"{name(first.rank)} on {first.host}: the first value that is not finite is made {module}"
        also = [seen.rank for seen in made if seen is not first and seen.origin == module]
        more = f", and on {len(also)} more ranks" if also else ""
        return Finding("nan", f"step {step}, {words}{more}", first.rank, first.host, {**facts, "module": module})
    has = [seen for seen in every if seen.gradients]
    if not has:
        return Finding("nan", f"step {step}: the loss is not finite, and all gradients are", facts=facts)
    seen = has[0]
    others = f" and {len(seen.gradients) - 1} more" if len(seen.gradients) > 1 else ""
    words = f"the gradient of {seen.gradients[0]}{others} is not finite on {name(seen.rank)} on {seen.host}"
    if is_same:
        words += "; computed again it is: a hook or callback has changed it, or a device or link has failed"
    return Finding("nan", f"step {step}: {words}", seen.rank, seen.host, {**facts, "parameter": seen.gradients[0]})


def corrupted(
    trainer: pl.Trainer, window: list[Kept], losses: list[Tensor], replay: Replay, name: Name
) -> list[Finding]:
    """Computes the step again, and compares. All ranks must call it.

    Gradients are sums over ranks, so a fault in one may be in those of all. Which rank it was, its own loss says; or
    two more runs, of which each module's values are compared before ranks exchange anything; or that no other rank has
    gradients that differ. Where nothing says so, nobody is named.
    """
    exact, named = is_exact(trainer.strategy.root_device), list(_named(trainer))
    first = Computed.of(losses, named, piece)
    with replay.run(window) as again:
        apart = differs(first, Computed.of(again, named, piece), exact)
    told = gathered(apart)
    if not any(told):
        return []
    traces = Trace(), Trace()
    for trace in traces:
        with trace.watching(trainer.lightning_module), replay.run(window):
            pass
    unsteady = gathered(traces[0].differs(traces[1]) if exact else "")
    clues = [[t if t.startswith("the loss") else "" for t in told], unsteady, told]
    guilty = next((c for c in clues if sum(map(bool, c)) == 1), None)
    hosts, step = gathered(os.uname().nodename), trainer.global_step
    if guilty is None:
        what = next(filter(None, told))
        words = f"step {step}, computed twice from the same, gives two results ({what}); the rank is not known"
        return [Finding("corruption", words)]
    ((rank, what),) = ((rank, what) for rank, what in enumerate(guilty) if what)
    words = f"step {step}, computed twice from the same, gives two results on {name(rank)} on {hosts[rank]}: {what}"
    return [Finding("corruption", words, rank, hosts[rank])]


def _named(trainer: pl.Trainer) -> Iterator[tuple[str, Tensor]]:
    """What optimizers step, by full name."""
    names = {id(p): n for n, p in trainer.lightning_module.named_parameters()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                if is_elsewhere(parameter):
                    continue
                yield names.get(id(parameter), f"parameter {i}"), parameter
