"""TokenDataModule by length, by tokens and by file, on real ranks: what one process reads, and computes."""

from __future__ import annotations

import os
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_bharat import HybridStrategy, Layout
from lightning_bharat.data import IGNORED, DataError, OrderedLoader, TokenBatches
from lightning_bharat.data import pack as packing
from lightning_bharat.models import GPTConfig, GPTModule
from tests.datamodules.recorder import Recorder, data, trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, STOP = 6, 3
LONG = 96  # several lengths, then
GIVEN: dict[str, dict[str, Any]] = {
    "length": {"sharding": "length"},
    "tokens": {"sharding": "tokens"},
    "file": {"sharding": "file"},
}


class Learner(GPTModule):
    """Writes down what it reads, its loss and over how many labels that is a mean."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            GPTConfig(400, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
            learning_rate=0.02,
        )
        self.read: list[tuple[tuple[int, ...], ...]] = []
        self.losses: list[tuple[float, int]] = []

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: dict[str, Tensor], *_: Any) -> None:
        self.read.append(tuple(tuple(row[row != IGNORED].tolist()) for row in batch["labels"]))
        self.losses.append((float(outputs["loss"]), int((batch["labels"] != IGNORED).sum())))


def fit(folder: Path, options: dict[str, Any], steps: int, data_ranks: int, resume: bool = False) -> dict[str, Any]:
    """Fit on this rank, and save where it is the first run of a layout."""
    ranks = int(os.environ["WORLD_SIZE"])
    strategy: Any = HybridStrategy(
        data_parallel_size=data_ranks, tensor_parallel_size=ranks // data_ranks, token_weighted=ranks > 1
    )
    module = Learner()
    run = trainer(strategy=strategy, devices=ranks, precision="64-true", max_steps=steps, max_epochs=-1)
    checkpoint = folder / f"{options['sharding']}.ckpt"
    run.fit(module, data(folder, sequence_length=LONG, **options), ckpt_path=checkpoint if resume else None)
    if steps == STOP:
        run.save_checkpoint(checkpoint)
    return {"read": module.read, "losses": module.losses}


def runs(folder: Path, data_ranks: int, given: dict[str, tuple[int, bool]], every: int = 8) -> dict[str, Any]:
    """Fits by each way with the same batch over all ranks; ``given`` has the steps, and whether it is a resume."""
    found = {}
    for way, (steps, resume) in given.items():
        # A resumed run is given what the first one was, of two data ranks: the strategy keeps the batch together.
        shares = 2 if resume else data_ranks
        size = {"max_tokens": every * 64 // shares} if way == "tokens" else {"batch_size": every // shares}
        print(way, flush=True)
        found[way] = fit(folder, {**GIVEN[way], **size}, steps, data_ranks, resume)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data in more files than one."""
    folder = tmp_path_factory.mktemp("sharding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_BYTES", 2_000)
        data(folder).prepare_data()
    return folder


def joined(ranks: list[dict[str, Any]], way: str) -> list[list[tuple[int, ...]]]:
    """The rows of each step over data ranks, sorted."""
    return [sorted(chain(*step)) for step in zip(*(rank[way]["read"] for rank in ranks), strict=True)]


def mean_losses(ranks: list[dict[str, Any]], way: str) -> list[float]:
    """Of each step over the labels of all data ranks."""
    steps = zip(*(rank[way]["losses"] for rank in ranks), strict=True)
    return [sum(loss * labels for loss, labels in step) / sum(labels for _, labels in step) for step in steps]


@pytest.mark.timeout(240)
def test_ranks_read_and_compute_what_one_process_does(folder: Path) -> None:
    """Two data ranks, two data × two tensor ranks; and from the middle of the epoch on four data ranks."""
    (one,) = run_ranks(runs, 1, folder, 1, dict.fromkeys(GIVEN, (STEPS, False)), timeout=60)
    two = run_ranks(runs, 2, folder, 2, dict.fromkeys(GIVEN, (STOP, False)), timeout=60)
    four = run_ranks(runs, 4, folder, 2, {"tokens": (2, False), "file": (2, False)}, timeout=60)
    resumed = run_ranks(runs, 4, folder, 4, dict.fromkeys(GIVEN, (STEPS, True)), timeout=60)

    assert four[0] == four[1] and four[2] == four[3], "tensor peers see the same batches"
    for way in GIVEN:
        whole, losses = joined([one], way), mean_losses([one], way)
        assert len(whole) == STEPS and whole[0] != whole[1]
        assert joined(two, way) == whole[:STOP]
        assert mean_losses(two, way) == pytest.approx(losses[:STOP], rel=1e-9)
        assert joined(resumed, way) == whole[STOP:]
        assert mean_losses(resumed, way) == pytest.approx(losses[STOP:], rel=1e-9)
        if way in four[0]:
            assert joined(four[::2], way) == whole[:2]
            assert mean_losses(four[::2], way) == pytest.approx(losses[:2], rel=1e-9)
    widths = {len(batch) for batch in two[0]["tokens"]["read"]}
    assert len(widths) > 1, "steps of token budgets differ in rows"


class ToTensorRanks(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STOP:
            trainer.strategy.relayout(Layout(tensor=2))


def change_layout(folder: Path, max_tokens: int) -> dict[str, Any]:
    ranks = int(os.environ["WORLD_SIZE"])
    strategy: Any = HybridStrategy(data_parallel_size=2, token_weighted=True) if ranks > 1 else "auto"
    options: dict[str, Any] = {"devices": ranks, "precision": "64-true", "default_root_dir": folder}
    module, source = Learner(), data(folder, sequence_length=LONG, sharding="tokens", max_tokens=max_tokens)
    callbacks = [ToTensorRanks()] if ranks > 1 else []
    trainer(strategy=strategy, max_steps=STEPS, max_epochs=-1, callbacks=callbacks, **options).fit(module, source)
    return {"tokens": {"read": module.read, "losses": module.losses}}


def test_a_running_job_keeps_its_token_budget(folder: Path) -> None:
    """Two data ranks become two tensor ranks, which have the tokens of both."""
    (one,) = run_ranks(change_layout, 1, folder, 512)
    two = run_ranks(change_layout, 2, folder, 256)
    whole = joined([one], "tokens")
    assert joined(two, "tokens")[:STOP] == whole[:STOP]
    assert joined(two[:1], "tokens")[STOP:] == whole[STOP:]
    assert mean_losses(two[:1], "tokens")[STOP:] == pytest.approx(mean_losses([one], "tokens")[STOP:], rel=1e-9)


def test_an_epoch_of_the_trainer_is_all_of_the_data(folder: Path) -> None:
    for options in ({"sharding": "length"}, {"sharding": "tokens", "max_tokens": 200}, {"sharding": "file"}):
        module, source = Learner(), data(folder, drop_last=False, **options)
        trainer(max_epochs=2, limit_val_batches=0).fit(module, source)
        loader = source.train_dataloader()
        assert len(module.read) == 2 * len(loader)
        epochs = [sorted(chain(*module.read[::1][begin : begin + len(loader)])) for begin in (0, len(loader))]
        rows = [loader.dataset[number]["labels"] for number in range(len(loader.dataset))]
        assert epochs[0] == epochs[1] == sorted(tuple(row[row != IGNORED].tolist()) for row in rows)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sharding": "tokens"}, 'sharding="tokens" needs max_tokens='),
        ({"sharding": "length", "max_tokens": 9}, 'max_tokens=9 is for sharding="tokens"'),
        ({"sharding": "lengths"}, "write one of 'rank', 'file', 'length', 'tokens'"),
        ({"sharding": "tokens", "max_tokens": 24}, "padded to 32, over max_tokens=24 of each of 1 data ranks"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        data(folder, **options).train_dataloader()


class Sentences(L.LightningDataModule):
    """A dataset of one's own, as in docs/data.md."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        lengths = torch.randint(1, 60, (90,)).tolist()
        self.sentences = [torch.full((length,), number) for number, length in enumerate(lengths)]
        self.workers = workers

    def train_dataloader(self) -> OrderedLoader:
        lengths = [len(sentence) for sentence in self.sentences]
        batches = TokenBatches(lengths, 256, drop_last=False, **self.trainer.distributed_sampler_kwargs or {})
        collate = partial(pad_sequence, batch_first=True, padding_value=-1)
        return OrderedLoader(self.sentences, batches, collate_fn=collate, num_workers=self.workers)


class Reads(Recorder):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, tuple(batch[:, 0].tolist())))
        return self.weight.sum()


def test_a_dataset_of_ones_own_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole, stopped, resumed = Reads(), Reads(), Reads()
    trainer(max_epochs=2).fit(whole, Sentences(0))
    steps = len(whole.seen) // 2
    assert sorted(chain(*(rows for _, _, rows in whole.seen[:steps]))) == sorted(
        chain(*(rows for _, _, rows in whole.seen[steps:]))
    ), "each epoch has all samples"
    first = trainer(max_steps=steps + 3)
    first.fit(stopped, Sentences(2))
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer(max_steps=2 * steps, max_epochs=-1).fit(resumed, Sentences(0), ckpt_path=tmp_path / "stopped.ckpt")
    assert stopped.seen == whole.seen[: steps + 3]
    assert [rows for _, _, rows in resumed.seen] == [rows for _, _, rows in whole.seen[steps + 3 :]]
