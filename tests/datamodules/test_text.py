"""TextDataModule: text files straight to training, in the same order on every layout, and nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from lightning_bharat import HybridStrategy
from lightning_bharat.data import DataError, text_stream
from lightning_bharat.data.corpus import Corpus
from lightning_bharat.data.stages import Stages
from lightning_bharat.data.text_documents import Documents
from lightning_bharat.data.text_loader import TextLoader
from lightning_bharat.data.text_stream import TextStream
from lightning_bharat.data.tokenizer import Encoder, end_token, load_tokenizer, train_tokenizer
from lightning_bharat.datamodules import TextDataModule
from tests.data.texts import sentences, write_corpus
from tests.datamodules.recorder import Recorder, trainer
from tests.datamodules.test_resume import SaveEverywhere
from tests.datamodules.test_tokens import PairsShareData, joined, sequences
from tests.ranks import RanksFailed, run_ranks, server

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "BLOCK_TOKENS", 16 * LENGTH)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of both kinds, an empty one, and a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("texts") / "corpus"
    write_corpus(folder / "a.jsonl", count=60)
    (folder / "b.txt").write_text("\n\n".join(sentences(20, seed=1)), encoding="utf-8")
    (folder / "empty.jsonl").write_text("\n\n")
    with (folder / "a.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('\n{"text": ""}\r\n"a string"\n')
    train_tokenizer(Corpus(folder), 400).save(str(folder.parent / "tokenizer.json"))
    return folder


def drop_tokens(sequence: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A tenth of the inputs becomes token 1."""
    dropped = torch.rand(LENGTH, generator=generator) < 0.1
    return {**sequence, "input_ids": sequence["input_ids"].masked_fill(dropped, 1)}


def loader(texts: Path, batch_size: int = 4, ranks: int = 1, rank: int = 0, **options: Any) -> TextLoader:
    tokenizer = load_tokenizer(texts.parent)
    given: dict[str, Any] = {"threads": 0, "augment": drop_tokens, **options}
    encoder = Encoder(tokenizer, end_token(tokenizer))
    stream = TextStream(Documents(texts), encoder, LENGTH, batch_size, num_replicas=ranks, rank=rank, **given)
    return TextLoader(stream, beside=given["threads"] > 0)


def rows(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    return [tuple(ids.tolist()) for ids in batch["input_ids"]]


def test_documents_are_those_of_a_corpus(texts: Path) -> None:
    documents = Documents(texts)
    assert [text for text in map(documents.__getitem__, range(len(documents))) if text] == list(Corpus(texts))


@pytest.mark.parametrize("ranks, batch_size", [(1, 4), (2, 5), (3, 1), (5, 7)])
def test_each_sequence_is_read_once(texts: Path, ranks: int, batch_size: int) -> None:
    tokenizer = load_tokenizer(texts.parent)
    flat = np.concatenate(Encoder(tokenizer, end_token(tokenizer))(list(Corpus(texts))))
    expected = [tuple(flat[i * LENGTH : (i + 1) * LENGTH].tolist()) for i in range((len(flat) - 1) // LENGTH)]
    options: dict[str, Any] = {"augment": None, "shuffle": False, "drop_last": False}
    each = [list(loader(texts, batch_size, ranks, rank, **options)) for rank in range(ranks)]
    assert len({len(batches) for batches in each}) == 1
    assert [row for step in zip(*each, strict=True) for batch in step for row in rows(batch)] == expected
    assert all(batch["labels"][:, :-1].equal(batch["input_ids"][:, 1:]) for batches in each for batch in batches)


def test_threads_change_nothing(texts: Path) -> None:
    alone = [rows(batch) for batch in loader(texts)]
    beside = loader(texts, threads=2)
    assert [rows(batch) for batch in beside] == alone
    assert set(beside.busy) == {"read", "tokenize", "pack", "augment", "batch"}
    another = [rows(batch) for batch in beside]
    assert another != alone and len(another) == pytest.approx(len(alone), abs=1), "the next epoch"


@pytest.mark.parametrize("ranks", [1, 2])
def test_going_on_from_any_place(texts: Path, ranks: int) -> None:
    first = loader(texts, 4)
    whole, states = [], [first.state_dict()]
    for batch in first:
        whole.append(rows(batch))
        states.append(first.state_dict())
    assert states[-1]["ended"] and not states[-2]["ended"] and len(whole) > 16
    following = [rows(batch) for batch in first]
    for done, state in [*list(enumerate(states))[::3], (len(whole), states[-1])]:
        again = [loader(texts, 4 // ranks, ranks, rank) for rank in range(ranks)]
        for one in again:
            one.load_state_dict(state)
            assert one.state_dict() == state
        steps = [[row for batch in step for row in rows(batch)] for step in zip(*again, strict=True)]
        assert steps == (whole[done:] or following)


def data(texts: Path, batch_size: int = 4, **options: Any) -> TextDataModule:
    given = {"augment": drop_tokens, "val_texts": str(texts / "b.txt"), "sequence_length": LENGTH, **options}
    return TextDataModule(str(texts), str(texts.parent), batch_size=batch_size, **given)


def run(texts: Path, checkpoint: Path | None = None, batch_size: int = 4, **options: Any) -> list:
    module = Recorder()
    trainer(**options).fit(module, data(texts, batch_size, num_workers=0), ckpt_path=checkpoint)
    return module.seen


def test_a_trainer_goes_on_from_anywhere(texts: Path, tmp_path: Path) -> None:
    saving = SaveEverywhere(tmp_path, steps=(4,))
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 1}
    whole = run(texts, callbacks=[saving], **options)
    assert {epoch for epoch, _, _ in whole} == {0, 1}
    for checkpoint, trained in saving.at.items():
        assert run(texts, checkpoint, **options) == whole[trained:], checkpoint.name
    middle = next(path for path in saving.at if path.name.startswith("batch_end-epoch1"))
    smaller = run(texts, middle, batch_size=2, **options)
    read = [row for _, _, batch in smaller for row in batch]
    rest = [row for _, _, batch in whole[saving.at[middle] :] for row in batch]
    assert read[: len(rest)] == rest
    with pytest.raises(DataError, match="the order was drawn with another seed"):
        trainer().fit(Recorder(), data(texts, seed=1), ckpt_path=middle)


def fit_rank(texts: Path, batch_size: int, pairs: bool, checkpoint: Path | None, steps: int) -> dict[str, Any]:
    text_stream.BLOCK_TOKENS = 16 * LENGTH
    ranks = int(os.environ["WORLD_SIZE"])
    strategy = (PairsShareData if pairs else HybridStrategy)(save_distributed_checkpoint=False)
    fit = trainer(strategy=strategy if ranks > 1 else "auto", devices=ranks, max_steps=steps, max_epochs=-1)
    module = Recorder()
    fit.fit(module, data(texts, batch_size), ckpt_path=checkpoint)
    if checkpoint is None:
        fit.save_checkpoint(texts.parent / f"stopped{ranks}.ckpt")
    return {"seen": module.seen, "children": len(psutil.Process().children())}


@pytest.mark.timeout(180)
def test_every_layout_reads_the_same(texts: Path) -> None:
    """One process, two data ranks, and two data × two tensor ranks; and resumed on others."""
    (one,) = run_ranks(fit_rank, 1, texts, 8, False, None, 24)
    two = run_ranks(fit_rank, 2, texts, 4, False, None, 12)
    four = run_ranks(fit_rank, 4, texts, 4, True, None, 5)
    whole = one["seen"]
    assert len(whole) == 24 and whole[-1][0] == 1, "more than an epoch"
    assert joined(two) == whole[:12]
    assert four[0]["seen"] == four[1]["seen"] and four[2]["seen"] == four[3]["seen"]
    assert joined(four[::2]) == whole[:5]
    (resumed,) = run_ranks(fit_rank, 1, texts, 8, False, texts.parent / "stopped2.ckpt", 24)
    assert sequences(resumed["seen"]) == sequences(whole[12:])
    by_four = run_ranks(fit_rank, 4, texts, 2, False, texts.parent / "stopped2.ckpt", 24)
    assert sequences(joined(by_four)) == sequences(whole[12:])
    assert not any(rank["children"] for rank in (one, resumed, *two, *four, *by_four)), "no process is left"


def test_bad_texts(texts: Path, tmp_path: Path) -> None:
    bad = write_corpus(tmp_path / "bad.jsonl", count=40)
    lines = bad.read_text(encoding="utf-8").splitlines()
    lines[24] = '{"text": 5}'
    bad.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"^\S*bad.jsonl, line 25: write"):
        trainer().fit(Recorder(), TextDataModule(str(bad), str(texts.parent), sequence_length=8))
    (tmp_path / "few.jsonl").write_text(json.dumps("one document of few words"))
    with pytest.raises(DataError, match="fewer than one step of batch_size=8 on 1 data ranks = 8; write a smaller"):
        trainer().fit(Recorder(), TextDataModule(str(tmp_path / "few.jsonl"), str(texts.parent)))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="are empty; give some text"):
        trainer().fit(Recorder(), TextDataModule(str(tmp_path / "empty.txt"), str(texts.parent)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="latin.txt is not UTF-8 text"):
        trainer().fit(Recorder(), TextDataModule(str(tmp_path / "latin.txt"), str(texts.parent)))
    module = Recorder()
    module.hparams["vocab_size"] = 300
    with pytest.raises(DataError, match="the model has room for vocab_size=300"):
        trainer().fit(module, data(texts))
    assert not multiprocessing.active_children(), "no process is left"


def fit_bad(bad: str, tokenizer: str) -> None:
    data = TextDataModule(bad, tokenizer, sequence_length=8, batch_size=2)
    trainer(strategy=HybridStrategy(), devices=2).fit(Recorder(), data)


def test_a_bad_line_ends_all_ranks(texts: Path, tmp_path: Path) -> None:
    bad = write_corpus(tmp_path / "bad.jsonl", count=40)
    bad.write_text(bad.read_text(encoding="utf-8") + "{]", encoding="utf-8")
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fit_bad, 2, str(bad), str(texts.parent))
    assert all("bad.jsonl, line 41 is not JSON" in outcome.message for outcome in failed.value.outcomes), failed.value


def test_fewer_documents_than_ranks(texts: Path, tmp_path: Path) -> None:
    long = tmp_path / "one.jsonl"
    long.write_text(json.dumps(" ".join(sentences(60)), ensure_ascii=False), encoding="utf-8")
    (tmp_path / "tokenizer.json").write_bytes((texts.parent / "tokenizer.json").read_bytes())
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    long.rename(corpus / "one.jsonl")
    ranks = [list(loader(corpus, 2, 3, rank)) for rank in range(3)]
    assert len(ranks[0]) == len(ranks[1]) == len(ranks[2]) > 2
    assert len({row for batches in ranks for batch in batches for row in rows(batch)}) == 3 * 2 * len(ranks[0])


class Kills(Recorder):
    """Ends the process beside training after the second step."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 1:
            for child in psutil.Process().children():
                child.kill()
        return super().training_step(batch, batch_idx)


def kill_worker(texts: Path) -> str:
    try:
        trainer().fit(Kills(), data(texts, batch_size=2))
    except RuntimeError as error:
        return str(error)
    return ""


def stand_still(texts: Path, reached: Path) -> None:
    """Train until there is a process beside, write its number down, and wait to be killed."""
    batches = iter(loader(texts, threads=1))
    next(batches)
    reached.with_suffix(".new").write_text(" ".join(str(child.pid) for child in psutil.Process().children()))
    reached.with_suffix(".new").rename(reached)
    time.sleep(1000)


def test_processes_that_are_killed(texts: Path, tmp_path: Path) -> None:
    (words,) = run_ranks(kill_worker, 1, texts)
    assert ("DataLoader worker" in words and "killed" in words) or "exited unexpectedly" in words
    reached = tmp_path / "reached"
    job = server.start(stand_still, 1, texts, reached)
    assert until(reached.exists)
    (worker,) = map(int, reached.read_text().split())
    os.kill(job.pids[0], signal.SIGKILL)
    job.wait(10)
    assert until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)


def until(condition: Any, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_stages_keep_their_order_and_their_errors() -> None:
    def items() -> Iterator[int]:
        yield from range(20)
        raise ValueError("the end of the road")

    stages = Stages(threads=3)
    found = []
    with pytest.raises(ValueError, match="the end of the road"):
        for item in stages.beside("second", stages.each("square", lambda n: n * n, stages.beside("first", items()))):
            found.append(item)
    assert found == [n * n for n in range(len(found))] and len(found) >= 15
    assert list(Stages(0).each("square", lambda n: n * n, range(3))) == [0, 1, 4]


def test_the_command_line_builds_it(texts: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    cli = LightningCLI(
        Recorder,
        L.LightningDataModule,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=[
            "--data=lightning_bharat.datamodules.TextDataModule",
            f"--data.texts={texts}",
            f"--data.tokenizer={texts.parent}",
            "--data.augment=tests.datamodules.test_text.drop_tokens",
        ],
    )
    assert isinstance(cli.datamodule, TextDataModule) and cli.datamodule.augment is drop_tokens
