"""Who holds up the others, from what each rank says of itself when all stand still; and the report of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_bharat.health import stacks
from lightning_bharat.health.finding import Finding

Name = Callable[[int], str]
Places = Mapping[int, tuple[str, int]]


@dataclass(frozen=True)
class Standing:
    """Where a rank stands.

    Attributes:
        host: its name.
        pid: of its process.
        count: hooks that its main thread has passed.
        phase: the last of them.
        step: optimizer steps.
        where: the innermost frame of its main thread.
        in_collective: whether that seems to wait for other ranks.
        stacks: of all its threads.
        collectives: the flight record of its backend.
    """

    host: str
    pid: int
    count: int
    phase: str
    step: int
    where: str
    in_collective: bool
    stacks: str
    collectives: str = ""


def judged(why: Finding, standings: Mapping[int, Standing], world_size: int, name: Name, places: Places) -> Finding:
    """Names the culprits: ranks that do not answer; else those that passed the fewest hooks; of these the ones that
    wait for nobody, where there are others."""
    mute = [rank for rank in range(world_size) if rank not in standings]
    if mute:
        at = ", ".join(f"{name(rank)} on {_place(rank, places)}" for rank in mute)
        words = f"{at} does not answer: stopped, dead, or cut off; {why.message}"
        return Finding("silent", words, mute[0], places.get(mute[0], ("?", 0))[0], {"ranks": mute})
    least = min(standing.count for standing in standings.values())
    behind = [rank for rank, standing in standings.items() if standing.count == least]
    busy = [rank for rank in behind if not standings[rank].in_collective]
    culprits = busy or behind
    first = standings[culprits[0]]
    if len(culprits) == world_size > 1:
        words = f"{why.message}; no rank is behind the others: all are after {first.phase} in step {first.step}"
        return Finding("hang", f"{words}, {name(culprits[0])} at {first.where}", None, first.host)
    at = ", ".join(f"{name(rank)} on {standings[rank].host}" for rank in culprits)
    words = f"{why.message}; {at} holds up the others: after {first.phase} in step {first.step}, at {first.where}"
    return Finding("hang", words, culprits[0], first.host, {"ranks": culprits})


def _place(rank: int, places: Places) -> str:
    host, pid = places.get(rank, ("an unknown host", 0))
    return f"{host} (process {pid})"


def report(finding: Finding, standings: Mapping[int, Standing], world_size: int, name: Name, places: Places) -> str:
    """All that is known, for people: the verdict, a line for each rank, then stacks and collectives."""
    lines = [f"{finding.kind}: {finding.message}", ""]
    for rank in range(world_size):
        if standing := standings.get(rank):
            at = f"after {standing.phase} in step {standing.step} ({standing.count} hooks), at {standing.where}"
            lines.append(f"{name(rank)} on {_place(rank, places)}: {at}")
        else:
            lines.append(f"{name(rank)} on {_place(rank, places)}: no answer")
    for rank in range(world_size):
        lines += ["", f"---- {name(rank)}"]
        if standing := standings.get(rank):
            lines += [standing.stacks.rstrip(), *_collectives(standing)]
        else:
            lines.append(_seen_from_outside(rank, places))
    return "\n".join(lines) + "\n"


def _collectives(standing: Standing) -> list[str]:
    return ["collectives:", standing.collectives] if standing.collectives else []


def _seen_from_outside(rank: int, places: Places) -> str:
    host, pid = places.get(rank, ("", 0))
    if host != os.uname().nodename:
        return "on another host: look there"
    return stacks.of_another(pid) or "no stacks: py-spy, which could see a stopped process, is not installed"
