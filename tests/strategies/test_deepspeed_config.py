"""DeepSpeed's config: from arguments, a dict or a file, and what is refused where it contradicts the Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_bharat.strategies.deepspeed_config import ConfigError, DeepSpeedConfig
from tests.cli.project import QUIET, Project
from tests.cli.test_commands import bad


def completed(
    config: Any = None,
    ranks: int = 2,
    precision: str = "32-true",
    batch_size: int = 4,
    arguments: dict[str, Any] | None = None,
    **trainer: Any,
) -> dict[str, Any]:
    """The config that an engine gets in a fit."""
    loop = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **trainer)
    loop.state.fn = TrainerFn.FITTING
    loader = DataLoader(range(64), batch_size=batch_size)
    loop.fit_loop._data_source = SimpleNamespace(instance=loader, name="train_dataloader", dataloader=lambda: loader)
    made = DeepSpeedConfig((arguments or {}).pop("stage", None), config, arguments or {})
    made.complete(loop, ranks, precision)
    return made.values


def test_from_arguments_and_the_trainer() -> None:
    found = completed(
        arguments={"stage": 3, "offload_optimizer": True}, accumulate_grad_batches=2, gradient_clip_val=0.5
    )
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert found["zero_force_ds_cpu_optimizer"] is False
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.5
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["train_batch_size"] == 16


def test_from_a_file_with_arguments_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": "auto", "steps_per_print": 7}))
    found = completed(file, arguments={"reduce_bucket_size": 1000}, gradient_clip_val=1.0)
    assert found["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert found["gradient_clipping"] == 1.0
    assert found["steps_per_print"] == 7


def test_the_dict_of_a_caller_stays_as_it_is() -> None:
    config = {"zero_optimization": {"stage": 2}}
    completed(config)
    assert config == {"zero_optimization": {"stage": 2}}


def test_clipping_may_be_the_config_s_alone() -> None:
    assert completed({"gradient_clipping": 0.25})["gradient_clipping"] == 0.25


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (
            {"gradient_accumulation_steps": 4},
            {"accumulate_grad_batches": 2},
            ["gradient_accumulation_steps is 4", "accumulate_grad_batches=2", "leave gradient_accumulation_steps out"],
        ),
        (
            {"gradient_clipping": 1.0},
            {"gradient_clip_val": 0.5},
            ["gradient_clipping is 1.0", "gradient_clip_val=0.5", "leave gradient_clipping out"],
        ),
        (
            {"train_micro_batch_size_per_gpu": 8},
            {},
            ["train_micro_batch_size_per_gpu is 8", "batch_size=4", "leave train_micro_batch_size_per_gpu out"],
        ),
        (
            {"train_batch_size": 32},
            {"accumulate_grad_batches": 2},
            [
                "train_batch_size is 32",
                "4 rows × 2 accumulated batches × 2 ranks makes it 16",
                "leave train_batch_",
            ],
        ),
        (
            {"bf16": {"enabled": True}},
            {},
            ["bf16.enabled is True", "precision='32-true'", 'Trainer(precision="bf16-mixed")'],
        ),
        (
            {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}},
            {"precision": "bf16-mixed"},
            ["bf16.enabled is False", "precision='bf16-mixed'", 'Trainer(precision="32-true")'],
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            {},
            ["optimizer=", "AdamW", "configure_optimizers", "leave optimizer out"],
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, {}, ["reduce_bucket_size is", '"auto"']),
        (
            {"zero_optimization": {"stage": 3}},
            {"arguments": {"stage": 1}},
            ["zero_optimization.stage is 3 in the DeepSpeed config and 1", "leave one of them out"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
            {"arguments": {"offload_optimizer": True}},
            ["zero_optimization.offload_optimizer.device is 'none'", "'cpu'"],
        ),
        ({}, {"precision": "bf16-true"}, ["stage 0 with precision='bf16-true'", "write stage=1"]),
        ({"zero_optimization": {"stage": 4}}, {}, ["zero_optimization.stage=4", "0, 1, 2 or 3"]),
        ({"zero_optimization": True}, {}, ["zero_optimization=True", '{"stage": 2}']),
        (None, {"arguments": {"stage": 5}}, ["stage=5", "0, 1, 2 or 3"]),
        (None, {"arguments": {"stage": 2, "offload_parameters": True}}, ["offload_parameters", "stage 2", "stage=3"]),
        (None, {"arguments": {"stage": 0, "offload_optimizer": True}}, ["offload_optimizer", "stage 0", "stage=1"]),
        ("nowhere.json", {}, ["config='nowhere.json'", "no such file"]),
    ],
)
def test_refused(config: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        completed(config, **options)
    for word in words:
        assert word in str(refused.value)


def test_files_that_hold_no_config(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"broken.json' is not JSON"):
        completed(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match=r"list.json' holds a list"):
        completed(tmp_path / "list.json")


def test_unknown_arguments_name_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"no argument 'offload_optimiser'; write offload_optimizer"):
        DeepSpeedConfig(None, None, {"offload_optimiser": True})


def test_the_same_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on stdout that it has found no other
    project = Project(tmp_path, monkeypatch)
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}}))
    for words, said in (
        (["--trainer.strategy.stage=7"], "stage=7: write 0, 1, 2 or 3"),
        (["--trainer.strategy.offload_parameters=true"], "offload_parameters with ZeRO stage 2"),
        (
            ["--trainer.strategy.config=ds.json", "--trainer.strategy.stage=1"],
            "stage is 3 in the DeepSpeed config and 1",
        ),
        (["--trainer.strategy.config=ds.json", "--trainer.strategy.reduce_bucket_size=6"], "config and 6 by"),
    ):
        strategy = "--trainer.strategy=lightning_bharat.DeepSpeedStrategy"
        assert said in bad(["fit", *project.classes, *QUIET, strategy, *words], capsys)
