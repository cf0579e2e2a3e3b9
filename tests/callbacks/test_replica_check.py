"""One bit that changes on one rank is found by name; ranks that are right are never accused."""

from __future__ import annotations

import os
import warnings
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_bharat.callbacks import ReplicaCheck, ReplicaError
from lightning_bharat.cli import main
from lightning_bharat.strategies.data import local
from lightning_bharat.strategies.digest import CHUNK, digest
from tests.cli.project import QUIET, Project
from tests.experts import TrainedGPT
from tests.modules import Rows, Trained, fit
from tests.ranks import run_ranks

TENSOR: dict[str, Any] = {"tensor_parallel_size": 2}
STAGES: dict[str, Any] = {"pipeline_parallel_size": 2}
NORM = "model.layers.1.norm1.weight"
TIED = "model.model.model.embed_tokens.weight"
EXPERT = "model.layers.1.mlp.experts.down_proj"
NO_MAJORITY = ", and no value is that of most of them"


class Counting(Trained):
    """With a buffer that hooks change alike on all ranks."""

    rows_of = "nano"

    def __init__(self) -> None:
        super().__init__("nano")
        self.register_buffer("seen_batches", torch.zeros(3))

    def on_before_zero_grad(self, *_: Any) -> None:
        self.seen_batches += 1


class Spoil(L.Callback):
    """Changes one bit of a weight, a buffer or an optimizer's state on one rank after a step."""

    def __init__(self, name: str, rank: int, step: int, bit: int = 0) -> None:
        self.name, self.rank, self.step, self.bit = name, rank, step, bit

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            key, _, of = self.name.rpartition(" of ")
            tensor = {**dict(module.named_parameters()), **dict(module.named_buffers())}[of]
            words = local(trainer.optimizers[0].state[tensor][key] if key else tensor).detach().view(torch.int64)
            words.view(-1)[-1] ^= 1 << self.bit


CASES: dict[str, tuple[int, dict[str, Any], Any, str, int, str]] = {
    # ranks, strategy, module, what is spoiled and where, what is said
    "data 2": (
        2,
        {},
        Counting,
        "seen_batches",
        1,
        f"buffer seen_batches is not the same on rank 0 (data 0), rank 1 (data 1){NO_MAJORITY}.",
    ),
    "tensor 2": (2, TENSOR, "nano", NORM, 1, f"{NORM} is not the same on rank 0 (tensor 0), rank 1 (tensor 1)"),
    "tensor 4": (
        4,
        {"tensor_parallel_size": 4},
        Counting,
        f"exp_avg of {NORM}",
        2,
        f"rank 2 (tensor 2) has another optimizer state exp_avg of {NORM} than rank 0 (tensor 0), rank 1 (tensor 1), "
        "rank 3 (tensor 3).",
    ),
    "data 2 × tensor 2": (
        4,
        TENSOR,
        "gpt",
        "model.norm.weight",
        3,
        f"model.norm.weight is not the same on rank 2 (data 1, tensor 0), rank 3 (data 1, tensor 1){NO_MAJORITY}.",
    ),
    "context 2": (
        2,
        {"context_parallel_size": 2},
        "nano",
        NORM,
        1,
        f"{NORM} is not the same on rank 0 (context 0), rank 1 (context 1){NO_MAJORITY}.",
    ),
    "replicate 2 × shard 2": (
        4,
        {"replicate_size": 2},
        "nano",
        "model.layers.0.up.weight",
        0,
        f"model.layers.0.up.weight is not the same on rank 0 (data 0), rank 2 (data 2){NO_MAJORITY}.",
    ),
    "replicate 3": (
        3,
        {"replicate_size": 3},
        "stack",
        "model.net.0.bias",
        0,
        "rank 0 (data 0) has another model.net.0.bias than rank 1 (data 1), rank 2 (data 2).",
    ),
    "pipeline 2, tied": (
        2,
        STAGES,
        "qwen3",
        TIED,
        0,
        f"{TIED} is not the same on rank 0 (pipeline 0), rank 1 (pipeline 1){NO_MAJORITY}.",
    ),
    "data 2 × pipeline 2, tied": (
        4,
        STAGES,
        "qwen3",
        TIED,
        3,
        f"{TIED} is not the same on rank 1 (pipeline 0, data 1), rank 3 (pipeline 1, data 1){NO_MAJORITY}.",
    ),
}


class KeepPlan(L.Callback):
    """Of the first of several runs, for the others: a proof takes longer than three steps."""

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.plan = trainer.strategy.plan  # type: ignore[attr-defined]


def _spoiled(ranks: int) -> dict[str, str]:
    """What is said, by case. First two runs in which nothing is spoiled, then one where something is, after its second
    step."""
    said = {}
    for name, (on, strategy, module, what, rank, _) in CASES.items():
        if on == ranks:
            options: dict[str, Any] = {"gradient_clip_val": 0.3, "batch": 12, "limit_val_batches": 1}
            keep = KeepPlan()
            fit(module, strategy, 4, accumulate_grad_batches=2, callbacks=[ReplicaCheck(1), keep], **options)
            fit(module, strategy, 2, precision="bf16-mixed", callbacks=[ReplicaCheck(1)], **options)
            known = {**strategy, "plan": keep.plan}
            said[name] = _refusal(module, known, 3, callbacks=[Spoil(what, rank, 2), ReplicaCheck(2)], **options)
    return said


def _refusal(*args: Any, **options: Any) -> str:
    try:
        fit(*args, **options)
    except ReplicaError as error:
        return str(error)
    return "nothing was found"


@cache
def _on(ranks: int) -> list[dict[str, str]]:
    return run_ranks(_spoiled, ranks, ranks, timeout=90)


@pytest.mark.parametrize("name", CASES)
def test_one_bit(name: str) -> None:
    ranks, *_, words = CASES[name]
    first, *others = (said[name] for said in _on(ranks))
    assert first.startswith(f"after step 2, {words}"), first
    assert all(other == first for other in others)
    assert "They were the same at step 0." in first and "more differ" not in first


def _experts() -> str:
    module, strategy = partial(TrainedGPT, bias_update_speed=0.05), {**TENSOR, "expert_parallel_size": 2}
    fit(module, strategy, 3, callbacks=[ReplicaCheck(1)])
    return _refusal(module, strategy, 3, callbacks=[Spoil(EXPERT, 3, 2), ReplicaCheck(1)])


def test_experts() -> None:
    """Experts of data ranks are others, and those of their tensor ranks the same."""
    found = run_ranks(_experts, 4)[0]
    assert found.startswith(f"after step 2, {EXPERT} is not the same on rank 2 (data 1, tensor 0), rank 3 (data 1, ")


def _at_the_end(cases: list[tuple[int, int]]) -> list[str]:
    state = f"exp_avg of {NORM}"
    return [
        _refusal("nano", TENSOR, 5, callbacks=[Spoil(state, 1, step, bit=52), ReplicaCheck(every)])
        for step, every in cases
    ]


def test_when_it_looks() -> None:
    """A state that has changed changes its weight in the next step, and both are named."""
    found, at_the_end = run_ranks(_at_the_end, 2, [(3, 2), (5, 100)])[0]
    assert found.startswith(f"after step 4, {NORM} is not the same") and "They were the same at step 2." in found
    assert f" (1 more differ: optimizer state exp_avg of {NORM})" in found
    assert at_the_end.startswith("after step 5, ")


def _ddp(spoil: bool) -> str:
    callbacks = [Spoil(NORM, 1, 2) if spoil else L.Callback(), ReplicaCheck(1)]
    trainer = L.Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        precision="64-true",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    try:
        trainer.fit(Counting(), Rows("nano", 4, 3, 2, int(os.environ["RANK"]), False))
    except ReplicaError as error:
        return str(error)
    return "nothing was found"


def test_ddp() -> None:
    assert run_ranks(_ddp, 2, False) == ["nothing was found"] * 2
    first, second = run_ranks(_ddp, 2, True)
    assert first.startswith(f"after step 2, {NORM} is not the same on rank 0, rank 1") and first == second


def _nothing() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        fit("nano", {}, 2, callbacks=[ReplicaCheck(1)])
    return [str(warning.message) for warning in caught]


def test_where_there_are_no_copies_it_says_so() -> None:
    said, _ = run_ranks(_nothing, 2)
    assert any(words.startswith("ReplicaCheck has nothing to compare: each tensor is on one rank") for words in said)


def test_other_strategies_are_refused() -> None:
    trainer: Any = SimpleNamespace(world_size=2, strategy=FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="which ranks hold the same under FSDPStrategy"):
        ReplicaCheck().setup(trainer, L.LightningModule(), "fit")


@pytest.mark.parametrize("wrong", [0, -3, 1.5, True, "2"])
def test_steps_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match="every_n_train_steps=.*: write a whole number from 1 up"):
        ReplicaCheck(wrong)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch)
    check = [
        "--trainer.callbacks+=lightning_bharat.callbacks.ReplicaCheck",
        "--trainer.callbacks.every_n_train_steps=2",
    ]
    words = [*QUIET, "--trainer.max_epochs=1", "--trainer.enable_checkpointing=false", *check]
    assert main(["fit", *project.classes, *words]) == 0
    (saved,) = yaml.safe_load(Path("config.yaml").read_text())["trainer"]["callbacks"]
    assert saved["class_path"].endswith("ReplicaCheck") and saved["init_args"] == {"every_n_train_steps": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_digest_sees_each_element(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 4, dtype=dtype)
    whole = digest(tensor)
    found = {int(whole)}
    for i in range(12):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[i * dtype.itemsize] ^= 1
        found.add(int(digest(changed)))
        assert torch.equal(digest(changed.T.contiguous().T), digest(changed))
    assert len(found) == 13 and torch.equal(digest(tensor.clone()), whole)
    shifted = torch.zeros(13, dtype=dtype)[1:]  # not where a word of eight bytes begins
    assert torch.equal(digest(shifted), whole)


def test_digest_of_many_elements_and_of_none() -> None:
    tensor = torch.arange(2 * CHUNK + 3, dtype=torch.int32)
    exchanged = torch.cat([tensor[CHUNK:], tensor[:CHUNK]])
    last = tensor.clone()
    last[-1] ^= 1
    assert len({int(digest(t)) for t in (tensor, exchanged, last, torch.empty(0))}) == 4
