"""What a policy says, done: a step left out or taken back, or a run ended; alike on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_bharat.callbacks.health_pieces import piece
from lightning_bharat.callbacks.health_record import Record
from lightning_bharat.health.finding import Finding, HealthError
from lightning_bharat.health.policy import Policy, strongest
from lightning_bharat.health.snapshot import Snapshot

MOST_IN_A_ROW = 10  # steps that are left out or taken back, before the run is ended


class Actions:
    """Called before each optimizer step with what all ranks have found.

    Args:
        policy: of each kind.
        rollback_steps: from one snapshot to the next.
        record: where findings are written.
    """

    def __init__(self, policy: Policy, rollback_steps: int, record: Record) -> None:
        self._policy, self._rollback_steps, self._record = policy, rollback_steps, record
        self._snapshot: Snapshot | None = None
        self._keeps = bool(policy.uses("rollback"))
        self._in_a_row = 0

    def take(self, trainer: pl.Trainer, optimizer: Any, findings: Sequence[Finding], step: int) -> None:
        """Do the strongest of what the policy says for ``findings``; the same on all ranks.

        Raises:
            HealthError: the policy says so, or steps are left out or taken back again and again.
        """
        if findings:
            findings = [finding for finding in findings if self._policy[finding.kind] != "ignore"]
        if not findings:
            self._in_a_row = 0
            if self._keeps and (self._snapshot is None or step - self._snapshot.step >= self._rollback_steps):
                schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
                buffers = trainer.lightning_module.buffers()
                self._snapshot = Snapshot(step, buffers, trainer.optimizers, schedulers, piece)
            return
        action = strongest([self._policy[finding.kind] for finding in findings])
        if action in ("skip", "rollback"):
            findings, action = self._or_end(findings, action)
        if trainer.is_global_zero:
            self._record.write(findings, action, step)
        if action in ("restart", "leave_node"):
            raise HealthError(action, findings)
        if action == "rollback":
            assert self._snapshot is not None
            self._snapshot.restore()
        if action in ("skip", "rollback"):
            leave_out(optimizer)

    def _or_end(self, findings: Sequence[Finding], action: str) -> tuple[Sequence[Finding], str]:
        """A step that is left out heals no weights, and one that is taken back again and again nothing at all."""
        self._in_a_row += 1
        why = ""
        if action == "skip" and any(finding.facts.get("weights") for finding in findings):
            why = "weights are not finite themselves, so steps can't be left out until it is well"
        elif action == "rollback" and self._snapshot is None:
            why = "there is no snapshot yet"
        elif self._in_a_row > MOST_IN_A_ROW:
            why = f"{MOST_IN_A_ROW} steps in a row have been {'left out' if action == 'skip' else 'taken back'}"
        if not why:
            return findings, action
        return [*findings, Finding(findings[0].kind, why, findings[0].rank, findings[0].host)], "restart"


def leave_out(optimizer: Any) -> None:
    """Let ``optimizer`` step over all of its parameters: without a gradient none is changed, nor its state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
