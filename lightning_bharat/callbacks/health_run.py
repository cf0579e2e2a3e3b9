"""What is known of the optimizer step that is being made, and what of it is told to all ranks before it is."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import exp, inf, isfinite, isnan, log
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_bharat.callbacks.health_faults import corrupted, why_not_finite
from lightning_bharat.callbacks.health_pieces import holder
from lightning_bharat.callbacks.health_replay import Kept, Replay
from lightning_bharat.callbacks.health_threads import here, rank_name
from lightning_bharat.health import random_state
from lightning_bharat.health.batch import BatchCheck
from lightning_bharat.health.drift import DriftDetector
from lightning_bharat.health.exchange import Exchange, Step, flat, gathered
from lightning_bharat.health.finding import Finding
from lightning_bharat.health.gradients import NormShare
from lightning_bharat.health.policy import Policy
from lightning_bharat.health.spike import SpikeDetector
from lightning_bharat.strategies.again import as_held


class Run:
    """One call of ``fit``.

    Args:
        policy: what is looked for.
        recompute_every: optimizer steps from one that is computed again to the next; ``None``: never.
        vocab_size: of tokens in batches.

    Attributes:
        generators: where they are when a batch starts.
        inbox: what threads of this rank have found, to be told to all.
        steps: optimizer steps.
        last: what all ranks know of the last one.
        is_again: whether a step is being computed again.
    """

    def __init__(
        self, trainer: pl.Trainer, policy: Policy, recompute_every: int | None, vocab_size: int | None
    ) -> None:
        module = trainer.lightning_module
        self.trainer, self._policy, self._recompute_every = trainer, policy, recompute_every
        self._device, self._name = trainer.strategy.root_device, rank_name(trainer)
        self._is_on_host, self._world = self._device.type == "cpu", trainer.world_size
        self._exchange = Exchange(self._device)
        self.generators = random_state.AtBatches(self._device)
        self._check = BatchCheck(vocab_size, policy["data"] == "skip") if policy.wants("data") else None
        self._drift = DriftDetector() if policy.wants("drift") else None
        self._shares: dict[Any, NormShare] = {}
        self._wants_spikes = policy.wants("spike")
        self._spikes = defaultdict[Any, tuple[SpikeDetector, SpikeDetector]](lambda: (SpikeDetector(), SpikeDetector()))
        self._plugin: Any = trainer.precision_plugin
        is_norm = trainer.gradient_clip_algorithm in (None, "norm")
        self._clips = hasattr(self._plugin, "norm_of") and bool(trainer.gradient_clip_val) and is_norm
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._by_hand = not module.automatic_optimization
        self._batch_progress = trainer.fit_loop.epoch_loop.batch_progress
        self._takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self.window: list[Kept] = []
        self._losses: list[Tensor] = []
        self._bad: list[tuple[Any, Any, int]] = []
        self.inbox: deque[Finding] = deque()
        self.steps, self.batches = 0, 0
        self.last: Step | None = None
        self.is_again = False

    def batch_starts(self, batch: Any, index: int) -> Sequence[Finding]:
        """Look at a batch, and keep it for as long as its step may be computed again."""
        self.batches += 1
        leaves = _leaves(batch)
        if self._check is not None:
            is_bad, what = self._check.look(batch, leaves)
            if is_bad is not False:
                self._bad.append((is_bad, what, index))
        arguments = (batch, index) if self._takes_index else (batch,)
        known = self._recompute_every is None or not self._is_computed_again()
        states = self.generators.taken(index) if known else random_state.taken(self._device)
        self.window.append(Kept(arguments, states, self._batch_progress.total.ready))
        if self._by_hand and len(self.window) > 1:  # nobody knows when such a step is made
            self.window, self._losses = self.window[-1:], []
        drifted = self._drift.look(batch, leaves) if self._drift is not None else ()
        if not drifted:
            return ()
        return [Finding("drift", f"{here(self.trainer)}: {words}", self.trainer.global_rank) for words in drifted]

    def _is_computed_again(self) -> bool:
        """Whether the step that is being made will be."""
        due = self._recompute_every
        return due is not None and self.steps % due == due - 1

    def loss_is(self, loss: Tensor) -> None:
        """That of a batch, its share of the accumulated one."""
        self._losses.append(loss.detach())

    def step_of(self, optimizer: Any) -> list[Finding]:
        """What all ranks have found before ``optimizer`` makes a step; the same on all."""
        findings = as_held(self._found, optimizer)
        self.window, self._losses = [], []
        if self._bad:
            self._bad = []
        self.steps += 1
        return findings

    def _found(self, optimizer: Any) -> list[Finding]:
        self.last = step = self._exchanged(optimizer)
        found: list[Finding] = []
        if step.reports:
            found += flat(gathered([self.inbox.popleft() for _ in range(len(self.inbox))]))
        if step.bad_batches:
            return found + flat(gathered(list(self._bad_batches())))
        # Infinite gradients of a scaled loss are the scaler's, which leaves such steps out by itself.
        is_finite = isfinite(step.loss) and isfinite(step.norm)
        if not is_finite and (self._scaler is None or isnan(step.loss)):
            return [*found, self._not_finite(optimizer)] if self._policy.wants("nan") else found
        if self._wants_spikes:
            self._look_for_spikes(optimizer, step, found)
        if self._recompute_every is not None and self._is_computed_again():
            with self._again():
                replay = Replay(self.trainer, optimizer)
                found += corrupted(self.trainer, self.window, self._losses, replay, self._name)
        return found

    def _exchanged(self, optimizer: Any) -> Step:
        squared = self._squared(optimizer)
        loss: Any = self._losses[0] if len(self._losses) == 1 else sum(self._losses)
        if self._is_on_host and self._losses:
            loss = loss.item()
        if self._scaler is not None:
            loss = loss / self._scaler.get_scale()
        bad: Any = False
        for is_bad, _, _ in self._bad:
            bad = is_bad if bad is False else bad | is_bad
        return self._exchange.step(loss, squared, len(self.inbox), bad)

    def _squared(self, optimizer: Any) -> Tensor | float:
        """This rank's share of the squared norm."""
        if self._clips:
            total: Any = self._plugin.norm_of(optimizer)  # which clipping needs, too
            total = total.item() if self._is_on_host else total.double()
            return total * total / self._world
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        share = self._shares.get(optimizer)
        if share is None or len(share.parameters) != len(parameters):
            share = self._shares[optimizer] = NormShare(parameters, holder(self.trainer))
        return share.squared(self._device)

    def _bad_batches(self) -> Iterator[Finding]:
        for is_bad, what, index in self._bad:
            if bool(is_bad):
                words = f"{here(self.trainer)}: batch {index}: {what()}"
                yield Finding("data", words, self.trainer.global_rank, facts={"batch": index})

    def _not_finite(self, optimizer: Any) -> Finding:
        replay = None if self._by_hand else Replay(self.trainer, optimizer)
        with self._again():
            return why_not_finite(self.trainer, self.window, replay, self.generators.are_known(), self._name)

    def _look_for_spikes(self, optimizer: Any, step: Step, found: list[Finding]) -> None:
        losses, norms = self._spikes[optimizer]
        if (far := losses.look(step.loss)) is not None:
            found.append(self._spike("loss", step.loss, far, losses.usual()))
        # A norm's noise multiplies it, so its logarithm is looked at; that of a loss is added to it.
        if (far := norms.look(log(step.norm) if step.norm > 0 else -inf)) is not None:
            found.append(self._spike("gradient norm", step.norm, far, exp(norms.usual())))

    def _spike(self, what: str, value: float, far: float, usual: float) -> Finding:
        words = f"the {what} is {value:.4g}, {far:.0f} spreads above its median {usual:.4g}"
        return Finding("spike", f"step {self.trainer.global_step}: {words}", facts={"value": value})

    @contextmanager
    def _again(self) -> Iterator[None]:
        self.is_again = True
        try:
            yield
        finally:
            self.is_again = False


def _leaves(batch: Any) -> list[Any]:
    """Quickly where a batch is a dict of tensors, as most are."""
    if type(batch) is dict and set(map(type, leaves := list(batch.values()))) == {Tensor}:
        return leaves
    return tree_leaves(batch)
