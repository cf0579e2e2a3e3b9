"""The process server: results, errors, stacks and signals of real ranks come back, and nothing stays behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RanksFailed, fresh_ranks, run_ranks, server


def fit() -> tuple[int, float]:
    import lightning as L
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    trainer = L.Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
    )
    assert isinstance(trainer.strategy.cluster_environment, TorchElasticEnvironment)
    trainer.fit(model := BoringModel())
    return trainer.global_step, float(sum(p.sum() for p in model.parameters()))


def sum_of_ranks(addend: torch.Tensor) -> torch.Tensor:
    dist.init_process_group("gloo")
    total = addend + dist.get_rank()
    dist.all_reduce(total)
    return total


def surroundings(name: str) -> tuple[str, str, int, bool, str]:
    return os.environ[name], os.getcwd(), torch.get_num_threads(), torch.cuda.is_initialized(), os.environ["RANK"]


def raise_on_one(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        print("about to raise")
        raise LookupError("no such word")
    dist.barrier()


def sleep_on_one(rank: int) -> int:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.barrier()
    return 0


def end_one(rank: int, how: str) -> None:
    if int(os.environ["RANK"]) == rank:
        if how == "exit":
            os._exit(7)
        if how == "crash":
            os.abort()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def with_a_child() -> int:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return child.pid


def test_a_fit_on_two_ranks_trains_both_alike_and_takes_no_import() -> None:
    run_ranks(fit, 2)
    began = time.monotonic()
    (steps, weights), other = run_ranks(fit, 2)
    assert time.monotonic() - began < 5
    assert steps == 4
    assert other == (steps, weights)


def test_tensors_go_there_and_come_back_in_order_of_ranks() -> None:
    first, second = run_ranks(sum_of_ranks, 2, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert first.tolist() == second.tolist() == [3.0, 5.0]


def test_a_rank_has_our_environment_and_one_thread_and_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAID_LATER", "yes")
    assert run_ranks(surroundings, 1, "SAID_LATER") == [("yes", str(tmp_path), 1, False, "0")]
    assert run_ranks(surroundings, 1, "X", env={"X": "3"})[0][0] == "3"


def frozen_objects() -> int:
    return gc.get_freeze_count()


def test_a_rank_looks_for_garbage_among_its_own_objects_alone() -> None:
    """A collection over all that the server imported takes a third of a second, and copies the pages they share."""
    assert run_ranks(frozen_objects, 1)[0] > 100_000


def test_an_error_comes_back_with_the_traceback_and_output_of_its_rank() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(raise_on_one, 2, 1)
    error = failed.value.outcomes[1]
    assert (error.error, error.message, error.exit_code) == ("LookupError", "no such word", 1)
    assert "raise_on_one" in error.traceback
    assert "about to raise" in error.output
    assert "rank 1: LookupError: no such word" in str(failed.value)
    assert not failed.value.outcomes[0].ok


def test_a_hang_ends_at_the_time_out_with_the_stacks_of_all_ranks() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(sleep_on_one, 2, 1, timeout=3)
    waiting, sleeping = failed.value.outcomes
    assert waiting.timed_out and sleeping.timed_out
    assert "barrier" in waiting.stacks
    assert "sleep_on_one" in sleeping.stacks and "sleep_on_one" in str(failed.value)


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [("exit", 7, "exit code 7"), ("kill", -9, "SIGKILL"), ("crash", -6, r"Fatal Python error: Aborted[^$]*in end_one")],
)
def test_a_rank_that_ends_without_a_word_is_named_with_how_it_ended(how: str, code: int, words: str) -> None:
    with pytest.raises(RanksFailed, match=words) as failed:
        run_ranks(end_one, 2, 0, how, grace=0.5)
    assert failed.value.outcomes[0].exit_code == code
    assert failed.value.outcomes[1].timed_out


class Exits:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple:
        return sys.exit, (1,)


def test_a_rank_that_ends_before_it_begins_is_no_killed_one(tmp_path) -> None:
    """As one whose import of the script ends it."""
    with pytest.raises(RanksFailed, match=r"RuntimeError: it ended before it could begin.*`if __name__ == ") as failed:
        run_ranks(surroundings, 1, "X", env={"X": Exits()})
    assert failed.value.outcomes[0].exit_code == 1


def test_nothing_stays_behind() -> None:
    job = server.start(with_a_child, 2)
    outcomes = job.wait(timeout=20)
    for pid in [*job.pids, *(outcome.value for outcome in outcomes)]:
        assert _is_gone_within(2, pid)


def test_a_function_that_cannot_be_imported_is_refused() -> None:
    with pytest.raises(TypeError, match="top level of a module"):
        run_ranks(lambda: 0, 1)


def test_a_fresh_process_is_seen_with_its_output_and_end() -> None:
    (late,) = fresh_ranks(["-c", "import time; print('here', flush=True); time.sleep(600)"], timeout=1.5)
    assert late.timed_out and "here" in late.output and 'File "<string>", line 1' in late.output
    one, two = fresh_ranks(["-c", "import os, sys; sys.exit(int(os.environ['RANK']) + 3)"], ranks=2)
    assert (one.exit_code, two.exit_code) == (3, 4)


def _is_gone_within(seconds: float, pid: int) -> bool:
    """Killing is not instantaneous; a zombie that its parent has not reaped yet counts as gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
