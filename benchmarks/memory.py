"""How many bytes a rank holds from step to step: measured on real ranks, against one process, DDP, and the estimate.

    python -m benchmarks.memory
    python -m benchmarks.memory --layout data=4,tensor=2

The same decoder is trained for a few steps by the strategy, by Lightning's DDP in the same ranks, and by Lightning on
one process. After the last step each rank counts the bytes of the storages behind its parameters, its gradients and its
optimizer's states, each storage once; the fullest rank is shown. `gathered` are the weights that are whole over data
ranks at once, while a block runs, as modules show them: in the backward pass FSDP2 gathers one more block ahead. The
estimate is what `bharat layout` prints.

The goal is that parameters, gradients and optimizer states on 8 data ranks are each more than 80 % below one process;
layouts of fewer ranks are shown without a verdict. Exit code 1: the goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from benchmarks.contestants import Batch, ByTrainer, batches, ours
from benchmarks.overhead import SIZES, Size
from lightning_bharat import Layout, ModelPlan
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import size as in_words
from lightning_bharat.commands.table import table
from lightning_bharat.models import GPTModule
from lightning_bharat.plan.blocks import find_units
from lightning_bharat.plan.memory import FirstOf, Memory, memory_per_rank, optimizer_state
from lightning_bharat.strategies.tensor import cut_module

STEPS = 2
GOAL, RANKS = 0.8, 8
HELD = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True)
class Result:
    """Bytes on the fullest rank.

    Attributes:
        ours: measured under the layout.
        estimate: of it, by ``bharat layout``.
        ddp: measured, on as many ranks. Without DDP's buckets, which are as large as the gradients.
        one: measured on one process.
    """

    layout: str
    size: str
    ours: Memory
    estimate: Memory
    ddp: Memory
    one: Memory

    @property
    def saved(self) -> dict[str, float]:
        """Which share of one process' bytes a rank does without."""
        return {name: 1 - getattr(self.ours, name) / getattr(self.one, name) for name in HELD}

    @property
    def verdict(self) -> str:
        """``"met"`` or ``"missed"``; ``""`` for fewer ranks than the goal is about."""
        if Layout.parse(self.layout).devices < RANKS:
            return ""
        return "met" if min(self.saved.values()) > GOAL else "missed"


class Count(L.Callback):
    """Counts what this rank holds.

    Attributes:
        held: after the last step.
    """

    def __init__(self) -> None:
        self.held = Memory(0, 0, 0, 0)
        self._gathered = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if any(isinstance(p, DTensor) for p in module.parameters()):
            for block in module.model.layers:  # in the middle of a block, on the way there and on the way back
                block.mlp.register_forward_pre_hook(lambda *_: self._look(module))
                block.mlp.register_full_backward_pre_hook(lambda *_: self._look(module))

    def _look(self, module: L.LightningModule) -> None:
        whole = storage_bytes(p for p in module.parameters() if not isinstance(p, DTensor))
        self._gathered = max(self._gathered, whole)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        parameters = list(module.parameters())
        states = [leaf for optimizer in trainer.optimizers for leaf in tree_leaves(list(optimizer.state.values()))]
        self.held = Memory(
            parameters=storage_bytes(parameters),
            gradients=storage_bytes(p.grad for p in parameters if p.grad is not None),
            optimizer=storage_bytes(leaf for leaf in states if isinstance(leaf, Tensor)),
            gathered=self._gathered,
        )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's memory behind ``tensors``, shared and padded memory included, each once."""
    here = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in here}.values())


def cut(layout: str, size: str) -> tuple[Memory, Memory, Memory]:
    """Train under ``layout``, then with DDP; every rank of ``layout`` calls it.

    Returns:
        What the fullest rank holds, what ``bharat layout`` says about it, and what it holds under DDP.
    """
    made, sizes = Layout.parse(layout), SIZES[size]
    strategy, loop = ours(sizes.config, made, sizes.rows)
    measured = _fullest(_train(loop, sizes))
    ddp = _fullest(_train(ByTrainer(sizes.config, made, DDPStrategy(process_group_backend="gloo")), sizes))
    assert strategy.plan is not None
    return measured, estimate(made, sizes, strategy.plan), ddp


def one_process(size: str) -> Memory:
    """Train without any strategy, on the one rank that calls it."""
    return _train(ByTrainer(SIZES[size].config, Layout(), "auto"), SIZES[size])


def _train(loop: ByTrainer, size: Size) -> Memory:
    count = Count()
    loop.callbacks.append(count)
    loop(_OneLoader(batches(size.config, 1, size.time, STEPS, 0)))
    return count.held


class _OneLoader:
    """Batches; a list would be to Lightning a list of loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _fullest(held: Memory) -> Memory:
    bytes = torch.tensor(list(asdict(held).values()))
    dist.all_reduce(bytes, dist.ReduceOp.MAX)
    return Memory(*bytes.tolist())


def estimate(layout: Layout, size: Size, plan: ModelPlan) -> Memory:
    """As ``bharat layout`` makes it, from shapes on ``meta``."""
    with torch.device("meta"):
        module = GPTModule(size.config)
    if layout.tensor > 1:
        cut_module(module, plan, FirstOf(layout.tensor))
    return memory_per_rank(module, find_units(module), layout.data, optimizer_state([module.configure_optimizers()]))


def main(words: Sequence[str] | None = None) -> int:
    """Measure the layouts that are asked for; returns the exit code."""
    options = _options(words)
    server = WarmServer((*PRELOAD, "benchmarks.contestants"))
    one = server.run(one_process, 1, options.size, timeout=600)[0]
    results = []
    for layout in options.layout or [f"data={RANKS}"]:
        ours, estimated, ddp = server.run(cut, Layout.parse(layout).devices, layout, options.size, timeout=600)[0]
        results.append(Result(layout, options.size, ours, estimated, ddp, one))
    print(report(results))
    return int(any(result.verdict == "missed" for result in results))


def report(results: Sequence[Result]) -> str:
    """A table for people, and a line of JSON."""
    head = ["layout", "", *(field.name for field in fields(Memory)), "verdict"]
    rows = [row for result in results for row in _rows(result)]
    found = [{**asdict(result), "saved": result.saved, "verdict": result.verdict} for result in results]
    line = {"benchmark": "memory", "torch": torch.__version__, "cores": os.cpu_count(), "results": found}
    return f"{table(head, rows)}\n{json.dumps(line)}"


def _rows(result: Result) -> list[list[str]]:
    def row(name: str, memory: Memory) -> list[str]:
        return [result.layout, name, *(in_words(bytes) for bytes in asdict(memory).values()), ""]

    shares = [f"{result.saved[name]:.1%}" for name in HELD]
    return [
        row("one process", result.one),
        row("DDP", result.ddp),
        row("bharat", result.ours),
        row("its estimate", result.estimate),
        [result.layout, "below one process", *shares, "", result.verdict],
    ]


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__, formatter_class=form)
    parser.add_argument("--layout", action="append", help="may be given again (default: data=8)")
    parser.add_argument("--size", choices=list(SIZES), default="large", help="of the decoder (default: large)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
