"""What a detector has found, and the error by which a run ends for it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start it again


@dataclass(frozen=True)
class Finding:
    """A fault.

    Attributes:
        kind: one of :data:`~lightning_bharat.health.policy.KINDS`.
        message: what was seen, with the names of ranks, hosts, modules or files.
        rank: whose fault it is; ``None`` where no one rank's.
        host: where that rank runs, or the one that found it.
        facts: plain data for the record.
    """

    kind: str
    message: str
    rank: int | None = None
    host: str = field(default_factory=lambda: os.uname().nodename)
    facts: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For :func:`lightning_bharat.events.append`."""
        found = asdict(self)
        found["fault"], found["node"] = found.pop("kind"), found.pop("host")
        return {**found.pop("facts"), **found}


class HealthError(RuntimeError):
    """Ends all ranks, so that a launcher starts them again; the message begins with the policy's word.

    Attributes:
        action: ``"restart"`` or ``"leave_node"``.
        findings: why.
    """

    def __init__(self, action: str, findings: Iterable[Finding]) -> None:
        self.action, self.findings = action, list(findings)
        nodes = ", ".join(dict.fromkeys(finding.host for finding in self.findings))
        what = f"leave out {nodes} and restart" if action == "leave_node" else "restart"
        super().__init__(f"{what}: " + "; ".join(f"{f.kind}: {f.message}" for f in self.findings))
