"""What HealthMonitor takes of a step: loops with and without it that advance in turns, and its own clock."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import lightning as L
import torch.distributed as dist

from benchmarks.contestants import batches, ours
from benchmarks.paired import Interval, Turns, alternate, is_void, paired_ratio
from lightning_bharat import Layout
from lightning_bharat.callbacks import HealthMonitor
from lightning_bharat.models import GPTConfig

# About 50 ms of one core for a step of 1536 tokens: real ones have that many on a rank, or more.
CONFIG = GPTConfig(512, 96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
ROWS, TIME = 8, 192
WARM_UP = 5
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


class Timed(HealthMonitor):
    """Keeps the seconds of each of its hooks, and the CPU seconds.

    Attributes:
        wall, cpu: sums since the last :meth:`take`. Without the norm of the gradients, which clipping takes from there
            instead of computing it.
    """

    def __init__(self) -> None:
        super().__init__(vocab_size=CONFIG.vocab_size)
        self.wall = self.cpu = 0.0
        for hook in HOOKS:
            setattr(self, hook, self._timed(getattr(self, hook)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        plugin: Any = trainer.precision_plugin
        norm_of = self._left_out(plugin.norm_of)
        clip = plugin.clip_grad_by_norm

        def clips(*args: Any) -> None:
            plugin.__dict__.pop("norm_of", None)
            clip(*args)
            plugin.norm_of = norm_of

        plugin.norm_of, plugin.clip_grad_by_norm = norm_of, clips

    def _timed(self, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            _now()  # a clock that was not asked for a while takes longer
            began = _now()
            found = function(*args, **kwargs)
            ended = _now()
            again = _now()  # what the clocks take themselves
            self.wall += 2 * ended[0] - began[0] - again[0]
            self.cpu += 2 * ended[1] - began[1] - again[1]
            return found

        return timed

    def _left_out(self, function: Callable) -> Callable:
        """Called in a hook, with the clocks that this takes."""

        def left_out(*args: Any) -> Any:
            wall, cpu = _now()
            found = function(*args)
            ended = _now()
            self.wall -= ended[0] - wall
            self.cpu -= ended[1] - cpu
            return found

        return left_out

    def take(self) -> tuple[float, float]:
        """Both, which then begin anew."""
        found = self.wall, self.cpu
        self.wall = self.cpu = 0.0
        return found


class Work(L.Callback):
    """Keeps the CPU seconds from each batch to the next."""

    def __init__(self) -> None:
        self.of_steps: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.thread_time()
        if self._last:
            self.of_steps.append(now - self._last)
        self._last = now


@dataclass(frozen=True)
class Cost:
    """Of a step.

    Attributes:
        layout: of the ranks.
        pairs: rounds.
        step_ms: without the monitor.
        hooks_ms: in its hooks, by the clock; with the wait for other ranks in its exchange.
        own_ms: CPU time of its hooks; a mean, since some of it is done every few steps.
        cpu_ms: CPU time of a step without it; a mean, too.
        threads_ms: CPU time of its threads while 50 ms pass.
        ratio, null: steps with it to steps without, and these to themselves.
    """

    layout: str
    pairs: int
    step_ms: float
    hooks_ms: float
    own_ms: float
    cpu_ms: float
    threads_ms: float
    ratio: Interval
    null: Interval

    @property
    def share(self) -> float:
        """Its own work, of the work of a step; both are slowed down by what else the machine does."""
        return self.own_ms / self.cpu_ms + self.threads_ms / 50

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"``; the ratio can't tell half a percent on a busy machine, so it does not decide."""
        return "met" if self.share < 0.005 else "missed"


def measure(layout: str, pairs: int, folder: str) -> Cost:
    """Run the loops in turns; every rank of ``layout`` calls it."""
    os.chdir(folder)
    parsed = Layout.parse(layout)
    data_rank = parsed.coordinates(int(os.environ["RANK"]))["data"]
    given = batches(CONFIG, ROWS, TIME, WARM_UP + pairs + 2, data_rank)
    monitor, work, turns = Timed(), Work(), dict[str, Turns]()
    for name in ("without", "with", "null"):
        loop = ours(CONFIG, parsed, ROWS)[1]
        if name == "with":
            loop.callbacks.append(monitor)
        elif name == "without":
            loop.callbacks.append(work)
        turns[name] = Turns(loop, given)
        turns[name].begin()
    alternate(turns, WARM_UP, dist.barrier)
    monitor.take()
    own = list[tuple[float, float]]()
    step = turns["with"].step

    def watched() -> float:
        seconds = step()
        own.append(monitor.take())
        return seconds

    turns["with"].step = watched  # type: ignore[method-assign]
    began, threads = time.perf_counter(), _of_threads()
    seconds = alternate(turns, pairs, dist.barrier)
    of_threads = (_of_threads() - threads) / (time.perf_counter() - began)
    for loop in turns.values():
        loop.end()
    return Cost(
        layout,
        pairs,
        1e3 * median(seconds["without"]),
        1e3 * fmean(wall for wall, _ in own),
        1e3 * fmean(cpu for _, cpu in own),
        1e3 * fmean(work.of_steps[WARM_UP:]),
        50 * of_threads,
        paired_ratio(seconds["with"], seconds["without"]),
        paired_ratio(seconds["null"], seconds["without"]),
    )


def _of_threads() -> float:
    """CPU seconds of the monitor's threads so far."""
    threads = [thread.ident for thread in threading.enumerate() if thread.name.startswith("health-")]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads if ident is not None)


def is_busy(cost: Cost) -> bool:
    """Whether the ratio says nothing."""
    return is_void(cost.null)
