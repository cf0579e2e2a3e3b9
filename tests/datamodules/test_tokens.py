"""TokenDataModule under a Trainer: on real ranks, in evaluation, and with what can't be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bharat import HybridStrategy
from lightning_bharat.data import DataError, Prepared
from lightning_bharat.datamodules import TokenDataModule
from tests.datamodules.recorder import SEQUENCE, Recorder, beginnings, data, trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


class PairsShareData(HybridStrategy):
    """Ranks 2n and 2n + 1 have the data coordinate n, as with two tensor ranks."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.world_size // 2, "rank": self.global_rank // 2}


def fit_rank(folder: Path, batch_size: int, pairs: bool, checkpoint: Path | None, steps: int) -> dict[str, Any]:
    """Fit on this rank, save at the end, and return what was read and logged."""
    ranks = int(os.environ["WORLD_SIZE"])
    strategy = (PairsShareData if pairs else HybridStrategy)(save_distributed_checkpoint=False)
    fit = trainer(strategy=strategy if ranks > 1 else "auto", devices=ranks, max_steps=steps, max_epochs=-1)
    module = Recorder()
    fit.fit(module, data(folder, batch_size), ckpt_path=checkpoint)
    if checkpoint is None:
        fit.save_checkpoint(folder / "stopped.ckpt")
    fit.validate(module, data(folder, batch_size), verbose=False)
    return {"seen": module.seen, "labels": fit.callback_metrics["labels"].item(), "validated": module.validated}


def sequences(seen: list) -> list:
    """What was read, without Lightning's count of epochs: it counts one that `max_steps` ended early as done."""
    return [batch for _, _, batch in seen]


def joined(ranks: list[dict[str, Any]]) -> list:
    """The ranks' batches of each step, one behind another."""
    steps = zip(*(rank["seen"] for rank in ranks), strict=True)
    return [(step[0][0], step[0][1], sum((batch for _, _, batch in step), ())) for step in steps]


@pytest.mark.timeout(180)
def test_every_layout_reads_the_same_order(tmp_path: Path) -> None:
    """One process, two data ranks, and two data × two tensor ranks, which begin without prepared data; and resumed."""
    folders = [tmp_path / name for name in ("one", "two", "four")]
    for folder in folders:
        folder.mkdir()
        data(folder)  # writes the texts; the ranks prepare them
    (one,) = run_ranks(fit_rank, 1, folders[0], 8, False, None, 30)
    two = run_ranks(fit_rank, 2, folders[1], 4, False, None, 24)
    four = run_ranks(fit_rank, 4, folders[2], 4, True, None, 5)
    whole = one["seen"]
    assert len(whole) == 30 and whole[-1][0] == 1, "more than an epoch"
    assert joined(two) == whole[:24]
    assert four[0] == four[1] and four[2] == four[3] and four[0]["seen"] != four[2]["seen"]
    assert joined(four[::2]) == whole[:5]

    digests = {Prepared.open(folder / "prepared").digest("train") for folder in folders}
    assert len(digests) == 1, "prepared alike, by the one rank that does it"

    (resumed,) = run_ranks(fit_rank, 1, folders[1], 8, False, folders[1] / "stopped.ckpt", 30)
    assert sequences(resumed["seen"]) == sequences(whole[24:])
    resumed_by_four = run_ranks(fit_rank, 4, folders[1], 2, False, folders[1] / "stopped.ckpt", 30)
    assert sequences(joined(resumed_by_four)) == sequences(whole[24:])

    for ranks in ([one], two, four[::2], resumed_by_four):
        validated = [sequence for rank in ranks for sequence in rank["validated"][: len(set(rank["validated"]))]]
        assert sorted(validated) == sorted(set(one["validated"])), "each validation sequence on one data rank, once"
        assert ranks[0]["labels"] == pytest.approx(one["labels"], rel=1e-12)


def prepared(folder: Path, **options: Any) -> TokenDataModule:
    module = data(folder, **options)
    module.prepare_data()
    module.setup("fit")
    return module


def test_batches(tmp_path: Path) -> None:
    module = prepared(tmp_path)
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (8, SEQUENCE)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"][:, 1:].equal(batch["labels"][:, :-1])
    assert batch["input_ids"].max() < module.vocab_size


def test_evaluation_leaves_nothing_out(tmp_path: Path) -> None:
    module = prepared(tmp_path, eval_batch_size=5, test_fraction=0.1)
    for loader, split in ((module.val_dataloader(), "val"), (module.test_dataloader(), "test")):
        rows = [row for batch in loader for row in beginnings(batch)]
        assert len(rows) == (module.prepared.splits[split].tokens - 1) // SEQUENCE
        assert rows == [beginnings({"input_ids": loader.dataset[i]["input_ids"][None]})[0] for i in range(len(rows))]


def test_predictions_come_in_the_order_of_the_test_data(tmp_path: Path) -> None:
    module = data(tmp_path, test_fraction=0.1)
    predicted = trainer().predict(Recorder(), module)
    rows = [row for batch in module.test_dataloader() for row in beginnings(batch)]
    assert [row for batch in predicted for row in batch] == rows


def test_overfitting_reads_the_same_batches(tmp_path: Path) -> None:
    module = Recorder()
    trainer(overfit_batches=2, max_epochs=2).fit(module, data(tmp_path))
    first, second = ([batch for epoch, _, batch in module.seen if epoch == which] for which in (0, 1))
    assert first == second and len(first) == 2


def test_without_validation_data(tmp_path: Path) -> None:
    module = Recorder()
    trainer(max_epochs=1, limit_train_batches=2).fit(module, data(tmp_path, val_fraction=0))
    assert len(module.seen) == 2 and not module.validated
    with pytest.raises(DataError, match="holds no 'val' data, only train"):
        trainer().predict(Recorder(), data(tmp_path, val_fraction=0))


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    module = data(tmp_path)
    first, second, third = Recorder(), Recorder(), Recorder()
    fit = trainer(max_steps=5)
    fit.fit(first, module)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    trainer(max_steps=5).fit(second, module)
    assert first.seen == second.seen
    fit = trainer(max_steps=5)
    fit.validate(third, module, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    trainer(max_steps=5).fit(third, module)
    assert third.seen == first.seen, "a checkpoint that was only validated does not move the position"


def test_the_vocabulary_is_known_before_and_the_same_after(tmp_path: Path) -> None:
    module = data(tmp_path)
    before = module.vocab_size
    module.prepare_data()
    assert before == module.vocab_size == 400 >= module.prepared.known_tokens
    again = TokenDataModule(tmp_path / "other", tokenizer=str(tmp_path / "prepared"))
    assert again.vocab_size == module.prepared.known_tokens


class Model(Recorder):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_model_without_room_for_the_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"room for vocab_size=300 tokens .* has 400; build the model with vocab_size=400"
    ):
        trainer().fit(Model(300), data(tmp_path))
    trainer(fast_dev_run=True).fit(Model(400), data(tmp_path))


def test_bad_input(tmp_path: Path) -> None:
    def fit(module: TokenDataModule) -> None:
        trainer(fast_dev_run=True).fit(Recorder(), module)

    with pytest.raises(
        DataError, match=r"train data of \d+ tokens are \d+ sequences .*fewer than one step.*write batch"
    ):
        fit(data(tmp_path, batch_size=1000))
    with pytest.raises(DataError, match="does not exist; write `bharat data prepare"):
        fit(TokenDataModule(tmp_path / "missing"))
    with pytest.raises(DataError, match="does not exist; write the path of a .txt"):
        fit(TokenDataModule(tmp_path / "new", str(tmp_path / "no.txt")))
    chunk = next((tmp_path / "prepared" / "train").glob("*.bin"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match="not as it was written"):
        fit(TokenDataModule(tmp_path / "prepared", sequence_length=SEQUENCE))


def test_the_command_line_builds_it(tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    data(tmp_path)
    cli = LightningCLI(
        Recorder,
        L.LightningDataModule,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=[
            "--data=lightning_bharat.datamodules.TokenDataModule",
            f"--data.folder={tmp_path / 'prepared'}",
            f"--data.texts={tmp_path / 'texts.jsonl'}",
            "--data.batch_size=4",
        ],
    )
    assert isinstance(cli.datamodule, TokenDataModule) and cli.datamodule.batch_size == 4
