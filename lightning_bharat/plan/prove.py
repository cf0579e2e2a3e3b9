"""Proof that a cut computes the same: one block in float64, whole and on as many threads as there are tensor ranks.

Each thread runs the very code that a rank runs in training (:mod:`slicing`), over :class:`ThreadPeers`. Outputs, the
gradient of every input and of every parameter are compared with the whole block's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError

from lightning_bharat.plan.alone import Alone
from lightning_bharat.plan.cut_modules import Flow
from lightning_bharat.plan.exchange import Peers, Table, ThreadPeers
from lightning_bharat.plan.model_plan import Cut
from lightning_bharat.plan.observe import Call, Observation
from lightning_bharat.plan.shards import TensorSlice
from lightning_bharat.plan.slicing import Slicer

TOLERANCE = 1e-9  # relative to the largest value; float64 rounding of a block is below 1e-12
SMALLEST = 1e-5  # of a block's largest gradient: below, differences are compared with this
PATIENCE = 60.0  # seconds for which a thread waits for its peers
LARGE = 4_000_000  # elements of a weight whose own gradient is not compared, only that of what flows through it


@dataclass(frozen=True)
class Verdict:
    """What a proof found: "" as ``problem`` where the cut is right. ``summed`` are the whole parameters whose gradient
    is partial on each rank, so that it must be summed."""

    problem: str = ""
    summed: tuple[str, ...] = ()


@dataclass
class _Pass:
    """A forward and a backward pass."""

    outputs: list[Tensor]
    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor]


@dataclass
class _Run:
    """Passes in both modes, the buffers after training, and what evaluation returns without gradients."""

    evaluation: _Pass
    training: _Pass
    buffers: dict[str, Tensor]
    evaluated: list[Tensor]


class Sample:
    """One block of a kind with random weights in float64, random inputs, and what it computes whole."""

    def __init__(self, seen: Observation, module: nn.Module, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.tolerance = seen.hidden, TOLERANCE
        self.slices: dict[str, TensorSlice] = {}
        self.block = _real_block(module.get_submodule(seen.names[seen.kinds.index(kind)]), generator)
        self.call = _real_call(seen.calls[kind], generator)
        self.seeds: list[Tensor] = []
        self.differentiates_training = True
        self.whole = self._run(self.block)
        if seen.random and not self._trains_alike_again():
            self.differentiates_training = False
            self.whole.training, self.whole.buffers = self._train(self.block)

    def _trains_alike_again(self) -> bool:
        """Not where a person's own recomputation of the block draws dropout's dice again, out of sight of any mode."""
        return not self._gradients_differ([self._train(self.block)[0]], self.whole.training, {})

    def prove(self, cuts: Sequence[Cut], ranks: int, summed: Sequence[str] = (), divided: bool = False) -> Verdict:
        """Compare the cut block on ``ranks`` threads with the whole one."""
        return self.prove_made(ranks, lambda peers: self._cut(cuts, peers, summed, divided))

    def prove_made(self, ranks: int, make: Callable[[Peers], nn.Module]) -> Verdict:
        """As :meth:`prove`, for the block that ``make`` cuts for one of the peers."""
        table = Table(ranks, PATIENCE)
        blocks = []
        for rank in range(ranks):
            try:
                blocks.append(make(ThreadPeers(table, rank)))
            except Exception as error:  # a setting that cannot be divided, a shape that does not fit
                return Verdict(f"{type(error).__name__}: {error}")
        errors: list[BaseException] = []

        def play(block: nn.Module) -> _Run | None:
            try:
                return self._run(block)
            except BaseException as error:
                table.barrier.abort()
                errors.append(error)
                return None

        with ThreadPoolExecutor(ranks) as pool:
            runs = list(pool.map(play, blocks))
        if errors:
            first = next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
            return Verdict(f"{type(first).__name__}: {' '.join(str(first).split())[:200]}")
        return self._compare([run for run in runs if run])

    def _cut(self, cuts: Sequence[Cut], peers: Peers, summed: Sequence[str], divided: bool) -> nn.Module:
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta")) for p in self.block.parameters()}
        block, slicer = copy.deepcopy(self.block, memo), Slicer(peers)
        flow = Flow(peers, divided)
        slicer.block(block, "block", cuts, summed, flow, self.hidden or 0, (True, True))
        for name, whole in self.block.named_parameters():
            owner, _, leaf = name.rpartition(".")
            cut = slicer.slices.get(f"block.{name}")
            value = cut.take(whole.detach()) if cut else whole.detach()
            block.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, whole.requires_grad)
        self.slices, self.flow = slicer.slices, flow
        return block

    @property
    def was_divided(self) -> bool:
        """Whether the last proof really divided the sequence."""
        return self.flow.divided

    def _run(self, block: nn.Module) -> _Run:
        """In evaluation mode with gradients and without, and in training mode."""
        block.eval()
        with Alone():
            evaluation = self._pass(block)
            with torch.no_grad():
                # torch's own layers take another way here, if nothing watches
                evaluated = _tensors(block, self.call.copied(_afresh))
            return _Run(evaluation, *self._train(block), evaluated)

    def _train(self, block: nn.Module) -> tuple[_Pass, dict[str, Tensor]]:
        """A pass in training mode with its dropout off, and the buffers after it; they are put back."""
        before = {name: buffer.clone() for name, buffer in block.named_buffers()}
        block.train()
        with NoDropout():
            training = self._pass(block, self.differentiates_training)
        block.eval()  # in training mode, to look at a weight may change it (spectral_norm)
        after = {name: buffer.clone() for name, buffer in block.named_buffers()}
        for name, buffer in before.items():
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner)._buffers[leaf] = buffer
        return training, after

    def _pass(self, block: nn.Module, backward: bool = True) -> _Pass:
        call = self.call.copied(_afresh)
        block.zero_grad()
        outputs = [o for o in _tensors(block, call) if o.requires_grad]
        if not self.seeds:
            generator = torch.Generator().manual_seed(1)
            self.seeds = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
        if backward:
            with suppress(CheckpointError):  # see _trains_alike_again
                torch.autograd.backward(outputs, [s.reshape(o.shape) for s, o in zip(self.seeds, outputs, strict=True)])
        places = [*enumerate(call.args), *call.kwargs.items()]
        return _Pass(
            outputs=[o.detach() for o in outputs],
            inputs={str(place): x.grad for place, x in places if isinstance(x, Tensor) and x.grad is not None},
            parameters={name: p.grad for name, p in block.named_parameters() if p.grad is not None},
        )

    def _compare(self, runs: list[_Run]) -> Verdict:
        summed: dict[str, None] = {}
        for run in runs:
            problem = (
                _outputs_differ(run.evaluation.outputs, self.whole.evaluation.outputs)
                or _outputs_differ(run.evaluated, self.whole.evaluated, " in evaluation")
                or _outputs_differ(run.training.outputs, self.whole.training.outputs, " in training")
            )
            if problem:
                return Verdict(problem)
        problem = self._gradients_differ([run.evaluation for run in runs], self.whole.evaluation, summed)
        problem = problem or self._gradients_differ([run.training for run in runs], self.whole.training, summed)
        if problem:
            return Verdict(problem)
        for name, buffer in self.whole.buffers.items():
            if max(_distance(run.buffers.get(name), buffer) for run in runs) > TOLERANCE:
                return Verdict(f"the buffer {name} gets another value in training")
        return Verdict("", tuple(summed))

    def _gradients_differ(self, passes: list[_Pass], expected: _Pass, summed: dict[str, None]) -> str:
        """What is wrong with gradients, or ""; adds to ``summed`` the whole parameters whose gradients are partial."""
        for place, whole in expected.inputs.items():
            worst = max(_distance(p.inputs.get(place), whole) for p in passes)
            if worst > self.tolerance:
                return f"the gradient of input {place!r} differs by {worst:.1e}"
        # A gradient that is zero but for rounding (of a bias before a batch norm) has no size of its own.
        floor = max((float(g.abs().max()) for g in expected.parameters.values() if g.numel()), default=0.0) * SMALLEST
        for name, whole in expected.parameters.items():
            grads = [p.parameters.get(name) for p in passes]
            cut = self.slices.get(f"block.{name}") if len(passes) > 1 else None
            if cut is not None:
                parts = [g if g is not None else torch.zeros(()) for g in grads]
                if any(p.shape != parts[0].shape for p in parts):
                    return f"the gradient of {name} has another shape on each rank"
                grads = [cut.join(parts)]
            if (worst := max(_distance(g, whole, floor) for g in grads)) <= self.tolerance:
                continue
            total = sum(g for g in grads if g is not None)
            if cut is None and isinstance(total, Tensor) and _distance(total, whole, floor) <= self.tolerance:
                summed[name] = None
                continue
            return f"the gradient of {name} differs by {worst:.1e}"
        return ""


def _outputs_differ(found: list[Tensor], expected: list[Tensor], mode: str = "") -> str:
    if len(found) != len(expected):
        return f"it returns {len(found)} tensors{mode} and not {len(expected)}"
    for i, (mine, whole) in enumerate(zip(found, expected, strict=True)):
        if (distance := _distance(mine, whole)) > TOLERANCE:
            return f"output {i} differs{mode} by {distance:.1e} of its largest value"
    return ""


def _tensors(block: nn.Module, call: Call) -> list[Tensor]:
    out = tree_leaves(block(*call.args, **call.kwargs))
    return [o for o in out if isinstance(o, Tensor) and o.is_floating_point()]


def _distance(x: Tensor | None, whole: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value of ``whole`` (at least ``floor``); infinite for another shape
    or NaN."""
    if x is None or x.shape != whole.shape:
        return float("inf")
    x, whole = (t if t.is_floating_point() else t.double() for t in (x, whole))
    scale = whole.abs().max().clamp_min(max(floor, 1e-30)) if whole.numel() else torch.ones(())
    distance = float((x - whole).abs().max() / scale) if whole.numel() else 0.0
    return distance if distance == distance else float("inf")


class NoDropout(TorchFunctionMode):
    """Training mode without its dice: dropout passes its input on."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.dropout, torch.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d):
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = (
                (*args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:]),
                {
                    **kwargs,
                    **({"dropout_p": 0.0} if "dropout_p" in kwargs else {}),
                },
            )
        return func(*args, **kwargs)


def _real_block(block: nn.Module, generator: torch.Generator) -> nn.Module:
    memo: dict[int, Any] = {}
    for name, p in block.named_parameters():
        scale = max(p.shape[-1], 1) ** -0.5 if p.ndim > 1 else 0.3
        shift = 1.0 if p.ndim <= 1 and name.endswith("weight") else 0.0
        value = torch.rand(p.shape, generator=generator, dtype=torch.float64)
        memo[id(p)] = nn.Parameter(value.sub_(0.5).mul_(scale * 12**0.5).add_(shift))
    for buffer in block.buffers():
        memo[id(buffer)] = _real(buffer, generator) if buffer.is_meta else _doubled(buffer.detach().clone())
    copied = copy.deepcopy(block, memo)
    for p in copied.parameters():
        p.requires_grad_(p.numel() <= LARGE)  # frozen weights are proven too
    return copied


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _real(x: Tensor, generator: torch.Generator) -> Tensor:
    """Values for a tensor that was only seen on fake tensors: any would do, so take plausible ones."""
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).requires_grad_(x.requires_grad)
    if x.dtype == torch.bool:
        return _mask(x.shape)
    time = x.shape[-1] if x.ndim else 1
    return torch.arange(time, dtype=x.dtype).expand(x.shape).clone() if x.ndim else torch.zeros((), dtype=x.dtype)


def _mask(shape: torch.Size) -> Tensor:
    """Causal where it is square, else without the last ones; never without any."""
    mask = torch.ones(shape, dtype=torch.bool)
    if mask.ndim < 2:
        return mask
    if shape[-1] == shape[-2]:
        return mask.tril()
    mask[..., 1 + shape[-1] // 2 :] = False
    return mask


def _real_call(call: Call, generator: torch.Generator) -> Call:
    return call.copied(lambda x: _real(x, generator))


def _afresh(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)
