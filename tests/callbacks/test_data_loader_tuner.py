"""DataLoaderTuner: the same batches with other workers, on all ranks alike; what it must leave as it is."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from lightning_bharat import HybridStrategy, events
from lightning_bharat.callbacks import DataLoaderTuner, data_loader_tuner
from lightning_bharat.data.alike import why_workers_matter
from lightning_bharat.data.loading import Search, Setting, Waited, wanted_workers
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = 96


class Worked(Dataset[tuple[Tensor, int]]):
    """Each sample is a number, and who has read it; it takes two milliseconds of work."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        until = time.perf_counter() + 0.002
        while time.perf_counter() < until:
            pass
        worker = get_worker_info()
        return torch.tensor([float(index)]), 0 if worker is None else worker.num_workers


class Drawing(Worked):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        value, workers = super().__getitem__(index)
        return value + random.random(), workers


class Counting(Worked):
    reads = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.tensor([float(self.reads)]), 0


class Reading(Worked):
    def __init__(self) -> None:
        self.file = open(__file__, "rb")  # noqa: SIM115


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(ROWS))


class Module(L.LightningModule):
    """``seen``: each batch's numbers; ``workers``: how many there were then."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[float]] = []
        self.workers: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        values, workers = batch
        self.seen.append(values.flatten().tolist())
        self.workers.append(int(workers[0]))
        return (self.layer(values) * torch.rand(1)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(folder: Path, dataset: Dataset, callbacks: list[L.Callback], **options: Any) -> tuple[Module, L.Trainer]:
    L.seed_everything(1, verbose=False)
    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_checkpointing": False, **quiet, **options},
        callbacks=callbacks,
        default_root_dir=folder,
        log_every_n_steps=2,
    )
    trainer.fit(module, DataLoader(dataset, batch_size=4, shuffle=True))
    return module, trainer


def test_between_epochs_nothing_but_the_workers_changes(tmp_path: Path) -> None:
    alone, _ = fit(tmp_path, Worked(), [])
    tuned, trainer = fit(tmp_path, Worked(), [DataLoaderTuner()])
    assert alone.workers == [0] * 72
    assert set(tuned.workers[:24]) == {0} and min(tuned.workers[24:48]) >= 1
    assert tuned.seen == alone.seen
    assert torch.equal(tuned.layer.weight, alone.layer.weight)
    assert 0 < trainer.callback_metrics["input_wait"] <= 1
    assert trainer.callback_metrics["input_wait_seconds"] > 0
    told = [event["message"] for event in events.read(tmp_path) if event["kind"] == "loader"]
    assert "of it waits for input instead of" in told[0]


def test_a_limit_of_one_only_measures(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, Worked(), [DataLoaderTuner(limit=1.0)], max_epochs=2)
    assert set(module.workers) == {0} and "input_wait" in trainer.callback_metrics


def test_random_augmentation_keeps_its_workers(tmp_path: Path) -> None:
    alone, _ = fit(tmp_path, Drawing(), [], max_epochs=2)
    kept, _ = fit(tmp_path, Drawing(), [DataLoaderTuner()], max_epochs=2)
    assert kept.seen == alone.seen and set(kept.workers) == {0}
    drawn, _ = fit(tmp_path, Drawing(), [DataLoaderTuner(redraw=True)], max_epochs=2)
    assert min(drawn.workers[24:]) >= 1
    assert [[int(value) for value in batch] for batch in drawn.seen] == [
        [int(value) for value in batch] for batch in alone.seen
    ]


def drawing_collate(samples: list) -> Any:
    return default_collate(samples)[0] + torch.rand(1)


@pytest.mark.parametrize(
    "loader, words",
    [
        (lambda: DataLoader(Worked(), batch_size=4, shuffle=True), ""),
        (lambda: DataLoader(Worked(), batch_size=None, collate_fn=lambda sample: sample), ""),
        (lambda: DataLoader(Drawing()), "draws random numbers"),
        (lambda: DataLoader(Worked(), collate_fn=drawing_collate), "draws random numbers"),
        (lambda: DataLoader(Counting()), "another one when it is read again"),
        (lambda: DataLoader(Reading()), "can't be sent to another process"),
        (lambda: DataLoader(Stream()), "order of an IterableDataset"),
        (lambda: DataLoader(Worked(), num_workers=1, in_order=False), "in_order=False"),
    ],
)
def test_what_other_workers_would_change(loader: Callable[[], DataLoader], words: str) -> None:
    made, state = loader(), torch.get_rng_state()
    why = why_workers_matter(made)
    assert words in why and bool(words) == bool(why)
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(made.dataset, "reads", 0) == 0


def fit_rank(folder: str, tunes: bool) -> tuple[list, list[int]]:
    data_loader_tuner.WINDOW = 4
    options = {"devices": int(os.environ["WORLD_SIZE"]), "max_epochs": 2}
    strategy = HybridStrategy()
    made, _ = fit(Path(folder), Worked(), [DataLoaderTuner()] if tunes else [], strategy=strategy, **options)
    return made.seen, made.workers


def test_ranks_change_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    alone = run_ranks(fit_rank, 2, str(tmp_path), False)
    tuned = run_ranks(fit_rank, 2, str(tmp_path), True)
    assert [seen for seen, _ in tuned] == [seen for seen, _ in alone]
    for _, workers in tuned:
        assert workers == tuned[0][1]
        assert workers[:7] == [0] * 7 and 1 in workers[7:12]
    with pytest.raises(ValueError, match="write a share of a step"):
        DataLoaderTuner(limit=2)


def test_the_search_takes_what_is_measured() -> None:
    none, two = Setting(0, None), Setting(2, 2)
    assert wanted_workers(Waited(none, wait=0.03, step=0.04)) == 4  # 0.03 s of reading beside 0.01 s of work
    assert wanted_workers(Waited(two, wait=0.01, step=0.02)) == 5
    search = Search(limit=0.02)
    assert search.look(Waited(none, 0.03, 0.04), most=2) == (two, "")
    setting, words = search.look(Waited(two, 0.01, 0.02), most=2)
    assert setting == Setting(2, 4) and "num_workers=2, prefetch_factor=2 instead of num_workers=0" in words
    setting, words = search.look(Waited(setting, 0.01, 0.02), most=2)
    assert setting == two and "was no gain" in words
    assert search.look(Waited(two, 0.01, 0.02), most=2)[0] == Setting(2, 4), "once more"
    assert search.look(Waited(Setting(2, 4), 0.01, 0.021), most=2)[0] == two
    assert search.look(Waited(two, 0.01, 0.02), most=2) == (two, "")
    assert Search(limit=0.02).look(Waited(none, 0.0001, 0.04), most=2) == (none, "")
