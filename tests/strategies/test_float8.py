"""Products in float8, emulated on CPU ranks: what float8 does to training, not the kernels, which need a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_bharat import Float8Precision
from tests.modules import Result, fit
from tests.ranks import RanksFailed, run_ranks


def _trained(strategy: dict[str, Any] | None, recipe: str | None) -> Result:
    plugin = {"precision": "bf16-mixed"}
    if recipe is not None:
        plugin = {"precision": None, "plugins": [Float8Precision(recipe, emulate=True)]}
    return fit("gpt", strategy, 6, **plugin)


@pytest.mark.parametrize(
    ("strategy", "recipe"),
    [({}, "tensorwise"), ({"pipeline_parallel_size": 2, "num_microbatches": 2}, "rowwise")],
    ids=str,
)
def test_training_is_near_that_in_bfloat16(strategy: dict[str, Any], recipe: str) -> None:
    exact = run_ranks(_trained, 1, None, None)[0]
    for found in run_ranks(_trained, 2, strategy, recipe):
        losses = [torch.tensor(run.seen)[:, 0] for run in (found, exact)]
        assert 0 < (losses[0] - losses[1]).abs().max() < 0.02
        assert all(weight.dtype == torch.float32 for weight in found.weights.values())
        for name, gradient in exact.gradients.items():
            assert (found.gradients[name] - gradient).norm() < 0.2 * gradient.norm(), name


def test_linears_of_blocks_are_changed_and_nothing_else() -> None:
    from torchao.float8.float8_linear import Float8Linear

    from tests.modules import gpt

    plugin, module = Float8Precision(emulate=True), gpt()
    names = list(module.state_dict())
    for _ in range(2):  # a second fit changes nothing more
        plugin.convert_module(module)
    changed = {name for name, part in module.named_modules() if isinstance(part, Float8Linear)}
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert changed == {f"layers.{i}.{kind}" for i in range(2) for kind in kinds}  # keys and values are 24 wide
    assert list(module.state_dict()) == names


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_without_float8_is_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match='no CUDA device is here, .* write Trainer.precision="bf16-mixed"'
    ):
        Float8Precision()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    found, exact = (run_ranks(partial(_on_gpu, recipe), 1)[0] for recipe in ("tensorwise", None))
    assert 0 < abs(found - exact) < 0.02


def _on_gpu(recipe: str | None) -> float:
    plugin = (
        {"precision": "bf16-mixed"} if recipe is None else {"plugins": [Float8Precision(recipe)], "precision": None}
    )
    return fit("gpt", {}, 6, accelerator="gpu", **plugin).seen[-1][0]


def test_refused() -> None:
    with pytest.raises(ValueError, match="recipe='mxfp8': write one of tensorwise, rowwise"):
        Float8Precision("mxfp8", emulate=True)
    with pytest.raises(MisconfigurationException, match="Linear has no nn.Linear in repeated blocks"):
        Float8Precision(emulate=True).convert_module(nn.Linear(16, 16))
    with pytest.raises(RanksFailed, match="Float8Precision with tensor_parallel_size=2: scales"):
        run_ranks(_trained, 2, {"tensor_parallel_size": 2}, "tensorwise")
