"""Every argument of HybridStrategy: what it takes, and that anything else is refused by name before any rank waits."""

from __future__ import annotations

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bharat import HybridStrategy
from lightning_bharat.plan.find import structural_plan
from lightning_bharat.strategies.schedule import KINDS
from tests.cli.project import QUIET, Project
from tests.cli.test_commands import bad
from tests.plan.models import Nano


def halves(batch: Any, number: int) -> list[Any]:
    return [batch] * number


# Of each argument, values that it takes.
GOOD: dict[str, tuple] = {
    "data_parallel_size": ("auto", 1, 2),
    "tensor_parallel_size": ("auto", 1, 2),
    "pipeline_parallel_size": ("auto", 1, 2),
    "context_parallel_size": (1, 2),
    "expert_parallel_size": (1, 2),
    "replicate_size": (1, 2),
    "num_microbatches": (None, 1, 2),
    "schedule": (*KINDS, "auto"),
    "sequence_parallel": ("auto", True, False),
    "loss_parallel": ("auto", True, False),
    "token_weighted": (True, False),
    "microbatch_fn": (None, halves),
    "plan": (None, {}, {"blocks.*.up": "colwise"}, structural_plan(Nano())),
    "reshard_after_forward": (None, True, False, 1, 2),
    "reduce_dtype": (None, "bfloat16", "float32"),
    "gradient_compression": (None, "int8"),
    "activation_checkpointing": (None, "full", "selective"),
    "offload": (True, False),
    "compile": (True, False, {}, {"backend": "eager"}),
    "weights": (None, "two", "folder", Path("folder"), {}, {"w": torch.ones(1)}, {"blocks.*.up": "colwise"}),
    "save_distributed_checkpoint": (True, False),
    "checkpoint_compression": (None, "zstd"),
    "checkpoint_read_back": (True, False),
    "process_group_backend": (None, "gloo", "nccl", "cpu:gloo,cuda:nccl"),
    "timeout": (None, timedelta(seconds=1)),
}
# Values that people write by mistake; each argument refuses those that are not among its own.
MISTAKES = (
    *(0, -1, 1, 2, 1.5, True, False, None, "", "two", "auto", "Auto", "full", "gloo,", "1F1B", "1f1b", halves, Nano()),
    *([], [2], (2,), {}, {"up": "colwize"}, {"up": 2}, {2: "colwise"}, b"gloo", float("nan")),
    *(timedelta(0), -timedelta(seconds=1), 1800.0, "0:30:00", torch.ones(()), torch.ones(2)),
)


def is_one_of(value: Any, good: tuple) -> bool:
    """Without taking ``True`` for 1."""
    return any(value is g or (type(value) is type(g) and not callable(g) and value == g) for g in good)


def mistakes(name: str) -> list[Any]:
    takes_any = {
        "weights": (str, dict),
        "timeout": (timedelta,),
        "compile": (dict,),
        "microbatch_fn": (type(halves), Nano),
    }
    also = takes_any.get(name, ())
    found = [value for value in MISTAKES if not is_one_of(value, GOOD[name])]
    return [v for v in found if not isinstance(v, also) or (name == "timeout" and v <= timedelta(0))]


def test_no_argument_is_forgotten() -> None:
    assert list(GOOD) == [name for name in inspect.signature(HybridStrategy).parameters]
    for name in GOOD:
        assert mistakes(name)


@pytest.mark.parametrize("name", GOOD)
def test_what_an_argument_takes(name: str) -> None:
    beside = {"replicate_size": 2} if name == "gradient_compression" else {}
    for value in GOOD[name]:
        assert getattr(HybridStrategy(**{name: value, **beside}).options, name) is value


@pytest.mark.parametrize("name", GOOD)
def test_anything_else_is_refused_with_its_name_and_what_to_write(name: str) -> None:
    for value in mistakes(name):
        with pytest.raises(ValueError) as refused:
            HybridStrategy(**{name: value})
        words = str(refused.value)
        assert words.startswith(f"{name}="), (value, words)
        assert "write " in words or f"leave {name} out" in words


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("tensor_parallel", "tensor_parallel_size"),
        ("data_size", "data_parallel_size"),
        ("microbatches", "num_microbatches"),
        ("checkpointing", "activation_checkpointing"),
        ("zzz", "one of data_parallel_size, "),
    ],
)
def test_an_argument_that_there_is_not_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"^HybridStrategy has no argument '{name}'; write .*{nearest}"):
        HybridStrategy(**{name: 2})


def test_a_strategy_that_extends_it_may_have_arguments_of_its_own() -> None:
    class Own(HybridStrategy):
        def __init__(self, flavor: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.flavor = flavor

    assert Own(flavor="mild", tensor_parallel_size=2).options.tensor_parallel_size == 2


def test_by_name_it_has_its_defaults() -> None:
    strategy: Any = L.Trainer(strategy="bharat_hybrid", accelerator="cpu", devices=1, logger=False).strategy
    assert strategy.options == HybridStrategy().options


WORDS: dict[str, tuple[str, ...]] = {
    "tensor_parallel_size": ("0", "-1", "two", "1.5", "null"),
    "schedule": ("2F2B", "null"),
    "sequence_parallel": ("maybe", "2"),
    "offload": ("maybe", "null"),
    "activation_checkpointing": ("some",),
    "replicate_size": ("0", "auto"),
    "plan": ("{blocks.0.up: colwize}", "megatron"),
    "process_group_backend": ("smoke",),
    "timeout": ("soon",),
    "tensor_parallel": ("2",),
}


@pytest.mark.parametrize("name", WORDS)
def test_the_same_on_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path, monkeypatch)
    for value in WORDS[name]:
        words = ["--trainer.strategy=lightning_bharat.HybridStrategy", f"--trainer.strategy.init_args.{name}={value}"]
        said = bad(["fit", *project.classes, *QUIET, "--trainer.devices=2", *words], capsys)
        assert name in said, (value, said)
