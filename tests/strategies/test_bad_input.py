"""What a person may get wrong, through the Trainer: it ends on every rank in seconds, in words that say what to write.

Loaders that do not fit together are in test_loaders.py, errors in loaders and callbacks in test_errors.py, damaged
checkpoints in tests/checkpoints/test_broken.py.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bharat import HybridStrategy
from tests.modules import Rows, Trained
from tests.plan.models import FusedBlock, Nano
from tests.plan.test_refusals import NormBetween, Softmax
from tests.ranks import fresh_ranks, run_ranks
from tests.strategies import launched
from tests.strategies.test_errors import LIMIT, QUIET, WORDS, ends, fail, printed

# ---- layouts, plans and checkpoints: the same words on all ranks

UP_DOWN = {"model.layers.*.up": "colwise", "model.layers.*.down": "rowwise"}
ATTENTION = {"model.layers.*.qkv": "colwise", "model.layers.*.out": "rowwise"}


class Given(Trained):
    def __init__(self, model: nn.Module) -> None:
        super().__init__("nano")
        self.model = model


def three_heads(width: int) -> nn.Module:
    return FusedBlock(width, 3)


def narrow() -> nn.Module:
    return Nano(width=24)


def shallow() -> nn.Module:
    return Nano(depth=2)


def huge() -> nn.Module:
    with torch.device("meta"):
        return Nano(width=2**24, depth=2)  # petabytes


def other_on_one_rank() -> nn.Module:
    return Nano(depth=2 + int(os.environ["RANK"]))


@dataclass(frozen=True)
class Case:
    """``words``: what the error says, or a pattern of it."""

    words: str
    arguments: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = Nano
    checkpoint: str = ""


def tensor(**arguments: Any) -> dict[str, Any]:
    return {"tensor_parallel_size": 2, **arguments}


def of(block: Callable) -> Callable[[], nn.Module]:
    return lambda: Nano(block)


HEADS = "LayoutError: tensor_parallel_size=2 does not divide the 3 heads of qkv; sizes that do: 1, 3"
NOT_RIGHT = "PlanError: plan: the cut of model.layers.0: up → down is not right"
NAME = "PlanError: plan={'model.layer.*.up': 'colwise'}: no module has this name; nearest: model.layers.*.up"
OTHER = "CheckpointError: This is a checkpoint of another model: "

CASES = {
    "data 3 of 2": Case(
        'LayoutError: data_parallel_size=3 does not divide the 2 devices; write data_parallel_size="auto"',
        {"data_parallel_size": 3},
    ),
    "tensor 3 of 2": Case(
        "LayoutError: tensor_parallel_size=3 does not divide the 2 devices; sizes that do: 1, 2",
        {"tensor_parallel_size": 3},
    ),
    "pipeline 3 of 2": Case(
        "LayoutError: pipeline_parallel_size=3 does not divide the 2 devices; sizes that do: 1, 2",
        {"pipeline_parallel_size": 3},
    ),
    "too many": Case(
        "LayoutError: data_parallel_size=2 × tensor_parallel_size=2 = 4 ranks, and there are 2 devices; "
        'write data_parallel_size="auto" or devices=4',
        tensor(data_parallel_size=2),
    ),
    "tensor 2 in 2 stages": Case(
        "LayoutError: tensor_parallel_size=2 does not divide the 1 devices of each of the 2 pipeline stages; "
        "sizes that do: 1",
        tensor(pipeline_parallel_size=2),
    ),
    "copies": Case(
        "LayoutError: replicate_size=3 does not divide the 2 data ranks; sizes that do: 1, 2", {"replicate_size": 3}
    ),
    "heads": Case(HEADS, tensor(), of(three_heads)),
    "heads of a plan": Case(HEADS, tensor(plan=ATTENTION), of(three_heads)),
    "a plan's name": Case(NAME, tensor(plan={"model.layer.*.up": "colwise"})),
    "a plan's name, not used": Case(NAME, {"plan": {"model.layer.*.up": "colwise"}}),
    "a plan's style": Case(
        "ValueError: plan={'model.layers.*.up': 'colwize'}: write a ModelPlan, None, or a dict of .*colwise",
        tensor(plan={"model.layers.*.up": "colwize", "model.layers.*.down": "rowwise"}),
    ),
    "one end of a plan": Case(
        "PlanError: plan: 'model.layers.0.up' is named as a column, .*; name both ends",
        tensor(plan={"model.layers.*.up": "colwise"}),
    ),
    "numbers of a block": Case(
        rf"{NOT_RIGHT}: output 0 differs by \d\.\de-\d\d of its largest value. Leave these names out of plan",
        tensor(plan=UP_DOWN),
        of(Softmax),
    ),
    "shapes of a block": Case(
        rf"{NOT_RIGHT}: .*normalized_shape=\[96\].*48\]. Leave these names out of plan",
        tensor(plan=UP_DOWN),
        of(NormBetween),
    ),
    "more than a host has": Case(
        rf"LayoutError: {os.uname().nodename} has \S+ GB for each of its ranks, and Layout\(tensor=2\) needs "
        r"\S+ GB of each for weights and gradients alone; write a larger tensor_parallel_size",
        tensor(),
        huge,
    ),
    "other models": Case(
        "ValueError: the module has other parameters on some ranks than on rank 0; build the same model on every rank",
        model=other_on_one_rank,
    ),
    "missing": Case(
        "CheckpointError: there is no .*/none.ckpt; in .* are corrupt.ckpt, saved.ckpt", checkpoint="none.ckpt"
    ),
    "missing folder": Case(
        "CheckpointError: there is no .*/none/none.ckpt; in .* are corrupt.ckpt, saved.ckpt",
        checkpoint="none/none.ckpt",
    ),
    "corrupt": Case(
        "CheckpointError: .*/corrupt.ckpt is damaged, or not a file of torch.save", checkpoint="corrupt.ckpt"
    ),
    "another width": Case(
        rf"{OTHER}model.*weight is \[\d+, \d+\] in the checkpoint and \[\d+, \d+\] here",
        model=narrow,
        checkpoint="saved.ckpt",
    ),
    "another depth": Case(f"{OTHER}it has .*layers.2.*, unknown here", tensor(), shallow, "saved.ckpt"),
}


def refused(case: Case, folder: str) -> str:
    try:
        trainer = L.Trainer(
            strategy=HybridStrategy(**case.arguments),
            accelerator="cpu",
            devices=int(os.environ["WORLD_SIZE"]),
            precision="64-true",
            max_steps=1,
            num_sanity_val_steps=0,
            **QUIET,
        )
        checkpoint = case.checkpoint and f"{folder}/{case.checkpoint}"
        trainer.fit(Given(case.model()), Rows("nano", 4, 1, 1, 0, False), ckpt_path=checkpoint or None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def all_cases(folder: str) -> dict[str, str]:
    trainer = L.Trainer(
        strategy=HybridStrategy(), accelerator="cpu", devices=2, precision="64-true", max_steps=1, **QUIET
    )
    trainer.fit(Given(Nano()), Rows("nano", 4, 1, 1, 0, False))
    trainer.save_checkpoint(f"{folder}/saved.ckpt")
    Path(folder, "corrupt.ckpt").write_text("hello")
    return {name: refused(case, folder) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(all_cases, 2, str(tmp_path_factory.mktemp("checkpoints")), timeout=100)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_refuse_it_in_words_that_say_what_to_write(name: str, refusals: list[dict[str, str]]) -> None:
    words, other = (seen[name] for seen in refusals)
    assert words == other
    expected = CASES[name].words
    assert words.startswith(expected) or re.match(expected, words, re.DOTALL), words


def train_with(name: str) -> None:
    print(f"failing at {time.monotonic()}")
    case = CASES[name]
    trainer = L.Trainer(strategy=HybridStrategy(**case.arguments), accelerator="cpu", devices=2, max_steps=1, **QUIET)
    trainer.fit(Given(case.model()), Rows("nano", 4, 1, 1, 0, False))


def test_a_refusal_of_all_ranks_is_printed_once_and_ends_them() -> None:
    outcomes = ends(train_with, 2, "a plan's name")
    assert [outcome.error for outcome in outcomes] == ["PlanError"] * 2
    assert printed(outcomes, "no module has this name") == printed(outcomes, "Traceback") == 1


# ---- a rank that raises, in every place

LAYOUTS = {"data": {}, "tensor": {"tensor_parallel_size": 2}, "pipeline": {"pipeline_parallel_size": 2}}
PLACES = {
    "configure_model": "data",
    "configure_optimizers": "tensor",
    "collate": "tensor",
    "training_step": "pipeline",
    "backward hook": "data",
    "optimizer step": "data",
    "validation_step": "pipeline",
    "on_save_checkpoint": "tensor",
    "on_fit_end": "data",
}


class Failing(launched.Module):
    """Fails on the last rank, at one place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def at(self, place: str) -> None:
        if place == self.place and os.environ["RANK"] == "1":
            fail("raise")

    def configure_model(self) -> None:
        self.at("configure_model")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.at("training_step")
        loss = super().training_step(batch, batch_idx)
        if self.place == "backward hook":
            loss.register_hook(lambda grad: self.at("backward hook"))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.at("validation_step")
        self.log("val", super().training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        self.at("configure_optimizers")
        return Failing.Stepping(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.at("on_save_checkpoint")

    def on_fit_end(self) -> None:
        self.at("on_fit_end")

    class Stepping(torch.optim.SGD):
        def __init__(self, module: Failing) -> None:
            super().__init__(module.parameters(), lr=0.1)
            self.before = lambda: module.at("optimizer step")

        def step(self, closure: Any = None) -> Any:
            self.before()
            return super().step(closure)


def fail_at(place: str, folder: str) -> None:
    trainer = L.Trainer(
        strategy=HybridStrategy(**LAYOUTS[PLACES[place]]),
        accelerator="cpu",
        devices=2,
        max_steps=2,
        val_check_interval=1,
        callbacks=[ModelCheckpoint(folder)],
        num_sanity_val_steps=0,
        **{**QUIET, "enable_checkpointing": True},
    )
    module = Failing(place)

    def collate(rows: list[Tensor]) -> Tensor:
        module.at("collate")
        return torch.stack(rows)

    loader = DataLoader(torch.randn(8, 8), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_raises_ends_both_wherever_it_does(place: str, tmp_path: Path) -> None:
    first, second = outcomes = ends(fail_at, 2, place, str(tmp_path))
    assert second.error == "LookupError"
    assert printed(outcomes, WORDS) == second.output.count(WORDS) == 1
    assert len(re.findall(r"rank 0.* ends: rank 1.* raised LookupError and prints it", first.output)) == 1
    assert "Traceback" not in first.output


SCRIPT = """
import os, time
import lightning as L
from tests.strategies.launched import WORDS, Module
class Failing(Module):
    def __init__(self):
        super().__init__()
        if os.environ.get("LOCAL_RANK") == "1":
            print(f"failing at {time.monotonic()}", flush=True)
            raise LookupError(WORDS)
module = Failing()
L.Trainer(strategy="bharat_hybrid", accelerator="cpu", devices=2, max_steps=1).fit(module, [])
"""


@pytest.mark.slow
@pytest.mark.timeout(240)  # two cold starts, one after the other
def test_a_rank_that_raises_before_there_is_a_process_group_ends_both(tmp_path: Path) -> None:
    """Where Lightning starts ranks, it ends them; torchrun does as well, and Slurm with ``--kill-on-bad-exit``."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (outcome,) = fresh_ranks([str(tmp_path / "script.py")], timeout=200)
    began = float(re.findall(r"failing at (\S+)", outcome.output)[0])
    assert time.monotonic() - began < LIMIT + 10  # Lightning looks every five seconds, and then has to end both
    assert outcome.exit_code and not outcome.timed_out
    assert outcome.output.count(launched.WORDS) == 1
