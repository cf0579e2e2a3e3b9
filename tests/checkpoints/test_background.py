"""What a save is made of, apart: the copy, the plan that is kept, the thread, and how its ranks meet in the store."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_bharat.checkpoints import Checkpoint, CheckpointError
from lightning_bharat.checkpoints.background import Background, InStore
from lightning_bharat.checkpoints.directory import need_space
from lightning_bharat.checkpoints.errors import on_rank_zero
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.safetensors_file import Entry
from lightning_bharat.checkpoints.saving import Saver
from lightning_bharat.checkpoints.share import Share
from lightning_bharat.checkpoints.snapshot import HostMemory
from lightning_bharat.strategies._torch import default_store
from tests.ranks import RanksFailed, run_ranks


def entry(tensor: torch.Tensor) -> Entry:
    return Entry("t", tensor.dtype, tuple(tensor.shape), lambda: tensor)


def test_a_copy_keeps_its_values_and_the_memory_is_used_again() -> None:
    drawn = torch.randn(5, 3)
    tensors = [drawn, drawn.t(), torch.tensor(7.0), torch.tensor(True), torch.empty(0, 4), torch.arange(3)]
    tensors += [drawn.bfloat16(), drawn.to(torch.float8_e4m3fn), torch.randn(2, dtype=torch.complex64)]
    expected, memory = [tensor.clone() for tensor in tensors], HostMemory()
    copies = [copy.read() for copy in memory.copy([entry(tensor) for tensor in tensors]).entries]
    for tensor in tensors:
        tensor.view(torch.uint8).zero_() if tensor.is_contiguous() and tensor.numel() and tensor.ndim else None
    for copy, values in zip(copies, expected, strict=True):
        assert copy.dtype == values.dtype and copy.shape == values.shape
        assert torch.equal(copy.contiguous().view(-1).view(torch.uint8), values.contiguous().view(-1).view(torch.uint8))
    again = memory.copy([entry(tensor) for tensor in tensors[:4]])
    assert again.entries[0].read().data_ptr() == copies[0].data_ptr()


def test_a_late_copy_tells_whether_the_tensor_was_still_the_same() -> None:
    early, late = torch.ones(2), torch.ones(3)
    snapshot = HostMemory().copy(
        [entry(early), entry(late)], later=lambda tensor: late if tensor.shape == (3,) else None
    )
    early.zero_()
    assert not snapshot.wait(0)
    snapshot.complete()
    assert snapshot.wait(0)
    late.zero_()
    assert [copy.read().tolist() for copy in snapshot.entries] == [[1, 1], [1, 1, 1]]
    snapshot = HostMemory().copy([entry(late)], later=lambda tensor: tensor)
    late.view(3, 1).add_(1)
    with pytest.raises(CheckpointError, match="t was changed before it had been copied"):
        snapshot.complete()
    assert snapshot.wait(0) and snapshot.was_changed


def test_after_a_step_has_failed_the_rest_is_left_out_until_the_error_is_taken() -> None:
    done: list[Any] = []
    writer, gate = Background(), threading.Event()
    assert writer.is_idle
    writer.do(gate.wait)
    writer.do(lambda: done.append(threading.current_thread()))
    assert not writer.is_idle and not writer.wait(0.01)
    gate.set()
    writer.do(lambda: 1 / 0)
    writer.do(lambda: done.append("left out"))
    assert writer.wait()
    assert done != [threading.main_thread()] and len(done) == 1
    assert isinstance(writer.take_error(), ZeroDivisionError) and writer.take_error() is None
    writer.do(lambda: done.append("again"))
    writer.wait()
    assert done[1:] == ["again"]


def meet(fails: str) -> list[Any]:
    dist.init_process_group("gloo")
    rank, seen, said = dist.get_rank(), [], []
    store = dist.PrefixStore("saves", default_store())
    ranks = InStore(store, rank, dist.get_world_size())

    def own() -> dict[str, int]:
        if fails == "a rank" and rank == 1:
            raise OSError(28, "No space left on device")
        return {f"file {rank}": rank}

    def last(everyone: list[dict[str, int]]) -> None:
        if fails == "the end":
            raise CheckpointError("the manifest can't be written")
        seen.append(everyone)

    for _ in range(3):
        try:
            ranks.finish(own, last)
        except CheckpointError as error:
            said.append(str(error))
    dist.barrier()
    return [seen, said, store.check(["1/0"]) or store.check(["2/done"])]


@pytest.mark.parametrize(("fails", "words"), [("a rank", "OSError: [Errno 28] No space"), ("the end", "the manifest")])
def test_what_goes_wrong_on_one_rank_is_said_on_all(fails: str, words: str) -> None:
    for seen, said, _ in run_ranks(meet, 3, fails):
        assert seen == [] and len(said) == 3
        assert all(text.startswith(words) for text in said)


def test_the_last_part_is_done_by_the_first_rank_with_what_all_have_written() -> None:
    found = run_ranks(meet, 3, "")
    assert found[0] == [[[{"file 0": 0}, {"file 1": 1}, {"file 2": 2}]] * 3, [], False]
    assert found[1] == found[2] == [[], [], False]


def leave(rank: int) -> str:
    """All begin to save; one is killed before it has written its part."""
    dist.init_process_group("gloo")
    ranks = InStore(dist.PrefixStore("saves", default_store()), dist.get_rank(), 3, timeout=1)
    dist.barrier()

    def own() -> None:
        if dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        ranks.finish(own, lambda _: None)
    except CheckpointError as error:
        Path(os.environ["SAID"], str(dist.get_rank())).write_text(str(error))
    return "came back"


@pytest.mark.parametrize(
    ("rank", "words"), [(1, "not all ranks had written their part after 1 s"), (0, "the store that rank 0 hosts does")]
)
def test_a_rank_that_dies_is_an_error_in_words_on_the_others(tmp_path: Path, rank: int, words: str) -> None:
    with pytest.raises(RanksFailed):
        run_ranks(leave, 3, rank, env={"SAID": str(tmp_path)})
    others = [path for path in tmp_path.iterdir() if words in path.read_text()]
    assert len(others) == 2


def save_twice(folder: str) -> list[int]:
    dist.init_process_group("gloo")
    rank, saver, asked = dist.get_rank(), Saver(), []
    gather = dist.gather_object
    dist.gather_object = lambda *args, **kwargs: asked.append(len(asked)) or gather(*args, **kwargs)
    found = []
    for step, length in enumerate((4, 4, 6)):
        tensor = torch.full((length,), float(step))
        state = {"w": Share.of(tensor), "first's": (Share.nothing if rank else Share.of)(torch.tensor([rank]))}
        checkpoint = {"state_dict": state}
        saving = saver.begin(Path(folder, str(step)), checkpoint, Manifest.of(checkpoint), copy=True)
        tensor.fill_(-1)  # training goes on
        saving.write(_AtOnce())
        found.append(len(asked))
        dist.barrier()
    return found


class _AtOnce:
    """The ranks of this test write one after another."""

    def finish(self, own: Any, last: Any) -> Any:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own())
        return on_rank_zero(lambda: last(everyone))


def test_a_plan_is_kept_for_saves_of_the_same_shapes(tmp_path: Path) -> None:
    assert run_ranks(save_twice, 2, str(tmp_path)) == [[1, 1, 2]] * 2
    for step, length in enumerate((4, 4, 6)):
        checkpoint = Checkpoint(tmp_path / str(step))
        checkpoint.try_all()
        assert checkpoint.stored("w").read().tolist() == [float(step)] * length


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"new.ckpt needs 1.13 PB and .* has .*B free: free some space"):
        need_space(tmp_path / "new.ckpt", 2**50)
    assert list(tmp_path.iterdir()) == []
