"""What ranks that failed have to say to the person at a command."""

from __future__ import annotations

from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.commands.project import BAD_PROJECT


def why(outcomes: list[RankOutcome]) -> str:
    """The words of the rank that failed first; with its traceback, unless it refused something in words."""
    failed = next((o for o in outcomes if o.error not in (None, "PeerError")), next(o for o in outcomes if not o.ok))
    refused = failed.error in {kind.__name__ for kind in (*BAD_PROJECT, NotImplementedError)}
    return failed.message if refused else f"{failed.summary()}\n{failed.traceback or failed.stacks or failed.output}"
