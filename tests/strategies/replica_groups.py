"""What tests of replica groups share: a small module, a lighthouse, and the ways to train under it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bharat import TorchFTStrategy
from lightning_bharat.cluster.warm_job import free_port
from tests.ranks import server

SAMPLES, STEPS = 48, 50


class Net(L.LightningModule):
    """Keeps its losses, and the samples of each step."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 1))
        self.unused = nn.Parameter(torch.ones(2))
        self.batch_size = batch_size
        self.losses: list[float] = []
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], number: int) -> Tensor | None:
        inputs, targets, names = batch
        loss = nn.functional.mse_loss(self.layers(inputs), targets)
        self.losses.append(loss.item())
        self.seen.append((self.current_epoch, self.global_step, names.tolist()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        steps = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        epochs = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return [optimizer], [{"scheduler": steps, "interval": "step"}, {"scheduler": epochs, "interval": "epoch"}]

    def train_dataloader(self) -> Any:
        random = torch.Generator().manual_seed(1)
        inputs, targets = (torch.randn(SAMPLES, n, generator=random, dtype=torch.float64) for n in (4, 1))
        dtype = torch.get_default_dtype()
        return DataLoader(TensorDataset(inputs.to(dtype), targets.to(dtype), torch.arange(SAMPLES)), self.batch_size)


def trainer_of(folder: str, **arguments: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    given = {"accelerator": "cpu", "devices": 1, "strategy": "bharat_torchft", **quiet, **arguments}
    return L.Trainer(default_root_dir=folder, **given)


def train(folder: str, kind: type[Net], seed: int, ckpt_path: str | None = None, **arguments: Any) -> dict[str, Any]:
    """Leaves a checkpoint of its end in ``folder``."""
    torch.manual_seed(seed)
    if "timeout" in arguments:
        arguments["strategy"] = TorchFTStrategy(timeout=arguments.pop("timeout"))
    module, trainer = kind(), trainer_of(folder, **arguments)
    trainer.fit(module, ckpt_path=ckpt_path)
    trainer.save_checkpoint(f"{folder}/end.ckpt")
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batches": trainer.fit_loop.total_batch_idx,
        "losses": module.losses,
        "seen": module.seen,
    }


@contextmanager
def lighthouse(groups: int, *options: str) -> Iterator[str]:
    port = free_port()
    command = [str(Path(sys.executable).with_name("torchft_lighthouse")), f"--bind=127.0.0.1:{port}"]
    command += [f"--min_replicas={groups}", "--quorum_tick_ms=20", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def start(
    address: str, replica: int, folder: Path, kind: type[Net], seed: int, arguments: dict[str, Any], how: Any = None
) -> Any:
    folder.mkdir(parents=True)
    env = {"TORCHFT_LIGHTHOUSE": address, "REPLICA_GROUP_ID": str(replica), "NUM_REPLICA_GROUPS": "2"}
    return server.start(how or start_of, 1, str(folder), kind, seed, arguments, env=env)


def start_of(folder: str, kind: type[Net], seed: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return train(folder, kind, seed, **arguments)


def value_of(job: Any) -> Any:
    (outcome,) = job.wait(timeout=60)
    assert outcome.ok, f"{outcome.summary()}\n{outcome.output}\n{outcome.stacks}"
    return outcome.value


def wait_for(found: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + 60
    while not found():
        assert time.monotonic() < until, what
        time.sleep(0.02)
