"""A dense model that goes on as one with experts: at first it computes the same, then its experts part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from lightning_bharat.checkpoints import CheckpointError
from lightning_bharat.models import GPT, GPTConfig, GPTModule
from tests.experts import SIZES, TrainedGPT, sharpened
from tests.modules import Rows, fit
from tests.ranks import run_ranks

DENSE: dict[str, Any] = {name: SIZES[name] for name in SIZES if "expert" not in name and "moe" not in name}
DENSE["intermediate_size"] = 16
IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def dense(tmp_path: Path) -> tuple[GPT, Path]:
    torch.manual_seed(0)
    model: Any = sharpened(GPT(GPTConfig(**DENSE)))
    file = tmp_path / "dense.safetensors"
    save_file(model.state_dict(), file)
    return model, file


@pytest.mark.parametrize("options", [{}, {"bias_update_speed": 0.01, "scoring_func": "sigmoid"}], ids=str)
def test_it_begins_with_the_dense_outputs(dense: tuple[GPT, Path], options: dict[str, Any]) -> None:
    model, file = dense
    module = GPTModule(GPTConfig(**SIZES, **options), weights=file)
    torch.testing.assert_close(module(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    gates = [layer.mlp.gate.weight for layer in module.model.layers]  # type: ignore[union-attr]
    assert not torch.equal(gates[0], gates[1]) and gates[0].std() > 0
    module(IDS).square().sum().backward()
    grads = module.model.layers[0].mlp.experts.down_proj.grad  # type: ignore[union-attr]
    assert not torch.equal(grads[0], grads[1])  # type: ignore[index]


class Upcycled(TrainedGPT):
    def __init__(self, file: Path) -> None:
        super().__init__(lazy=True)
        self.weights = file


def _losses(file: Path, strategy: dict[str, Any]) -> list[tuple[float, float]]:
    return fit(lambda: Upcycled(file), strategy, steps=3).seen


def test_each_expert_rank_begins_with_its_experts(dense: tuple[GPT, Path]) -> None:
    model, file = dense
    expected = run_ranks(_losses, 1, file, {})[0]
    batch = next(iter(Rows("nano", 8, 4, 1, 0, False)))
    first = F.cross_entropy(model.double()(batch["ids"]).flatten(0, 1), batch["labels"].flatten())
    assert expected[0][0] == pytest.approx(first.item(), abs=1e-9)
    for found in run_ranks(_losses, 2, file, {"expert_parallel_size": 2}):
        torch.testing.assert_close(torch.tensor(found).double(), torch.tensor(expected).double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moe_intermediate_size": 8}, "are 16 wide, .* write moe_intermediate_size=16, not 8"),
        ({"num_shared_experts": 1}, "write num_shared_experts=None, not 1"),
        ({"norm_topk_prob": False}, "write norm_topk_prob=True, not False"),
        ({"routed_scaling_factor": 2.5}, "write routed_scaling_factor=1.0, not 2.5"),
        ({"hidden_size": 64, "head_dim": 8}, "embed_tokens.weight is"),
    ],
    ids=str,
)
def test_what_would_begin_otherwise_is_refused(dense: tuple[GPT, Path], options: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        GPTModule(GPTConfig(**{**SIZES, **options}), weights=dense[1])


def test_a_part_of_a_feed_forward_is_refused(dense: tuple[GPT, Path], tmp_path: Path) -> None:
    kept = {name: t for name, t in dense[0].state_dict().items() if name != "layers.1.mlp.up_proj.weight"}
    save_file(kept, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        GPTModule(GPTConfig(**SIZES), weights=tmp_path / "part.safetensors")
