"""Faults that are made on real ranks, and the seconds until the record has them."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.contestants import batches
from lightning_bharat import HybridStrategy, events
from lightning_bharat.callbacks import HealthMonitor
from lightning_bharat.cluster.warm import WarmServer
from lightning_bharat.health.prober import Intervals
from lightning_bharat.models import GPTConfig, GPTModule
from lightning_bharat.strategies.data import local

CONFIG = GPTConfig(64, 32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
AT = 40  # the step in which it happens
HANG, SILENCE, WORK = 3.0, 2.0, 1.0  # seconds; shorter than the defaults, by which the stated times scale


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        kind: as which it is to be found.
        within: seconds from where it begins, as docs/health.md states for the limits above.
        make: called on rank 1 before the backward pass of step 40 (and after, with ``lasts``).
        lasts: whether it goes on.
        monitor: arguments.
        strategy: arguments.
    """

    kind: str
    within: float
    make: Callable[[L.Trainer], None]
    lasts: bool = False
    monitor: tuple[tuple[str, Any], ...] = ()
    strategy: tuple[tuple[str, Any], ...] = ()


def _spoil_loss(trainer: L.Trainer) -> None:
    stepped = trainer.optimizers[0].param_groups[0]["params"]
    with torch.no_grad():
        local(next(p for p in stepped if local(p).numel())).view(-1)[0] = torch.nan


def _blow_up(trainer: L.Trainer) -> None:
    for name, parameter in trainer.lightning_module.named_parameters():
        if "down_proj" in name:
            with torch.no_grad():
                local(parameter).mul_(100)


def _flip(trainer: L.Trainer) -> None:
    weight = dict(trainer.lightning_module.named_parameters())["model.norm.weight"]
    local(weight).data.view(torch.int32).view(-1)[0] ^= 1 << 20


def _sleep(trainer: L.Trainer) -> None:
    while True:
        time.sleep(1)


def _stop(trainer: L.Trainer) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _be_slow(trainer: L.Trainer) -> None:
    time.sleep(0.05)


_kept: list[bytearray] = []


def _keep(trainer: L.Trainer) -> None:
    _kept.append(bytearray(os.urandom(256)) * 2**12)


STEP = 2.0  # seconds in which a step must have been made, on a busy machine
FAULTS = {
    "a weight that is no number": Fault("nan", STEP, _spoil_loss, monitor=(("policy", {"nan": "restart"}),)),
    "weights that are too large": Fault("spike", STEP, _blow_up),
    "a bit that flips in a replica": Fault(
        "corruption", STEP, _flip, monitor=(("replicas_every_n_steps", 1),), strategy=(("tensor_parallel_size", 2),)
    ),
    "a rank that sleeps": Fault("hang", HANG + 4, _sleep),
    "a rank that is stopped": Fault("silent", SILENCE + 6, _stop),
    "a rank that is slow": Fault("straggler", 5 * WORK, _be_slow, lasts=True),
    "memory that is kept": Fault("leak", 90 * 0.1 + 2, _keep, lasts=True),
}


class Makes(L.Callback):
    """Makes a fault, and writes when into the same record."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.made = fault, False

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Any) -> None:
        if trainer.global_rank != 1 or trainer.global_step < AT or (self.made and not self.fault.lasts):
            return
        if not self.made:
            self.made = True
            events.append(Path.cwd(), "made")
        self.fault.make(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 10 == 0 and trainer.global_step > AT and _found(Path.cwd(), self.fault.kind):
            trainer.should_stop = True


class Soon(HealthMonitor):
    """Looks around more often."""

    intervals = Intervals(memory=0.1, work=WORK)


def train(name: str, folder: str) -> None:
    """On two ranks, with the fault ``name``, until it is found."""
    os.chdir(folder)
    fault = FAULTS[name]
    L.seed_everything(7, verbose=False)
    options = {"hang_seconds": HANG, "silence_seconds": SILENCE, **dict(fault.monitor)}
    trainer = L.Trainer(
        strategy=HybridStrategy(**dict(fault.strategy)),
        accelerator="cpu",
        devices=2,
        max_steps=4000,
        callbacks=[Makes(fault), Soon(**options)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data_rank = 0 if fault.strategy else int(os.environ["RANK"])  # tensor ranks share their batches
    given: Any = batches(CONFIG, 4, 16, 4000, data_rank)
    trainer.fit(GPTModule(CONFIG), DataLoader(given, batch_size=None))


def seconds_to(name: str, server: WarmServer) -> tuple[float | None, str]:
    """Seconds from the fault to its event (``None``: there is none), and what is said."""
    fault = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder:
        server.start(train, 2, name, folder).wait(timeout=90)
        made = [event["time"] for event in events.read(Path(folder)) if event["kind"] == "made"]
        found = _found(Path(folder), fault.kind)
        if not made or not found:
            return None, ""
        return found[0]["time"] - made[0], str(found[0]["message"])


def _found(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events.read(folder) if event.get("fault") == kind]
