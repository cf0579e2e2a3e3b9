"""The planner's layout against all legal ones, on two hosts with a slow link between them, measured.

    sudo python -m benchmarks.two_hosts

Two network namespaces of this machine are the hosts, of two ranks each, with 1 ms and 100 Mbit/s between them
(:mod:`benchmarks.slow_link`). The blocks of the model sleep as long as a device of a given speed would compute, so that
four ranks fit on two cores; what ranks exchange is real. The planner plans for a cluster of that description. Then each
legal layout trains in the setting that the planner gave it; a step is that of the slowest rank, the shortest of a few.

The goals: the planner's first layout is within 15 % of the fastest of all; its tensor ranks are on one host; and its
step takes what was planned, within 15 %. Exit code 1: a goal is missed, 77: this machine can't have such hosts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader

from benchmarks.bubble import Sleep
from benchmarks.slow_link import ADDRESSES, DEVICE, NoHosts, SlowLink, on_host
from lightning_bharat import HybridStrategy, Layout
from lightning_bharat.commands.counted import Cuts, counted
from lightning_bharat.commands.table import table
from lightning_bharat.plan.cluster import Cluster, Link
from lightning_bharat.plan.find import find_plan
from lightning_bharat.plan.find_context import find_context_cut
from lightning_bharat.plan.memory import optimizer_state
from lightning_bharat.plan.search import search
from lightning_bharat.plan.share import Share

HOSTS, EACH = 2, 2
RANKS = HOSTS * EACH
ROWS, TIME, WIDTH, INNER, DEPTH = 16, 64, 64, 256, 8
FLOPS = 5e8  # of a device
CLUSTER = Cluster(
    nodes=HOSTS,
    devices_per_node=EACH,
    memory=2**30,
    flops=FLOPS,
    intra_node=Link(1e9, 300e-6),
    inter_node=Link(100e6 / 8, 1e-3),
    efficiency=1.0,
    overlap=False,
)
STEPS, WARM_UP, NEAR, CANT = 4, 1, 0.15, 77


class Block(nn.Module):
    """Two linears; it sleeps for their forward pass, for the gradients of their inputs and for those of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x).tanh()
        seconds = 0 if isinstance(inner, FakeTensor) else 4 * WIDTH * inner.numel() / FLOPS
        scale = Sleep.apply(self.scale, 0, seconds)
        return x + self.down(Sleep.apply(inner, seconds, seconds) * scale)


class Blocks(L.LightningModule):
    """Batches (rows, time, width) through the blocks to one number a position."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.end = nn.Linear(WIDTH, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def loss(self, batch: Tensor) -> Tensor:
        """Of a step."""
        x = self.start(batch)
        for block in self.blocks:
            x = block(x)
        return self.end(x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Planned:
    """A layout in its setting, with the seconds that a step is planned to take."""

    layout: str
    microbatches: int
    rows: int
    schedule: str
    seconds: float


class Clock(L.Callback):
    """Seconds of each optimizer step on this rank, from the same moment on all."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            dist.barrier()
            self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seconds.append(time.perf_counter() - self._began)


def shares() -> dict[tuple[int, int], Share]:
    """What ranks hold and do, for each number of tensor and of context ranks."""
    with torch.device("meta"):
        module = Blocks()
    batch, found = torch.zeros(2, TIME, WIDTH), {}
    sizes = [n for n in range(1, RANKS + 1) if RANKS % n == 0]
    plans = {n: find_plan(module, step, batch, n) for n in sizes}
    sequences = {n: find_context_cut(module, step, batch, n) for n in sizes if n > 1}
    for tensor in sizes:
        for context in (n for n in sizes if RANKS % (n * tensor) == 0):
            cuts = Cuts(plans[tensor], tensor, context, sequences.get(context))
            found[tensor, context] = counted(module, cuts, step, batch, None, _state, found.get((tensor, 1)))
    return found


def step(module: Any, batch: Tensor) -> Tensor:
    """As the strategy runs it."""
    return module.loss(batch)


def _state(module: Any) -> Any:
    return optimizer_state([module.configure_optimizers()])


def plans() -> list[Planned]:
    """Every legal layout in its best setting, the planner's first choice first."""
    found = search(shares(), CLUSTER, ROWS)
    return [
        Planned(
            str(choice.layout).removeprefix("Layout(").removesuffix(")"),
            choice.setting.microbatches,
            choice.setting.rows,
            choice.setting.schedule.name,
            choice.seconds.total,
        )
        for choice in found
    ]


def measure(plan: Planned, steps: int = STEPS) -> float:
    """Seconds of a step; every rank calls it."""
    layout, clock = Layout.parse(plan.layout), Clock()
    staged = layout.pipeline > 1
    strategy = HybridStrategy(
        data_parallel_size=layout.data,
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        replicate_size=layout.replicate,
        num_microbatches=plan.microbatches if staged else None,
        schedule=plan.schedule or "1F1B",
        process_group_backend="gloo",
    )
    many = 1 if staged else plan.microbatches
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        num_nodes=HOSTS,
        devices=EACH,
        max_steps=steps + WARM_UP,
        accumulate_grad_batches=many,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    L.seed_everything(1, verbose=False)
    data = torch.randn(ROWS * (steps + WARM_UP), TIME, WIDTH)
    trainer.fit(Blocks(), DataLoader(data, batch_size=ROWS // layout.data // many))
    slowest = torch.tensor(clock.seconds[WARM_UP:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return min(slowest.tolist())  # all that disturbs makes them longer


def as_rank(folder: Path) -> None:
    """On each rank: measure all plans; rank 0 writes what they take."""
    torch.set_num_threads(1)
    found = []
    for plan in (Planned(**each) for each in json.loads((folder / "plans.json").read_text())):
        found.append(measure(plan))
        if dist.get_rank() == 0:
            print(plan, found[-1], file=sys.stderr, flush=True)
            (folder / "seconds.json").write_text(json.dumps(found))


def on_hosts(found: list[Planned], timeout: float) -> tuple[list[float], str]:
    """Measured seconds of each, and what made the link slow.

    Raises:
        NoHosts: this machine can't have them.
        RuntimeError: a rank failed.
    """
    with TemporaryDirectory() as name, SlowLink() as link:
        folder = Path(name)
        (folder / "plans.json").write_text(json.dumps([asdict(plan) for plan in found]))
        ranks = []
        for rank in range(RANKS):
            here = {"NODE_RANK": rank // EACH, "LOCAL_RANK": rank % EACH, "MASTER_ADDR": ADDRESSES[0]}
            here |= {"MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": 1}
            words = on_host(rank // EACH, sys.executable, "-m", "benchmarks.two_hosts", "--as_rank", name)
            ranks.append(subprocess.Popen(words, env={**os.environ, **{k: str(v) for k, v in here.items()}}))
        end = time.monotonic() + timeout
        try:
            codes = [process.wait(max(end - time.monotonic(), 0)) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}")
        return json.loads((folder / "seconds.json").read_text()), link.how


def main(words: Sequence[str] | None = None) -> int:
    """Plan and measure; returns the exit code."""
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.two_hosts", description=__doc__, formatter_class=form)
    parser.add_argument("--as_rank", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help="measure this many of the planner's layouts (default: all)")
    options = parser.parse_args(words)
    if options.as_rank:
        as_rank(Path(options.as_rank))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ranks and namespaces must not stay behind
    found = plans()[: options.first]
    try:
        seconds, how = on_hosts(found, timeout=1800)
    except NoHosts as error:
        print(f"not measured: {error}")
        return CANT
    fastest, first = min(seconds), Layout.parse(found[0].layout)
    apart, off = seconds[0] / fastest - 1, seconds[0] / found[0].seconds - 1
    met = apart <= NEAR and abs(off) <= NEAR and EACH % first.tensor == 0
    rows = [
        [plan.layout, f"{plan.microbatches} × {plan.rows}", plan.schedule, f"{plan.seconds:.3f} s", f"{took:.3f} s"]
        for plan, took in zip(found, seconds, strict=True)
    ]
    print(table(["layout", "batch", "schedule", "planned", "measured"], rows))
    print(
        f"\nlink: {how}; the planner's layout takes {apart:.1%} more than the fastest, {off:+.1%} of what was planned"
    )
    each = [{**asdict(plan), "measured": took} for plan, took in zip(found, seconds, strict=True)]
    line = {"benchmark": "two_hosts", "torch": torch.__version__, "link": how, "apart": apart, "off": off}
    print(json.dumps({**line, "layouts": each, "verdict": "met" if met else "missed"}))
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
