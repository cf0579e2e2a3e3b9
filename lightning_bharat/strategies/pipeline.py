"""A step of a module over the stages of a pipeline: forward and backward in a schedule, or forward alone as a relay."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_bharat.plan.model_plan import ModelPlan
from lightning_bharat.plan.partition import spread, stages_of
from lightning_bharat.strategies import schedule as schedules
from lightning_bharat.strategies.microbatch import MicrobatchError, Split, batch_size, doubt, parts, split
from lightning_bharat.strategies.recording import Recorder, replay
from lightning_bharat.strategies.stage import Stage, StageDone, before_blocks
from lightning_bharat.strategies.stage_metrics import StageMetrics
from lightning_bharat.strategies.telling import tell
from lightning_bharat.strategies.timeline import Clock, Timeline
from lightning_bharat.strategies.token_weights import Labels, counted_labels
from lightning_bharat.strategies.unchanged import unchanged

Step = Callable[[Any], Any]


class PipelineError(ValueError):
    """A step that can't be run in a pipeline; the message says what to write."""


@dataclass
class Trained:
    """What a scheduled step left.

    Attributes:
        loss: of the whole batch, on all ranks.
        factor: by which its gradients must be multiplied to be those of the loss, divided as asked.
        labels: of the batch.
    """

    loss: Tensor
    factor: float
    labels: Labels


class Pipeline:
    """The stages of one rank, and how batches go through them.

    Args:
        module: cut, with the parameters of other stages elsewhere.
        plan: of the module.
        blocks: of each stage.
        kind: the schedule.
        group: the pipeline's ranks, in order.
        device: where this rank computes.
        microbatches: how many are wanted; ``None``: twice the stages.
        split: how a batch is divided; ``None``: along its batch dimension.
        seed: of random numbers in micro-batches, another one for each data rank.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        plan: ModelPlan,
        blocks: list[range],
        kind: schedules.Kind,
        group: dist.ProcessGroup,
        device: torch.device,
        microbatches: int | None,
        split: Split | None,
        seed: int,
    ) -> None:
        self.module, self.plan, self.kind, self.group, self.device = module, plan, kind, group, device
        self.blocks = blocks
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        mine = stages_of(self.rank, self.ranks, kind.each, kind.placement)
        self.stages = [Stage(module, plan, i, self.blocks[i]) for i in mine]
        places = [stages_of(rank, self.ranks, kind.each, kind.placement) for rank in range(self.ranks)]
        self.rank_of = {stage: rank for rank, stages in enumerate(places) for stage in stages}
        self.last = self.rank_of[len(self.blocks) - 1]
        self.metrics = StageMetrics(module, group, self.last)
        self.clock = Clock(device, self.rank)
        self.microbatches = microbatches or 2 * len(self.blocks)
        self.split = split
        self.seed, self.steps = seed, 0
        self._schedules: dict[tuple, Any] = {}
        self._shapes: dict[Any, Tensor] = {}
        self._proven = False

    @property
    def is_last(self) -> bool:
        """Whether the last stage is this rank's."""
        return self.rank == self.last

    # ---- training

    def train(self, step: Step, batch: Any, divided_by: int, scale: Callable[[Tensor], Tensor]) -> Trained:
        """Forward and backward of ``step`` on all micro-batches; gradients are left in the parameters.

        Args:
            step: the training step on a batch or a part of it.
            batch: whole.
            divided_by: of the loss for the backward pass (batches that are accumulated).
            scale: of the loss for the backward pass (a gradient scaler's).

        Raises:
            PipelineError: on all ranks: no single loss, or one that isn't the mean of its micro-batches' losses.
        """
        parts = self._split(batch)
        if not self._proven:
            self._prove(step, batch, parts)
        hidden = self._hidden(step, parts[0])
        recorder, losses, weights, labels = Recorder(self.module, self.metrics), [], [], []
        self.steps += 1

        def run(mb: int) -> Tensor:
            self._seed(mb)
            with recorder.recording(), self._counting() as count:
                out = step(parts[mb])
            loss = _loss_of(out)
            labels.append(count(out))
            losses.append(loss.detach())
            weights.append(_weight(labels[-1], parts[mb], batch))
            # Near its share of the loss, since 16 bits overflow; exactly its share if all weigh the same.
            return scale(loss * (weights[-1] / unit()) / (len(parts) * divided_by))

        def unit() -> float:
            return next((weight for weight in weights if weight), 1.0)

        with self.metrics.batch() as value_of:
            self._run(run, hidden, len(parts))
        entries: Any = None
        if self.is_last:
            total = sum(weights)
            loss = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / (total or 1.0)
            factor = len(parts) * unit() / total if total else 1.0
            told = recorder.of_batch(weights if total else [1.0] * len(weights), value_of)
            entries = loss, factor, _of_batch(labels), told, _not_a_mean(labels, weights)
        loss, factor, every, logged, problem = self._tell(entries)
        if problem:
            raise PipelineError(problem)
        replay(self.module, logged, self.metrics, self.device)
        return Trained(loss.to(self.device), factor, every)

    def _counting(self) -> AbstractContextManager[Callable[[Any], Labels]]:
        """Where there is a loss, its labels are counted: other stages are spared the look at every function."""
        return counted_labels(_loss_of) if self.is_last else nullcontext(lambda _: Labels())

    def _run(self, run: Callable[[int], Tensor], hidden: Tensor, number: int) -> None:
        key = (tuple(hidden.shape), hidden.dtype, number)
        if key not in self._schedules:
            self._schedules[key] = schedules.make(
                self.kind, self.stages, len(self.blocks), hidden.clone(), number, self.group, self.clock
            )
        for stage in self.stages:
            stage.run = run
        with _same_random_numbers_after(self.device):
            try:
                self._schedules[key].step(
                    arg_mbs=[()] * number,
                    kwarg_mbs=[{"mb": i} for i in range(number)],
                    target_mbs=[None] * number,
                    return_outputs=False,
                )
            except RuntimeError as error:  # torch's words around a person's own error
                self._schedules.clear()
                raise _innermost(error) from error

    def _split(self, batch: Any) -> list[Any]:
        if self.split is not None:
            return self.split(batch, self.microbatches)
        return split(batch, parts(batch_size(batch), self.microbatches))

    def _seed(self, mb: int) -> None:
        """The same random numbers on all stages, and others in each micro-batch of each batch of the whole run, which a
        resumed one counts on."""
        batches = self.module.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        text = f"{self.seed}/{batches}/{mb}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % 2**63
        # Not torch.manual_seed: where CUDA was never used it keeps each call, with its stack, for later.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _hidden(self, step: Step, batch: Any) -> Tensor:
        """Shape and type of the hidden state of ``batch``, from what runs before the blocks."""
        key = _shapes(batch)
        if key not in self._shapes:
            with before_blocks(self.module, self.plan), self._quiet(), torch.no_grad():
                try:
                    step(batch)
                except StageDone as done:
                    dtype = getattr(torch, self.plan.wire)
                    self._shapes[key] = torch.empty(done.hidden.shape, dtype=dtype, device=self.device)
                else:
                    raise PipelineError("the step ended before its first block")
        return self._shapes[key]

    @torch.no_grad()
    def _prove(self, step: Step, batch: Any, parts: list[Any]) -> None:
        """A batch's loss is the weighted mean of its micro-batches' losses: compared once, without dropout."""
        found: list[tuple[float, float]] = []
        training = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            for part in [batch, *parts]:
                with self._quiet(), counted_labels(_loss_of) as count, self._in_doubt(batch, part):
                    out = self.relay(step, part)
                if self.is_last:
                    found.append((float(_loss_of(out)), _weight(count(out), part, batch)))
        finally:
            for m, was in training.items():
                m.training = was
        words: str = self._tell(_compared(found, _loss_tolerance(self.plan.wire)) if self.is_last else "")
        if words:
            raise PipelineError(f"{words}. {self._doubt(batch)}".rstrip(" ."))
        self._proven = True

    def _doubt(self, batch: Any) -> str:
        return "" if self.split is not None else doubt(batch)

    @contextmanager
    def _in_doubt(self, batch: Any, part: Any) -> Iterator[None]:
        """A step that fails on a part and not on the batch may have got a part of what can't be split."""
        try:
            yield
        except Exception as error:
            if part is not batch and (words := self._doubt(batch)):
                raise MicrobatchError(f"{type(error).__name__} on a part of a batch: {error}. {words}") from error
            raise

    def begin_timeline(self) -> None:
        """Follow the next step's work. All ranks of the pipeline must call it."""
        dist.barrier(self.group)
        self.clock.begin()

    def end_timeline(self) -> Timeline:
        """What all ranks did since. All ranks of the pipeline must call it."""
        of_ranks: list[Any] = [None] * self.ranks
        dist.all_gather_object(of_ranks, self.clock.take(), group=self.group)
        return Timeline(tuple(span for spans in of_ranks for span in spans))

    def measured_costs(self) -> tuple[int, ...]:
        """As ``ModelPlan.costs``, in nanoseconds of a micro-batch; those of the plan as long as nothing has run. All
        ranks of the pipeline must call it."""
        of_ranks: list[Any] = [None] * self.ranks
        dist.all_gather_object(of_ranks, self.clock.costs(), group=self.group)
        seconds = {stage: cost for costs in of_ranks for stage, cost in costs.items()}
        if len(seconds) < len(self.blocks):
            return self.plan.costs
        return spread([seconds[i] * 1e9 for i in range(len(self.blocks))], self.blocks, self.plan.costs)

    # ---- evaluation

    def relay(self, step: Step, batch: Any) -> Any:
        """Forward alone: each stage gets the hidden state from the one before.

        Returns:
            What ``step`` returns on the last stage; ``None`` on other ranks.
        """
        hidden, out = self._hidden(step, batch), None
        for stage in self.stages:
            stage.run = lambda mb: step(batch)
            arrived = () if stage.is_first else (self._receive(stage, hidden),)
            out = stage(*arrived, mb=0)
            if not stage.is_last:
                self._send(stage, out)
        return out if self.is_last else None

    def evaluate(self, step: Step, batch: Any, share: bool) -> Any:
        """A step of evaluation or prediction; logs on all ranks what it logs.

        Returns:
            What ``step`` returns; on the last stage alone unless ``share``.
        """
        recorder = Recorder(self.module, self.metrics)
        with recorder.recording(), self.metrics.batch() as value_of:
            out = self.relay(step, batch)
        entries = (recorder.of_batch([1.0], value_of), out if share else None) if self.is_last else None
        logged, told = self._tell(entries)
        replay(self.module, logged, self.metrics, self.device)
        return out if self.is_last else told

    def _receive(self, stage: Stage, like: Tensor) -> Tensor:
        source = self.rank_of[stage.index - 1]
        if source == self.rank:
            return self._kept
        arrived = torch.empty_like(like)
        dist.recv(arrived, group_src=source, group=self.group)
        return arrived

    def _send(self, stage: Stage, hidden: Tensor) -> None:
        target = self.rank_of[stage.index + 1]
        if target == self.rank:
            self._kept = hidden
        else:
            dist.send(hidden.contiguous(), group_dst=target, group=self.group)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Nothing is logged or changed, and no random number used up."""
        recording = Recorder(self.module, self.metrics).recording()
        with unchanged(self.module), recording, _same_random_numbers_after(self.device):
            yield

    def _tell(self, value: Any) -> Any:
        """``value`` of the last stage's rank, on all ranks of the pipeline."""
        return tell(value, self.last, self.group, self.device)


def _loss_of(out: Any) -> Tensor:
    loss = out.get("loss") if isinstance(out, dict) else out
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise PipelineError(
            f"under a pipeline the training step must return one loss (a tensor, or a dict with 'loss'), and it "
            f"returned {type(out).__name__}; use pipeline_parallel_size=1 for a step that skips batches"
        )
    return loss.reshape(())


def _weight(labels: Labels, part: Any, batch: Any) -> float:
    """How much a micro-batch counts: by valid labels where there is one mean over them, else by samples."""
    if labels.number is not None:
        return labels.number
    with suppress(ValueError):
        return batch_size(part) / batch_size(batch)
    return 1.0


def _of_batch(parts: list[Labels]) -> Labels:
    numbers = [part.number for part in parts if part.number is not None]
    if len(numbers) < len(parts):
        return Labels()
    return Labels(sum(numbers), all(part.alone for part in parts))


def _not_a_mean(labels: list[Labels], weights: list[float]) -> str:
    """Why the batch's loss is not the weighted mean of its parts' losses: "" unless a term has other weights."""
    if all(part.alone for part in labels) or len(set(weights)) == 1:
        return ""
    return (
        "the micro-batches of a batch have different numbers of valid labels, and the loss is more than one cross "
        "entropy over them: it is not the mean of its micro-batches' losses. Write num_microbatches=1, or give each "
        "sample the same number of labels"
    )


def _compared(found: list[tuple[float, float]], tolerance: float) -> str:
    (whole, _), *parts = found
    total = sum(weight for _, weight in parts)
    mean = sum(loss * weight for loss, weight in parts) / (total or 1.0)
    if abs(whole - mean) <= tolerance * max(1.0, abs(whole)) or whole != whole:
        return ""
    return (
        f"the loss of a batch is {whole:.9g}, and the mean of the losses of its {len(parts)} micro-batches {mean:.9g}: "
        "a pipeline would train with another loss. Write num_microbatches=1, or a step whose loss is a mean over "
        "samples, or over labels by one cross_entropy"
    )


def _loss_tolerance(dtype: str) -> float:
    return {"float64": 1e-9, "float32": 1e-4}.get(dtype, 3e-2)


def _shapes(batch: Any) -> Any:
    leaves, spec = tree_flatten(batch)
    return str(spec), tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves)


@contextmanager
def _same_random_numbers_after(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_type(device)):
        yield


def _type(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def _innermost(error: BaseException) -> BaseException:
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error
