"""One rank's error ends all ranks in seconds, once in words, whatever the others are doing. Real gloo ranks.

Under each launcher: test_launch.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset

from lightning_bharat import HybridStrategy
from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.models import GPTConfig, GPTModule
from lightning_bharat.strategies.ends_together import EndsTogether
from lightning_bharat.strategies.errors import ErrorWatch, PeerError
from lightning_bharat.strategies.liveness import watched_ranks
from tests.ranks import run_ranks, server

WORDS = "-".join(["bad", "apple"])  # never in a source line, so that each occurrence in an output was printed
LIMIT = 10  # seconds from the error to the end of the last rank


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class WatchedDDP(EndsTogether, DDPStrategy):
    """The mixin on one of Lightning's own strategies; HybridStrategy has it by itself."""

    def watch_errors(self) -> None:
        super().watch_errors()
        assert self.watch is not None
        self.watch.rank_name = name


def name(rank: int) -> str:
    return f"rank {rank} (data {rank})"


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))  # torchrun's, or Lightning's launcher's


def wait_in(place: str) -> None:
    """What a rank does that has no error."""
    if place == "collective":
        dist.all_reduce(torch.ones(1))
    elif place == "sleep":
        time.sleep(100)
    elif place == "store":
        dist.distributed_c10d._get_default_store().wait(["never"], timedelta(seconds=100))
    elif place == "swallowing loop":
        for _ in range(1000):
            try:
                time.sleep(100)
            except Exception:
                print("swallowed")


def fail(how: str) -> None:
    """What the rank with the error does."""
    print(f"failing at {time.monotonic()}", flush=True)
    if how == "raise":
        raise LookupError(WORDS)
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


class Numbers(Dataset):
    def __init__(self, failing: bool) -> None:
        self.failing = failing

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.failing:
            fail("raise")
        return torch.ones(32)


class Module(BoringModel):
    """Fails, or waits for the rank that fails, at one place."""

    def __init__(self, place: str, failing_rank: int, how: str, others: str) -> None:
        super().__init__()
        self.place, self.how, self.others = place, how, others
        self.fails = failing_rank == rank()

    def at(self, place: str) -> None:
        if place == self.place:
            if self.fails:
                fail(self.how)
            wait_in(self.others)

    def setup(self, stage: str) -> None:
        self.at("setup")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.at("training_step")
        if self.place.startswith("loader"):
            wait_in(self.others)
        return self.step(batch)

    def train_dataloader(self) -> DataLoader:
        workers = int(self.place == "loader worker")
        return DataLoader(Numbers(self.place.startswith("loader") and self.fails), batch_size=2, num_workers=workers)


class AtStart(L.Callback):
    def on_train_start(self, trainer: L.Trainer, module: Module) -> None:
        module.at("callback")


class SavesOnException(L.Callback):
    """As ModelCheckpoint(save_on_exception=True): a collective, when the others are on their way out."""

    def on_exception(self, trainer: L.Trainer, module: Module, exception: BaseException) -> None:
        dist.barrier()


def trainer(*callbacks: L.Callback, strategy: str = "ddp") -> L.Trainer:
    return L.Trainer(
        strategy=WatchedDDP() if strategy == "ddp" else HybridStrategy(),
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 2)),
        max_steps=4,
        limit_val_batches=0,
        **QUIET,
        callbacks=[AtStart(), *callbacks],
    )


def fit(place: str, failing_rank: int, how: str, others: str, strategy: str = "ddp", saves: bool = False) -> None:
    callbacks = [SavesOnException()] if saves else []
    trainer(*callbacks, strategy=strategy).fit(Module(place, failing_rank, how, others))


def ends(function, ranks: int, *args: object) -> list[RankOutcome]:
    """Run, and check what holds for all: every rank ended by itself, in time, with an exit code that says so."""
    outcomes = server.start(function, ranks, *args, grace=20).wait(timeout=25)
    ended = time.monotonic()
    everything = "\n".join(f"{outcome.summary()}\n{outcome.output}" for outcome in outcomes)
    assert not any(outcome.timed_out for outcome in outcomes), everything
    assert all(outcome.exit_code for outcome in outcomes), everything
    began = [float(line.split()[-1]) for line in everything.splitlines() if line.startswith("failing at")]
    assert ended - min(began) < LIMIT, everything
    print(f"{ended - min(began):.1f} s\n{everything}")
    return outcomes


def printed(outcomes: list[RankOutcome], words: str) -> int:
    return sum(outcome.output.count(words) for outcome in outcomes)


@pytest.mark.parametrize(
    ("others", "failing_rank", "place"),
    [
        ("collective", 1, "training_step"),
        ("collective", 0, "callback"),
        ("sleep", 0, "training_step"),
        ("store", 1, "training_step"),
        ("swallowing loop", 0, "callback"),
    ],
)
def test_an_error_ends_all_ranks_wherever_they_wait(others: str, failing_rank: int, place: str) -> None:
    outcomes = ends(fit, 3, place, failing_rank, "raise", others)
    assert outcomes[failing_rank].error == "LookupError"
    assert printed(outcomes, WORDS) == 1
    assert outcomes[failing_rank].output.count(WORDS) == 1
    for peer in outcomes:
        if peer.rank != failing_rank:
            assert f"{name(peer.rank)} ends: {name(failing_rank)} raised LookupError and prints it" in peer.output
            assert "Traceback" not in peer.output
            assert peer.error in ("PeerError", None)
            if peer.error:
                assert peer.message == f"{name(failing_rank)} raised LookupError: {WORDS}"


@pytest.mark.parametrize("strategy", ["ddp", "hybrid"])
@pytest.mark.parametrize("place", ["setup", "callback", "training_step", "loader", "loader worker"])
def test_an_error_in_any_place_ends_all_ranks_of_each_strategy(place: str, strategy: str) -> None:
    outcomes = ends(fit, 2, place, 1, "raise", "collective", strategy)
    assert printed(outcomes, WORDS) == 1
    assert outcomes[1].error == "LookupError"


@pytest.mark.parametrize("others", ["collective", "sleep"])
@pytest.mark.parametrize(("how", "failing_rank"), [("kill", 0), ("exit", 1)])
def test_a_rank_that_dies_without_a_word_is_named_on_the_others(how: str, failing_rank: int, others: str) -> None:
    outcomes = ends(fit, 3, "training_step", failing_rank, how, others)
    assert printed(outcomes, f"{name(failing_rank)} is gone") == 2
    assert printed(outcomes, "Traceback") == 0
    if failing_rank != 0:  # whose end a thread may see by the store that is gone with it, of which torch writes traces
        assert printed(outcomes, "frame #") == 0


def test_callbacks_that_wait_for_others_after_an_error_do_not_hold_it_back() -> None:
    outcomes = ends(fit, 2, "training_step", 1, "raise", "sleep", "ddp", True)
    assert outcomes[0].error in ("PeerError", None)
    assert WORDS in outcomes[1].output


def refuse_everywhere(strategy: str = "ddp") -> None:
    print(f"failing at {time.monotonic()}")
    module = Module("nowhere", 0, "", "")
    module.training_step = refuse
    trainer(strategy=strategy).fit(module)


def refuse(batch: torch.Tensor, batch_idx: int) -> None:
    raise ValueError(WORDS)


@pytest.mark.parametrize("strategy", ["ddp", "hybrid"])
def test_what_all_ranks_refuse_keeps_its_type_and_is_printed_once(strategy: str) -> None:
    outcomes = ends(refuse_everywhere, 3, strategy)
    assert [outcome.error for outcome in outcomes] == ["ValueError"] * 3
    assert printed(outcomes, WORDS) == 1
    assert printed(outcomes, "Traceback") == 1
    assert printed(outcomes, "raised ValueError and prints it") == 2


def refuse_then_fit(strategy: str) -> int:
    with pytest.raises(ValueError, match=WORDS):
        refuse_everywhere(strategy)
    again = trainer(strategy=strategy)
    again.fit(Module("nowhere", 0, "", ""))
    return again.global_step


@pytest.mark.parametrize("strategy", ["ddp", "hybrid"])
def test_after_a_refusal_the_same_processes_train(strategy: str) -> None:
    assert run_ranks(refuse_then_fit, 2, strategy) == [4, 4]


def timeouts(sizes: dict[str, int]) -> set[timedelta]:
    """Those of all groups that the rank is in, after a step."""
    strategy = HybridStrategy(**sizes, timeout=timedelta(seconds=77))
    module = GPTModule(GPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    loop = L.Trainer(strategy=strategy, accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), max_steps=1, **QUIET)
    batches = [{name: torch.zeros(2, 8, dtype=torch.int64) for name in ("input_ids", "labels")}] * 4
    loop.fit(module, DataLoader(batches, batch_size=None))
    groups = list(dist.distributed_c10d._world.pg_map)
    assert len(groups) > 2
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"replicate_size": 2}], ids=str)
def test_the_timeout_holds_in_every_group_of_the_layout(sizes: dict[str, int]) -> None:
    assert run_ranks(timeouts, 4, sizes) == [{timedelta(seconds=77)}] * 4


def catch_and_stay() -> None:
    try:
        fit("training_step", 1, "raise", "collective")
    except LookupError:
        time.sleep(8)  # in a notebook: the process that failed stays, and so do its connections
        sys.exit(1)


def test_ranks_in_a_collective_end_although_the_failed_process_stays() -> None:
    outcomes = ends(catch_and_stay, 2)
    assert "did not come back within 6 s" in outcomes[0].output
    assert "in wait_in" in outcomes[0].output or "all_reduce" in outcomes[0].output


class LateAtTheEnd(L.Callback):
    def __init__(self, late: int) -> None:
        self.late = late

    def on_fit_end(self, trainer: L.Trainer, module: Module) -> None:
        if rank() == self.late:
            time.sleep(3)


def finish_at_different_times(late: int) -> int:
    first = trainer(LateAtTheEnd(late))
    first.fit(Module("nowhere", 0, "", ""))
    if rank() != late:
        os._exit(0)  # not even a goodbye; the others are at work for seconds
    return first.global_step


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_ready_early_is_no_error(late: int) -> None:
    outcomes = server.start(finish_at_different_times, 3, late).wait(timeout=25)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, 0]
    assert outcomes[late].value == 4
    assert printed(outcomes, "ends:") == 0


def lose_a_host() -> None:
    """Two hosts of one rank each, as far as the watch knows; the store stays, as torchrun's does."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    watch = ErrorWatch(store, rank(), 2, local_size=1, silence=2)
    without_pidfd = vars(os).pop("pidfd_open")
    watch.start()
    assert without_pidfd is not None
    time.sleep(3)
    if rank() == 1:
        fail("kill")
    try:
        time.sleep(100)
    except PeerError as error:
        print(error.first.message)
        watch.report(error)
        raise
    finally:
        watch.stop()


def test_a_host_that_falls_silent_is_named() -> None:
    outcomes = ends(lose_a_host, 2)
    assert outcomes[0].error == "PeerError"
    assert "rank 1 is gone: no sign of life for 2 s" in outcomes[0].output


def test_each_rank_is_watched_by_another_one() -> None:
    for world_size, local_size in [(2, 2), (2, 1), (8, 8), (16, 4), (6, 4)]:
        watched = {other for number in range(world_size) for other in watched_ranks(number, world_size, local_size)}
        assert watched == set(range(world_size))
