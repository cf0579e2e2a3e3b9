"""Finds the rank that has stopped or hangs, by its signs of life and by what the kernel says of its process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from lightning_bharat.cluster import stacks
from lightning_bharat.cluster.failure import Cause, Failure
from lightning_bharat.cluster.heartbeat import Pulse
from lightning_bharat.cluster.rank_main import STACKS

_OWN_GAP = 1.0  # seconds without a look after which the launcher itself must have been held up


@dataclass(frozen=True)
class Limits:
    """Seconds after which a rank is taken for lost. The long ones are those of Megatron Bridge's launcher.

    Attributes:
        stopped: in which its process is stopped (SIGSTOP, a debugger), or gives no sign of life and uses no time.
        setup: from the call of the trainer to its first batch.
        step: between two batches of training.
        validation: between two batches of another loop.
        save: while a checkpoint is written.
        end: after the last batch, to the end of the trainer's call.
    """

    stopped: float = 3
    setup: float = 600
    step: float = 180
    validation: float = 180
    save: float = 600
    end: float = 600

    @classmethod
    def parse(cls, text: str) -> Limits:
        """From words such as ``"stopped=5,step=60"``.

        Raises:
            ValueError: another name, or no number.
        """
        names = [field.name for field in fields(cls)]
        found = {}
        for part in filter(None, text.split(",")):
            name, _, number = part.partition("=")
            try:
                found[name] = float(number)
            except ValueError:
                found[name] = 0.0
            if name not in names or not found[name] > 0:
                raise ValueError(
                    f"--limits {part}: write seconds for some of {', '.join(names)}, as in step=60,save=900"
                )
        return cls(**found)


@dataclass
class _Watched:
    pid: int
    folder: Path
    stopped_since: float | None = None
    ticks: int = -1
    ticks_since: float = 0.0


class Watch:
    """Looks at the ranks of one attempt on this host.

    Args:
        ranks: process id, and the folder with its heartbeat and stacks, by global rank.
    """

    def __init__(self, ranks: Mapping[int, tuple[int, Path]], limits: Limits) -> None:
        self._ranks = {rank: _Watched(pid, folder) for rank, (pid, folder) in ranks.items()}
        self._limits = limits
        self._looked = self._awake_since = time.monotonic()

    def pulses(self) -> dict[int, Pulse]:
        """What each rank has last said."""
        return {rank: Pulse.read(each.folder / "heartbeat") for rank, each in self._ranks.items()}

    def look(self) -> Failure | None:
        """The failure that shows by now, with the stacks of all ranks, which are to be killed then."""
        now = time.monotonic()
        if now - self._looked > _OWN_GAP:  # the machine was suspended, or this process: ranks may have been, too
            self._awake_since = now
            for each in self._ranks.values():
                each.stopped_since, each.ticks = None, -1
        self._looked = now
        pulses = self.pulses()
        stopped = [rank for rank in self._ranks if self._is_stopped(rank, pulses[rank], now)]
        if stopped:
            return self._failure("stopped", stopped, pulses, now)
        if any(self._is_late(pulse, now) for pulse in pulses.values()):
            return self._failure("hung", [], pulses, now)
        return None

    def _is_stopped(self, rank: int, pulse: Pulse, now: float) -> bool:
        each = self._ranks[rank]
        state, ticks = _process(each.pid)
        if state not in ("T", "t"):
            each.stopped_since = None
        elif each.stopped_since is None:
            each.stopped_since = now
        elif now - each.stopped_since > self._limits.stopped:
            return True
        # Frozen by a control group, say. One that only holds Python's lock for long uses time, or waits for a core.
        if ticks != each.ticks or ticks < 0 or state == "R":
            each.ticks, each.ticks_since = ticks, now
        since = max(pulse.beat, each.ticks_since, self._awake_since)
        return pulse.beat > 0 and state not in ("Z", "X", "") and now - since > self._limits.stopped

    def _is_late(self, pulse: Pulse, now: float) -> bool:
        limit = getattr(self._limits, pulse.phase, None)
        return limit is not None and now - max(pulse.progress, self._awake_since) > limit

    def _failure(self, cause: Cause, culprits: list[int], pulses: dict[int, Pulse], now: float) -> Failure:
        lines = [f"  {self._line(rank, pulse, now)}" for rank, pulse in pulses.items()]
        texts = stacks.take({rank: (each.pid, each.folder / STACKS) for rank, each in self._ranks.items()}, culprits)
        culprits = culprits or hung_first(pulses, texts)
        step = min(pulses[rank].step for rank in culprits)
        names = ", ".join(f"rank {rank}" for rank in culprits)
        pulse = pulses[culprits[0]]
        if cause == "stopped":
            words = f"{names} stopped: no sign of life, its process does nothing"
        else:
            words = f"{names} did not get on for {now - pulse.progress:.0f} s in phase {pulse.phase!r}"
        for rank, text in texts.items():
            lines.append(
                f"---- stacks of rank {rank} (process {self._ranks[rank].pid})\n{text.rstrip() or 'none came'}"
            )
        return Failure(cause, tuple(culprits), words, step, "\n".join(lines))

    def _line(self, rank: int, pulse: Pulse, now: float) -> str:
        beat = f"{now - pulse.beat:.1f} s ago" if pulse.beat else "never"
        state, _ = _process(self._ranks[rank].pid)
        return (
            f"rank {rank}: phase {pulse.phase}, step {pulse.step}, progress {now - pulse.progress:.1f} s ago, "
            f"sign of life {beat}, process state {state or 'unknown'}"
        )


def hung_first(pulses: Mapping[int, Pulse], texts: Mapping[int, str]) -> list[int]:
    """Of ranks that all stand still, those for which the others wait: behind the others by a step; else those that are
    in no collective; else all."""
    behind = min(pulse.step for pulse in pulses.values())
    those = [rank for rank, pulse in pulses.items() if pulse.step == behind]
    if len(those) == len(pulses):
        those = [rank for rank in those if texts.get(rank) and not stacks.waits_for_others(texts[rank])] or those
    return those


def _process(pid: int) -> tuple[str, int]:
    """The kernel's letter for a process's state, and the clock ticks that it has used; ``"", -1`` where it is not
    known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", -1
    words = text.rpartition(")")[2].split()
    return words[0], int(words[11]) + int(words[12])
