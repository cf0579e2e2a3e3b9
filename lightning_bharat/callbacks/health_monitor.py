"""Finds what goes wrong in a run, says who and where, and does what the policy for it says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bharat.callbacks.health_actions import Actions
from lightning_bharat.callbacks.health_record import Record
from lightning_bharat.callbacks.health_run import Run
from lightning_bharat.callbacks.health_threads import Threads, here
from lightning_bharat.callbacks.replica_check import ReplicaCheck, ReplicaError
from lightning_bharat.health import out_of_memory
from lightning_bharat.health.batch import of_loader
from lightning_bharat.health.finding import Finding, HealthError
from lightning_bharat.health.policy import Policy
from lightning_bharat.health.prober import Intervals


class HealthMonitor(pl.Callback):
    """Watches a run under any strategy. What is found, how, how soon and with which policy is in docs/health.md.

    Ranks decide alike at the same step: what one of them sees goes into one sum of four numbers for each optimizer
    step. Threads watch what a main thread can't: that it stands still, other ranks, links, memory, disks, devices.

    Args:
        policy: kind of fault → ``"ignore"``, ``"log"``, ``"skip"`` (the optimizer step is not made, on any rank),
            ``"rollback"`` (weights, optimizers and schedulers as they were ``rollback_steps`` ago at most; the data
            goes on), ``"restart"`` (an error that ends all ranks, for a launcher to start them again) or
            ``"leave_node"`` (the same, and the node is named in the event).
        hang_seconds: without a sign that the main thread goes on; longer than a step, a save or a compilation takes.
        silence_seconds: without a sign of life of another rank.
        rollback_steps: from one snapshot in this rank's memory to the next, where a policy says ``"rollback"``.
        recompute_every_n_steps: compute an optimizer step again and compare the gradients, to find silent corruption;
            ``None``: never. Costs as much as a step each time.
        replicas_every_n_steps: compare what several ranks hold the same of, as
            :class:`~lightning_bharat.callbacks.ReplicaCheck` does; ``None``: never.
        vocab_size: tokens of a batch must be below it; ``None``: they are not looked at.
        folders: that the run writes to, besides its own, those of checkpoints and the one for temporary files.

    Raises:
        ValueError: a kind, an action or a number that there is not.
        MisconfigurationException: what can't be done under the strategy.
        HealthError: in training, on all ranks at the same step, where a policy says so.
    """

    knows_pieces = True  # it takes the gradients in its hooks for what they are
    intervals = Intervals()

    def __init__(
        self,
        policy: Mapping[str, str] | None = None,
        hang_seconds: float = 600.0,
        silence_seconds: float = 30.0,
        rollback_steps: int = 100,
        recompute_every_n_steps: int | None = None,
        replicas_every_n_steps: int | None = 1000,
        vocab_size: int | None = None,
        folders: Sequence[str] = (),
    ) -> None:
        numbers = {
            "hang_seconds": hang_seconds,
            "silence_seconds": silence_seconds,
            "rollback_steps": rollback_steps,
            "recompute_every_n_steps": recompute_every_n_steps,
            "replicas_every_n_steps": replicas_every_n_steps,
            "vocab_size": vocab_size,
        }
        for name, value in numbers.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r}: write a number above 0")
        self._given, self.policy = dict(policy or {}), Policy(policy)
        self.hang_seconds, self.silence_seconds, self.rollback_steps = hang_seconds, silence_seconds, rollback_steps
        self.recompute_every_n_steps, self.vocab_size = recompute_every_n_steps, vocab_size
        self.folders = [Path(folder) for folder in folders]
        self._replicas = ReplicaCheck(replicas_every_n_steps) if replicas_every_n_steps is not None else None
        self._compares = False
        self._threads: Threads | None = None

    # ---- the run begins and ends

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        deepspeed = isinstance(trainer.strategy, DeepSpeedStrategy)
        if deepspeed:
            self._refuse_in_deepspeed()
        if self.recompute_every_n_steps is None:
            return
        why = ""
        if not pl_module.automatic_optimization:
            why = "a step that optimizes by hand can't be computed again"
        elif deepspeed or getattr(trainer.precision_plugin, "scaler", None) is not None:
            why = "gradients are scaled, or DeepSpeed has them"
        if why:
            given = self.recompute_every_n_steps
            raise MisconfigurationException(f"recompute_every_n_steps={given}: {why}; write None")

    def _refuse_in_deepspeed(self) -> None:
        for kind, action in self._given.items():
            if action in ("skip", "rollback"):
                raise MisconfigurationException(
                    f"policy[{kind!r}]={action!r}: DeepSpeed keeps gradients and weights to itself, so a step can't be "
                    'left out or taken back; write "log" or "restart"'
                )
        self.policy = Policy({**dict.fromkeys(self.policy.uses("skip"), "log"), **self._given})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record = Record(Path(trainer.default_root_dir))
        self._run = Run(trainer, self.policy, self.recompute_every_n_steps, self.vocab_size)
        self._actions = Actions(self.policy, self.rollback_steps, self._record)
        self._threads = Threads(
            *(trainer, self.policy, self._record, self._run.inbox.append, self.folders),
            *(self.hang_seconds, self.silence_seconds, self.intervals),
        )
        self._passed = self._threads.progress.passed
        self._threads.start()
        if self._replicas is not None and trainer.world_size > 1 and self.policy.wants("corruption"):
            try:
                self._replicas.setup(trainer, pl_module, "fit")
            except MisconfigurationException:  # a strategy that places weights in its own way
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is nothing to compare
                self._replicas.on_train_start(trainer, pl_module)
            self._compares, self._compares_at = True, self._replicas.every_n_train_steps

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._threads is not None:
            self._threads.stop()
            self._threads = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._threads is None:
            return
        self._stop()
        found = of_loader(exception, self._run.batches)
        if out_of_memory.is_out_of_memory(exception):
            found = Finding("out_of_memory", f"ran out of memory with {self._held(trainer)}: {exception}")
        if found is not None and self.policy.wants(found.kind):
            words = f"{here(trainer)}: {found.message}"
            named = Finding(found.kind, words, trainer.global_rank, found.host, found.facts)
            self._record.write([named], "log", trainer.global_step)

    def _held(self, trainer: pl.Trainer) -> str:
        parameters = list(trainer.lightning_module.parameters())
        states = [v for o in trainer.optimizers for state in o.state.values() for v in state.values()]
        groups: dict[str, Any] = {
            "weights": parameters,
            "gradients": [parameter.grad for parameter in parameters],
            "optimizer states": states,
            "batches": [kept.arguments[0] for kept in self._run.window],
        }
        return out_of_memory.held(groups.items(), trainer.strategy.root_device)

    # ---- a step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._passed("the start of a batch")
        for finding in self._run.batch_starts(batch, batch_idx):
            self._record.write([finding], "log", self._run.steps)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not self._run.is_again:
            self._passed("a forward pass")
            self._run.loss_is(loss)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._threads is None or self._run.is_again:
            return
        step = self._run.steps
        self._actions.take(trainer, optimizer, self._run.step_of(optimizer), step)
        self._threads.progress.step = step + 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._passed("the end of a batch")
        every, last = trainer.log_every_n_steps, self._run.last  # type: ignore[attr-defined]
        if every and last is not None and self._run.steps % every == 0:
            self._record.to_logger(trainer, gradient_norm=last.norm)
        elif self._record.counts:
            self._record.to_logger(trainer)
        if self._replicas is not None and self._compares and self._run.steps >= self._compares_at:
            self._compares_at = self._run.steps + self._replicas.every_n_train_steps
            try:
                self._replicas.on_train_batch_end(trainer)
            except ReplicaError as error:
                self._differ(trainer, error)

    def _differ(self, trainer: pl.Trainer, error: ReplicaError) -> None:
        finding, action = Finding("corruption", str(error)), self.policy["corruption"]
        if trainer.is_global_zero:
            self._record.write([finding], action, self._run.steps)
        if action != "log":
            raise HealthError(action, [finding]) from error

    # ---- other signs that the main thread goes on

    def on_validation_batch_start(self, *_: Any) -> None:
        if self._threads is not None:
            self._passed("the start of a batch of validation")

    def on_validation_batch_end(self, *_: Any) -> None:
        if self._threads is not None:
            self._passed("a batch of validation")
            self._run.generators.begin()

    def on_save_checkpoint(self, *_: Any) -> None:
        if self._threads is not None:
            self._passed("the start of a save")

    def on_train_epoch_start(self, *_: Any) -> None:
        self._passed("the start of an epoch")
