"""What replica groups under torchft refuse, in words, and that nothing that they take runs code."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import lightning as L
import optuna
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.distributed._serialization import _streaming_save
from torch.utils.data import DataLoader, IterableDataset

from lightning_bharat import TorchFTStrategy
from lightning_bharat.callbacks import trial_kind
from lightning_bharat.strategies import _torchft
from lightning_bharat.strategies.replica_groups import ReplicaError
from tests.ranks import run_ranks
from tests.strategies.replica_groups import Net, lighthouse, train, trainer_of

pytest.importorskip("torchft")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"replica": 2, "replicas": 2}, "replica=2 of 2 groups: write a number from 0 to 1"),
        ({"replica": 0, "replicas": 0}, "replicas=0: write how many groups"),
        ({"replica": 0}, "replicas is not given, and there is no NUM_REPLICA_GROUPS"),
        ({"replica": 0, "replicas": 2, "lighthouse": "host:29510"}, 'such as lighthouse="http://host:29510"'),
        ({"replica": 0, "replicas": 2, "timeout": 60}, "write a datetime.timedelta above 0"),
    ],
)
def test_an_argument_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ReplicaError, match=re.escape(words)):
        TorchFTStrategy(**{"lighthouse": "http://127.0.0.1:1", **arguments})


def test_copies_are_not_pruned_each_by_its_own_trial() -> None:
    strategy = TorchFTStrategy(replica=0, replicas=2, lighthouse="http://127.0.0.1:1")
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", logger=False)
    assert "bharat_torchft" in (trial_kind.refusal(optuna.create_study().ask(), trainer) or "")
    assert trial_kind.refusal(None, trainer) is None


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Closure(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Plateau(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


class Stream(Net):
    class Numbers(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.ones(8, 4))

    def train_dataloader(self) -> Any:
        return DataLoader(self.Numbers(), 4)


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4, sparse=True)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (Net, {"precision": "bf16-mixed"}, "precision='bf16-mixed' has not been proven here; write one of 32-true"),
        (Net, {"devices": 2}, "a replica group is one process with one device, and this one has 2 devices"),
        (Net, {"callbacks": EarlyStopping("loss")}, "EarlyStopping changes training by what it has seen"),
        (Net, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs"),
        (Manual, {}, "manual optimization"),
        (Closure, {}, "LBFGS asks for several gradients"),
        (Plateau, {}, "ReduceLROnPlateau looks at what each group logs by itself"),
        (Stream, {}, "can't find its place in the training data (DataLoader)"),
        (Net, {"use_distributed_sampler": False}, None),
        (Sparse, {}, "table (Embedding) has sparse gradients; write sparse=False"),
    ],
)
def test_a_run_is_refused(kind: type[Net], arguments: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    strategy = TorchFTStrategy(0, 2, "http://127.0.0.1:1", timeout=timedelta(seconds=0.5))
    trainer = trainer_of(str(tmp_path), strategy=strategy, **arguments)
    words = words or "the lighthouse at http://127.0.0.1:1 did not bring this group together with others in 1 s"
    with pytest.raises(ReplicaError, match=re.escape(words)):
        trainer.fit(kind())


class NoLoss(Net):
    def training_step(self, batch: Any, number: int) -> None:
        return None


class Skips(Net):
    def on_train_batch_start(self, batch: Any, number: int) -> int | None:
        return -1 if self.global_step == 2 else None


def waits_for_another(folder: str, address: str) -> str:
    strategy = TorchFTStrategy(0, 2, address, timeout=timedelta(seconds=0.5))
    with pytest.raises(ReplicaError) as error:
        train(folder, Net, 0, max_epochs=1, strategy=strategy)
    return str(error.value)


def test_a_group_that_stays_alone_says_so(tmp_path: Path) -> None:
    with lighthouse(2) as address:
        (words,) = run_ranks(waits_for_another, 1, str(tmp_path), address)
    assert f"the lighthouse at {address} did not bring this group together with others in 1 s" in words


def refused(folder: str, kinds: list[type[Net]]) -> list[str]:
    words = []
    for kind in kinds:
        with pytest.raises(ReplicaError) as error:
            train(folder, kind, 0, max_epochs=2)
        words.append(str(error.value))
    return words


def test_a_step_that_a_group_leaves_out_alone_is_refused(tmp_path: Path) -> None:
    with lighthouse(1, "--heartbeat_timeout_ms=300") as address:
        env = {"TORCHFT_LIGHTHOUSE": address, "REPLICA_GROUP_ID": "0", "NUM_REPLICA_GROUPS": "1"}
        ((none, skipped),) = run_ranks(refused, 1, str(tmp_path), [NoLoss, Skips], env=env)
    assert "training_step returned no loss" in none
    assert "on_train_batch_start returned -1" in skipped


class Planted:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_what_a_group_sends_can_not_run_code(tmp_path: Path) -> None:
    class Serves(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            _streaming_save({"user": {"default": planted}}, self.wfile)

        def log_message(self, *_: Any) -> None: ...

    address = ("127.0.0.1", 0)
    transport = _torchft.transport(timedelta(seconds=5))
    with HTTPServer(address, Serves) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/checkpoint/"
        planted: Any = torch.ones(3)
        received: Any = transport.recv_checkpoint(0, url, 7, timedelta(seconds=5))
        assert received["user"]["default"].tolist() == [1, 1, 1]
        planted = Planted(str(tmp_path / "planted"))
        with pytest.raises(pickle.UnpicklingError):
            transport.recv_checkpoint(0, url, 7, timedelta(seconds=5))
        http.shutdown()
    transport.shutdown()
    assert not (tmp_path / "planted").exists()
