"""Faults that are made on real ranks are found, named and answered alike on all; without one nothing changes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bharat import events
from lightning_bharat.callbacks import HealthError, HealthMonitor
from lightning_bharat.health.finding import EXIT_CODE
from lightning_bharat.health.prober import Intervals
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.strategies.data import local
from tests.modules import Rows, Trained, fit
from tests.plan.models import VOCABULARY
from tests.ranks import run_ranks, server

TENSOR: dict[str, Any] = {"tensor_parallel_size": 2}
STAGES: dict[str, Any] = {"pipeline_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {"data": {}, "tensor": TENSOR, "pipeline": STAGES}
NORM = "model.layers.1.norm1.weight"
UP = "model.layers.1.up"


class Dropping(Trained):
    """Draws random numbers in each step."""

    rows_of = "nano"

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch) * (1 + 0.1 * torch.rand(()))


class Does(L.Callback):
    """Calls ``fault(trainer, module)`` on one rank after the backward pass of one step."""

    def __init__(self, step: int, rank: int, fault: Callable[..., Any]) -> None:
        self.step, self.rank, self.fault = step, rank, fault
        self.done = False

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (trainer.global_step, trainer.global_rank, self.done) == (self.step, self.rank, False):
            self.done = True
            self.fault(trainer, module)


class Weights(L.Callback):
    """What this rank holds at the start of each batch, as one number."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            self.seen.append(
                sum(float(local(p).double().abs().sum()) for p in module.parameters() if not is_elsewhere(p))
            )


def stepped(trainer: L.Trainer) -> list[Tensor]:
    return [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]


def spoil_gradient(trainer: L.Trainer, module: L.LightningModule) -> None:
    gradient = next(p.grad for p in stepped(trainer) if p.grad is not None and local(p.grad).numel())
    local(gradient).view(-1)[0] = torch.nan


def grow_gradient(trainer: L.Trainer, module: L.LightningModule) -> None:
    for parameter in stepped(trainer):
        local(parameter.grad).mul_(1 + 1e-12)  # type: ignore[arg-type]


def flip_weight(trainer: L.Trainer, module: L.LightningModule) -> None:
    local(dict(module.named_parameters())[NORM]).detach().view(torch.int64).view(-1)[-1] ^= 1 << 50


class Bursting(Trained):
    """Its feed-forward gives infinity on one rank at one step."""

    rows_of = "nano"

    def __init__(self, step: int, rank: int) -> None:
        super().__init__("nano")
        self.at = step, rank

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        up = self.get_submodule(UP)
        if (self.trainer.global_step, self.trainer.global_rank) == self.at:
            up.forward = lambda x: type(up).forward(up, x) * torch.inf  # type: ignore[method-assign]
        try:
            return super().training_step(batch, batch_idx)
        finally:
            up.__dict__.pop("forward", None)


class Unsteady(Trained):
    """Its feed-forward on one rank never gives the same twice: a device that makes errors."""

    rows_of = "nano"

    def __init__(self, rank: int) -> None:
        super().__init__("nano")
        self.bad, self.calls = rank, 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_rank == self.bad and self.trainer.global_step > 3:
            up = self.get_submodule(UP)
            up.forward = lambda x: self.changed(type(up).forward(up, x))  # type: ignore[method-assign]
        return super().training_step(batch, batch_idx)

    def changed(self, out: Tensor) -> Tensor:
        self.calls += 1
        return out.detach() * (self.calls * 1e-12) + out


class BadRows(Rows):
    """One rank's third batch has a token that there is not."""

    def __iter__(self) -> Any:
        for i, batch in enumerate(super().__iter__()):
            if i == 2 and self.rank == 1:
                batch["ids"][0, 0] = VOCABULARY
            yield batch


def _healthy(layout: str) -> tuple[Any, ...]:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "batch": 8}
    runs = []
    for policy in (None, {"nan": "rollback"}):
        monitor = HealthMonitor(policy, recompute_every_n_steps=1, replicas_every_n_steps=2, vocab_size=VOCABULARY)
        callbacks = [] if policy is None else [monitor]
        run = fit(Dropping, LAYOUTS[layout], 4, callbacks=callbacks, default_root_dir=f"run-{layout}", **options)
        runs.append(run.seen)
    return (*runs, monitor._run.last.norm, [event["kind"] for event in events.read(Path(f"run-{layout}"))])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_healthy_run_is_as_without(layout: str) -> None:
    """Each step is computed twice, and nothing of it is seen: losses and norms are the same bits."""
    for without, watched, norm, seen in run_ranks(_healthy, 2, layout, timeout=60):
        assert watched == without
        assert norm == pytest.approx(watched[-1][1], rel=1e-9)
        assert not seen


class Case:
    """A run of six steps on two ranks.

    Attributes:
        weights: at the start of each batch.
        error, kind: of what left ``fit``.
        events: that were written.
    """

    def __init__(self, name: str, fault: L.Callback | None, policy: Any = None, layout: Any = None, **options: Any):
        module, rows = options.pop("module", "nano"), options.pop("rows_kind", Rows)
        weights, folder = Weights(), Path(f"run-{name}")
        monitor = HealthMonitor(policy, replicas_every_n_steps=1, **options)
        callbacks = [weights, *([fault] if fault else []), monitor]
        self.error = self.kind = ""
        try:
            fit(module, layout or {}, 6, callbacks=callbacks, default_root_dir=folder, rows_kind=rows, batches=8)
        except HealthError as error:
            self.error, self.kind = str(error), type(error).__name__
        self.weights = weights.seen
        self.events = events.read(folder) if int(os.environ["RANK"]) == 0 else []


def _faults() -> dict[str, Case]:
    twice = {"policy": {"corruption": "log"}, "recompute_every_n_steps": 1}
    return {
        "none": Case("none", None),
        "forward": Case("forward", None, module=partial(Bursting, 2, 1)),
        "gradient": Case("gradient", Does(2, 1, spoil_gradient)),
        "rollback": Case("rollback", Does(3, 0, spoil_gradient), {"nan": "rollback"}, rollback_steps=2),
        "restart": Case("restart", None, {"nan": "restart"}, module=partial(Bursting, 1, 0)),
        "data": Case("data", None, rows_kind=BadRows, vocab_size=VOCABULARY),
        "unsteady": Case("unsteady", None, module=partial(Unsteady, 1), **twice),
        "twice": Case("twice", Does(2, 1, grow_gradient), **twice),
        "replica": Case("replica", Does(2, 1, flip_weight), layout=TENSOR),
        "stages": Case("stages", None, layout=STAGES, module=partial(Bursting, 2, 0)),
    }


@cache
def faults() -> list[dict[str, Case]]:
    return run_ranks(_faults, 2, timeout=100)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("runs"))


def found(name: str) -> dict[str, Any]:
    """The one event of a case: written once, however many ranks know of it."""
    (event,) = faults()[0][name].events
    return event


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert [case["none"].events for case in faults()] == [[], []]
    assert all(case["none"].weights == sorted(set(case["none"].weights)) for case in faults())


@pytest.mark.parametrize("name", ["forward", "stages"])
def test_names_the_module_that_made_the_first_nan(name: str) -> None:
    event = found(name)
    rank = "rank 1 (data 1)" if name == "forward" else "rank 0 (pipeline 0)"
    where = f"in the forward pass of {UP}: finite input, output that is not"
    assert event["message"].startswith(f"step 2, {rank} on {os.uname().nodename}: the first value that is not finite")
    assert event["message"].endswith(where)
    assert (event["fault"], event["action"], event["step"]) == ("nan", "skip", 2)


@pytest.mark.parametrize("name", ["forward", "gradient", "data", "stages"])
def test_a_step_that_is_left_out_changes_no_weight_on_any_rank(name: str) -> None:
    for rank in faults():
        weights = rank[name].weights
        assert weights[3] == weights[2]
        assert len(set(weights)) == 5
    if name != "stages":
        assert faults()[0][name].weights == faults()[0]["forward"].weights  # whatever it was left out for


def test_a_gradient_that_a_hook_has_spoiled_is_told_from_the_module_s_own() -> None:
    event = found("gradient")
    assert "is not finite on rank 1 (data 1)" in event["message"]
    assert "computed again it is: a hook or callback has changed it" in event["message"]


def test_rollback_goes_back_to_the_snapshot() -> None:
    for rank in faults():
        weights = rank["rollback"].weights
        assert weights[4] == weights[2] != weights[3]
        assert weights[5] not in weights[:5]
    assert found("rollback")["action"] == "rollback"


def test_restart_ends_all_ranks_with_the_same_words() -> None:
    first, second = (case["restart"] for case in faults())
    assert first.kind == second.kind == "HealthError"
    assert first.error == second.error and first.error.startswith("restart: nan: step 1, rank 0 (data 0) on ")
    assert found("restart")["kind"] == "failure"


def test_a_token_that_there_is_not() -> None:
    assert found("data")["message"].endswith(f"batch 2: ids: outside of 0 to {VOCABULARY - 1}")
    assert found("data")["rank"] == 1


def test_a_rank_that_computes_wrong_is_named() -> None:
    unsteady = faults()[0]["unsteady"].events
    assert [event["step"] for event in unsteady] == [4, 5]
    assert all(event["rank"] == 1 and event["fault"] == "corruption" for event in unsteady)
    assert "gives two results on rank 1 (data 1)" in unsteady[0]["message"]
    assert found("twice")["rank"] == 1


def test_a_replica_that_differs() -> None:
    assert all(f"{NORM} is not the same on rank 0 (tensor 0)" in case["replica"].error for case in faults())
    assert (found("replica")["fault"], found("replica")["kind"]) == ("corruption", "failure")


def _by_lightning(strategy: str) -> list[Any]:
    """Without a strategy of this package."""
    weights, ranks = Weights(), int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        precision="64-true",
        max_steps=6,
        gradient_clip_val=0.5,
        log_every_n_steps=0,
        callbacks=[weights, HealthMonitor(recompute_every_n_steps=2)],
        default_root_dir=Path("run"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank = int(os.environ["RANK"])
    trainer.fit(Bursting(2, ranks - 1), Rows("nano", 4, 8, ranks, rank, False))
    return [weights.seen, events.read(Path("run"))]


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("auto", 1)])
def test_under_lightning_s_strategies(strategy: str, ranks: int) -> None:
    for weights, written in run_ranks(_by_lightning, ranks, strategy):
        assert weights[3] == weights[2] and len(set(weights)) == 5
        (event,) = written
        assert event["rank"] == ranks - 1 and event["message"].endswith(f"{UP}: finite input, output that is not")


class Standing(L.Callback):
    """One rank stands still: it sleeps, or is stopped."""

    def __init__(self, how: str, rank: int) -> None:
        self.how, self.rank = how, rank

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            if self.how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                time.sleep(1)


def _stands_still(how: str, rank: int) -> None:
    monitor = HealthMonitor(hang_seconds=1.0 if how == "sleeps" else 60.0, silence_seconds=1.0)
    fit("nano", {}, 6, callbacks=[Standing(how, rank), monitor], default_root_dir=Path("run"), batches=8)


@pytest.mark.parametrize(("how", "rank"), [("sleeps", 1), ("stopped", 1), ("stopped", 0)])
def test_a_rank_that_stands_still(how: str, rank: int) -> None:
    """The others end with a code that asks for a restart; the record names who it was."""
    job = server.start(_stands_still, 2, how, rank, env={"TORCH_FR_BUFFER_SIZE": "100"}, grace=3)
    outcomes = job.wait(timeout=25)
    ended = [1 - rank] if how == "stopped" else [0, 1]
    assert [outcomes[r].exit_code for r in ended] == [EXIT_CODE] * len(ended), [o.output for o in outcomes]
    # The link to a stopped rank may be found dead before, which is logged.
    (event,) = [event for event in events.read(Path("run")) if event["fault"] != "link"]
    assert (event["kind"], event["rank"], event["action"]) == ("failure", rank, "restart")
    if how == "sleeps":
        assert event["fault"] == "hang" and "after the start of a batch in step 2" in event["message"]
        report = Path(event["message"].rpartition(": ")[2]).read_text()
        assert "in on_before_backward" in report and report.count("Thread 0x") > 4
        assert "gloo:all_reduce" in report  # the flight record
    else:
        assert event["fault"] == "silent" and "rank" in event["message"]


class Slow(L.Callback):
    """A rank that takes long in its own code, until it is found."""

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1:
            time.sleep(0.2)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 20 == 0 and events.read(Path("run")):
            trainer.should_stop = True


class Soon(HealthMonitor):
    intervals = Intervals(work=1.0)


def _slow() -> list[dict[str, Any]]:
    fit("nano", {}, 400, callbacks=[Slow(), Soon({"leak": "ignore"})], default_root_dir=Path("run"), batches=400)
    return events.read(Path("run"))


def test_a_straggler_is_named() -> None:
    event = run_ranks(_slow, 2, timeout=60)[0][0]
    assert (event["fault"], event["rank"], event["action"]) == ("straggler", 1, "log")
    assert "rank 1 (data 1) on" in event["message"] and "times as long as the median of the others" in event["message"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": {"nans": "log"}}, "there is no kind of fault 'nans'; write one of nan, spike"),
        ({"policy": {"hang": "skip"}}, r"policy\['hang'\]='skip' can't be done; write one of ignore, log, restart"),
        ({"hang_seconds": 0}, "hang_seconds=0: write a number above 0"),
        ({"recompute_every_n_steps": -1}, "recompute_every_n_steps=-1: write a number above 0"),
    ],
)
def test_arguments_that_there_are_not(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HealthMonitor(**arguments)


def test_deepspeed_keeps_its_gradients() -> None:
    trainer: Any = SimpleNamespace(strategy=DeepSpeedStrategy.__new__(DeepSpeedStrategy))
    with pytest.raises(MisconfigurationException, match=r"policy\['nan'\]='skip': DeepSpeed keeps gradients"):
        HealthMonitor({"nan": "skip"}).setup(trainer, L.LightningModule(), "fit")
    monitor = HealthMonitor()
    monitor.setup(trainer, L.LightningModule(), "fit")
    assert monitor.policy["nan"] == monitor.policy["data"] == "log"
