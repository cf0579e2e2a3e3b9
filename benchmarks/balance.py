"""How evenly work is spread: over experts, and over the stages of a pipeline, before and after it is measured.

    python -m benchmarks.balance
    python -m benchmarks.balance --steps 50 experts

*Experts*: a decoder with a mixture of experts, spread over two data ranks, learns tokens of which few make up most of
a text, with and without the biases that balance experts (``bias_update_speed``). Counted are the choices of each expert
in the first and in the last 20 steps, of the layer that is worst.

*Stages*: a chain of blocks of which the first ones sleep three times as long, in two stages. No count of operations
knows that, so each stage begins with as many blocks. ``strategy.relayout`` with the layout that there is cuts them anew
by what they were measured to take, four times. Counted are the seconds in which each rank works in ten steps.

Each number is the busiest over the mean. The goal is at most 1.1 after 200 steps. Exit code 1: it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.bubble import Sleepers
from lightning_bharat import HybridStrategy
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.commands.table import table
from lightning_bharat.models import GPTConfig, GPTModule
from lightning_bharat.models.moe import Router, count
from lightning_bharat.strategies.simulation import Span

GOAL, STEPS, LOOKED_AT = 1.1, 200, 20
ROWS, TIME = 32, 64  # of a data rank, and of a row
CONFIG = GPTConfig(
    256,
    64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_experts=8,
    moe_intermediate_size=32,
    tie_word_embeddings=True,
)
SLEEPS, CHANGES = [0.003] * 6 + [0.001] * 18, 4  # seconds of each of a block's three passes
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Result:
    """The busiest over the mean, ``before`` and ``after``."""

    what: str
    before: float
    after: float
    has_goal: bool = True

    @property
    def missed(self) -> bool:
        """Whether there is a goal that it does not reach."""
        return self.has_goal and self.after > GOAL


def over_mean(loads: Tensor) -> float:
    """Of the worst row of (rows, parts)."""
    return float((loads.amax(-1) / loads.double().mean(-1)).max())


# ---- experts


class Text(Dataset[dict[str, Tensor]]):
    """Rows of tokens; the n-th most frequent one is 1/n as frequent as the first (Zipf), and often follows another
    certain one."""

    def __init__(self, rows: int) -> None:
        draw = torch.Generator().manual_seed(0)
        often = 1 / torch.arange(1.0, CONFIG.vocab_size + 1)
        drawn = torch.multinomial(often, rows * (TIME + 1), replacement=True, generator=draw)
        follows = torch.rand(rows * (TIME + 1), generator=draw) < 0.5
        after = torch.randperm(CONFIG.vocab_size, generator=draw)
        drawn[1:] = torch.where(follows[1:], after[drawn[:-1]], drawn[1:])
        self.rows = drawn.view(rows, TIME + 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index, :-1], "labels": self.rows[index, 1:]}


class Loads(L.Callback):
    """Counts what routers choose.

    Attributes:
        of_steps: for each step (layers, experts), the choices of this rank's tokens.
    """

    def __init__(self) -> None:
        self.of_steps: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for router in (part for part in module.modules() if isinstance(part, Router)):
            router.register_forward_hook(self._routed)

    def on_train_batch_start(self, *_: Any) -> None:
        self._step: list[Tensor] = []

    def _routed(self, router: Any, inputs: Any, out: tuple[Tensor, Tensor]) -> None:
        if router.training:
            self._step.append(count(out[0], router.num_experts))

    def on_train_batch_end(self, *_: Any) -> None:
        self.of_steps.append(torch.stack(self._step))


def train_experts(steps: int, speed: float | None) -> Tensor:
    """(steps, layers, experts), the choices of all ranks' tokens."""
    L.seed_everything(0, verbose=False)
    loads = Loads()
    trainer = L.Trainer(
        strategy=HybridStrategy(expert_parallel_size=2),
        accelerator="cpu",
        devices=2,
        max_steps=steps,
        callbacks=[loads],
        **QUIET,
    )
    module = GPTModule(GPTConfig(**{**asdict(CONFIG), "bias_update_speed": speed}), learning_rate=1e-3)
    trainer.fit(module, DataLoader(Text(ROWS * 2 * steps), ROWS))
    return trainer.strategy.reduce(torch.stack(loads.of_steps), reduce_op="sum")


def experts(server: WarmServer, steps: int) -> list[Result]:
    """Without and with biases; of experts, and of the ranks that hold half of them each."""
    found = []
    for name, speed in (("experts, left alone", None), ("experts, with biases", 0.003)):
        loads = server.run(train_experts, 2, steps, speed, timeout=1200)[0]
        if (loads.sum(-1) != 2 * ROWS * TIME * CONFIG.num_experts_per_tok).any():
            raise RuntimeError("choices were counted twice, or not at all")
        first, last = loads[:LOOKED_AT].sum(0), loads[-LOOKED_AT:].sum(0)
        of_ranks = [part.unflatten(-1, (2, -1)).sum(-1) for part in (first, last)]
        found.append(Result(name, over_mean(first), over_mean(last), speed is not None))
        found.append(Result(f"{name}: their ranks", *map(over_mean, of_ranks), speed is not None))
    return found


# ---- stages


class CutAnew(L.Callback):
    """Follows some steps, and lets the stages be cut anew after each run of these but the last.

    Args:
        followed: runs of steps.

    Attributes:
        busy: for each run of steps, how long each rank worked in it, in seconds.
    """

    def __init__(self, followed: Sequence[range]) -> None:
        self.followed = followed
        self.busy: list[list[float]] = []
        self._spans: list[Span] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._follows = any(trainer.global_step in steps for steps in self.followed)
        if self._follows:
            trainer.strategy.begin_timeline()  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        if not self._follows:
            return
        self._spans += strategy.end_timeline().spans
        if trainer.global_step == self.followed[len(self.busy)].stop:
            ranks = range(strategy.layout.pipeline)
            self.busy.append([sum(s.end - s.start for s in self._spans if s.rank == rank) for rank in ranks])
            self._spans = []
            if len(self.busy) < len(self.followed):
                strategy.relayout(strategy.layout)


def train_stages(steps: int, folder: str) -> tuple[list[list[float]], str]:
    """The busy seconds of each rank, at first, between changes and at last, and how the stages are cut in the end."""
    L.seed_everything(0, verbose=False)
    part = steps // 20
    ends = [part * (2 + 2 * number) for number in range(CHANGES)] + [steps - 1]
    cut = CutAnew([range(end - part, end) for end in ends])
    trainer = L.Trainer(
        strategy=HybridStrategy(pipeline_parallel_size=2),
        accelerator="cpu",
        devices=2,
        max_steps=steps,
        callbacks=[cut],
        default_root_dir=folder,
        **QUIET,
    )
    trainer.fit(Sleepers((s, s, s) for s in SLEEPS), DataLoader(torch.randn(8 * (steps + 1), 4, 16), 8))
    strategy: Any = trainer.strategy
    return cut.busy, strategy.choices["pipeline_parallel_size"]


def stages(server: WarmServer, steps: int) -> list[Result]:
    """As many blocks on each stage, and then by what they were measured to take."""
    with tempfile.TemporaryDirectory() as folder:
        busy, words = server.run(train_stages, 2, steps, folder, timeout=1200)[0]
    print(words, file=sys.stderr)
    return [Result("stages of a pipeline", over_mean(torch.tensor(busy[:1])), over_mean(torch.tensor(busy[-1:])))]


KINDS = {"experts": experts, "stages": stages}


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is asked for; returns the exit code."""
    options = _options(words)
    server = WarmServer((*PRELOAD, "lightning_bharat.strategies.hybrid"))
    results = []
    for kind in options.kinds or KINDS:
        print(kind, file=sys.stderr, flush=True)
        results += KINDS[kind](server, options.steps)
    print(report(options.steps, results))
    return int(any(result.missed for result in results))


def report(steps: int, results: Sequence[Result]) -> str:
    """A table for people, and a line of JSON."""
    rows = [
        [r.what, f"{r.before:.2f}", f"{r.after:.2f}", ("missed" if r.missed else "met") if r.has_goal else ""]
        for r in results
    ]
    line = {"benchmark": "balance", "torch": torch.__version__, "cores": os.cpu_count(), "steps": steps}
    head = ["busiest over the mean", "at first", f"after {steps} steps", "verdict"]
    return f"{table(head, rows)}\n{json.dumps({**line, 'results': [asdict(result) for result in results]})}"


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.balance", description=__doc__, formatter_class=form)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)} (default: both)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
