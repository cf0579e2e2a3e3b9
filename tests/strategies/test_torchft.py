"""Replica groups under torchft: the steps of one process, and a group that is killed and replaced. One that is
stopped: tests/faults/stopped_group.py."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bharat import events
from tests.ranks import run_ranks
from tests.strategies.replica_groups import SAMPLES, STEPS, Net, lighthouse, start, train, value_of, wait_for

pytest.importorskip("torchft")


class Whole(Net):
    """On one process, with the batches of two groups in one."""

    def __init__(self) -> None:
        super().__init__(batch_size=8)

    def train_dataloader(self) -> Any:
        data = super().train_dataloader().dataset
        return DataLoader(data, self.batch_size, sampler=DistributedSampler(data, 1, 0, shuffle=True))


class Waits(Net):
    """For the second group in the beginning, and for the third when it has gone on alone."""

    def on_train_batch_end(self, *_: Any) -> None:
        alone = went_on(Path(self.trainer.default_root_dir))
        name = "second" if self.global_step == 2 else "third" if alone else ""
        if self.global_step == 2:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/second.ckpt")
        wait_for(lambda: not name or (Path(self.trainer.default_root_dir).parent / name / "begun").exists(), name)


class Joins(Net):
    """Says that the others know of it."""

    def on_train_start(self) -> None:
        Thread(target=self.say, daemon=True).start()

    def say(self) -> None:
        wait_for(lambda: self.trainer.strategy.groups, "a manager")
        Path(self.trainer.default_root_dir, "begun").touch()


class Dies(Joins):
    """In the middle of its fifth step."""

    signal = signal.SIGKILL

    def training_step(self, batch: Any, number: int) -> Tensor | None:
        if len(self.losses) == 4:
            os.kill(os.getpid(), self.signal)
        return super().training_step(batch, number)


def in_two_fits(folder: str, kind: type[Net], seed: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Two epochs, and a third from their checkpoint."""
    before = train(folder, kind, seed, max_epochs=2, **arguments)
    after = train(folder, kind, seed + 10, max_epochs=3, ckpt_path=f"{folder}/end.ckpt", **arguments)
    return {**after, "losses": before["losses"] + after["losses"]}


def share(replica: int, epoch: int) -> list[int]:
    sampler = DistributedSampler(range(SAMPLES), 2, replica, shuffle=True)
    sampler.set_epoch(epoch)
    return list(sampler)


def check_samples(run: dict[str, Any], replica: int) -> None:
    """Each step has the samples that it has where no one dies."""
    batches = SAMPLES // 2 // 4
    for epoch, step, samples in run["seen"]:
        first = step % batches * 4
        assert epoch == step // batches
        assert samples == share(replica, epoch)[first : first + 4]


def test_two_groups_equal_one_process(tmp_path: Path) -> None:
    """With accumulated batches, clipping, two schedulers, a parameter without a gradient, and a resume."""
    run = {"precision": "64-true", "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    with lighthouse(2) as address:  # other seeds: all begin with the weights of one of them
        folders = [tmp_path / str(replica) for replica in range(2)]
        jobs = [start(address, i, folder, Net, i, run, in_two_fits) for i, folder in enumerate(folders)]
        groups = [value_of(job) for job in jobs]
    begun = 0 if groups[0]["losses"][0] == pytest.approx(first_loss(0, 0)) else 1
    (alone,) = run_ranks(in_two_fits, 1, str(tmp_path / "alone"), Whole, begun, {**run, "strategy": "auto"})
    for group in groups:
        assert group["step"] == alone["step"] == 9
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(group["weights"][name], weight, rtol=0, atol=1e-9)
    assert len(alone["losses"]) == 18
    for i, loss in enumerate(alone["losses"]):
        assert sum(group["losses"][i] for group in groups) / 2 == pytest.approx(loss, abs=1e-9)


def first_loss(seed: int, replica: int) -> float:
    """Of a group with the weights of ``seed``."""
    torch.manual_seed(seed)
    module = Net().double()
    inputs, targets, _ = Net.train_dataloader(module).dataset[share(replica, 0)[:4]]
    return nn.functional.mse_loss(module.layers(inputs.double()), targets.double()).item()


RUN = {"max_steps": STEPS, "max_epochs": -1}


@pytest.mark.parametrize("goes_on", [False, True], ids=["anew", "from an old checkpoint"])
def test_a_group_that_is_killed_is_replaced(goes_on: bool, tmp_path: Path) -> None:
    """The other one goes on, alone and then with a new one, whatever this had begun with."""
    first = tmp_path / "first"
    with lighthouse(1, "--heartbeat_timeout_ms=1000") as address:
        survivor = start(address, 0, first, Waits, 0, RUN)
        wait_for(lambda: events.read(first), "the first group's first step")
        (killed,) = start(address, 1, tmp_path / "second", Dies, 1, RUN).wait(timeout=60)
        assert killed.exit_code == -signal.SIGKILL, killed
        wait_for(lambda: went_on(first), "a step alone")
        given = {"ckpt_path": f"{first}/second.ckpt"} if goes_on else {}
        replacement = start(address, 1, tmp_path / "third", Joins, 2, {**RUN, **given})
        ours, its = value_of(survivor), value_of(replacement)
    check_together(ours, its)
    assert [step for _, step, _ in its["seen"]] == list(range(its["seen"][0][1], STEPS))
    assert alive(first)[-1] == 2 and its["seen"][0][1] > 2
    assert events.read(tmp_path / "third")[0]["kind"] == "healed"


def check_together(ours: dict[str, Any], its: dict[str, Any]) -> None:
    """Both have ended after the same step with the same weights, and samples are those of their steps."""
    assert [len(ours["losses"]), ours["step"]] == [STEPS, STEPS]
    assert all(map(math.isfinite, ours["losses"] + its["losses"]))
    assert (ours["step"], ours["epoch"], ours["batches"]) == (its["step"], its["epoch"], its["batches"])
    assert all(torch.equal(weight, its["weights"][name]) for name, weight in ours["weights"].items())
    torch.testing.assert_close(ours["optimizer"], its["optimizer"], rtol=0, atol=0)
    check_samples(ours, 0)
    check_samples(its, 1)
    assert [step for _, step, _ in ours["seen"]] == list(range(STEPS))


def went_on(folder: Path) -> bool:
    """Whether a group has begun a step alone after one that was lost."""
    told = events.read(folder)
    lost = [event["time"] for event in told if event["kind"] == "lost_step"]
    return any(event.get("alive") == 1 and event["time"] > lost[0] for event in told if lost)


def alive(folder: Path) -> list[int]:
    """The numbers of groups that a group has seen."""
    return [event["alive"] for event in events.read(folder) if event["kind"] == "groups"]
