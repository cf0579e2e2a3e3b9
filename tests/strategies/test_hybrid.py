"""An unchanged module over data ranks is one process: losses, gradients, norms, logged values, in float64 to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.modules import zoo
from tests.strategies.together import Run, Together

STEPS = {"steps": 6}  # an epoch, with its validation, and half of another
CLIPPED: dict[str, Any] = {**STEPS, "gradient_clip_val": 0.5, "last": 2}
TENSOR: dict[str, Any] = {"tensor_parallel_size": 2}
OPTIONS: list[dict[str, Any]] = [
    {"reshard_after_forward": False},
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
    {"offload": True},
]
ALONE = {f"{name} {options}": Run(name, options, CLIPPED) for name in ("nano", "qwen3") for options in OPTIONS}


def on_both(module: str) -> Run:
    more = {} if module == "stack" else {"activation_checkpointing": "full", "token_weighted": True}
    return Run(module, {**TENSOR, **more}, {**STEPS, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2})


def by_tokens(accumulate: int, **strategy: Any) -> Run:
    """One process sees each window as one batch."""
    options = {"ragged": True, "accumulate_grad_batches": accumulate, "batches": 4 * accumulate}
    whole = {"ragged": True, "batch": 8 * accumulate}
    return Run("nano", {**strategy, "token_weighted": True}, {**STEPS, **options}, {**STEPS, **whole})


BY_TOKENS = {f"accumulate {n}": n for n in (1, 2)}
VALUE = {**STEPS, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
DATA_2 = Together(
    2,
    {name: Run(name, {}, CLIPPED) for name in zoo()} | ALONE | {name: by_tokens(n) for name, n in BY_TOKENS.items()},
)
TENSOR_2 = Together(
    2, {name: Run(name, TENSOR, CLIPPED) for name in zoo()} | {"value clipping": Run("nano", TENSOR, VALUE)}
)
BOTH = Together(
    4,
    {name: on_both(name) for name in zoo()}
    | {"copies": Run("nano", {"replicate_size": 2}, {**STEPS, "gradient_clip_val": 0.5})}
    | {name: by_tokens(n, **TENSOR) for name, n in BY_TOKENS.items()},
)


@pytest.mark.parametrize("module", zoo())
def test_two_data_ranks_equal_one_process(module: str) -> None:
    DATA_2.check(module)


@pytest.mark.parametrize("name", ALONE)
def test_each_option_alone(name: str) -> None:
    DATA_2.check(name)


@pytest.mark.parametrize("module", zoo())
def test_two_tensor_ranks_equal_one_process(module: str) -> None:
    TENSOR_2.check(module)


@pytest.mark.parametrize("module", zoo())
def test_data_and_tensor_ranks_equal_one_process(module: str) -> None:
    BOTH.check(module)


def test_copies_of_shards() -> None:
    BOTH.check("copies")


def test_value_clipping() -> None:
    TENSOR_2.check("value clipping")


@pytest.mark.parametrize("on", [DATA_2, BOTH], ids=["data 2", "data 2 × tensor 2"])
@pytest.mark.parametrize("name", BY_TOKENS)
def test_ragged_labels_weighted_by_tokens(name: str, on: Together) -> None:
    """Weights equal those of one process that sees each window as one batch; logged losses are means of means."""
    expected = on.whole(name)
    for found in on.found(name):
        for key, weight in expected.weights.items():
            torch.testing.assert_close(found.weights[key], weight, rtol=0, atol=1e-7, msg=key)
        norms = [norm for _, norm in found.seen][BY_TOKENS[name] - 1 :: BY_TOKENS[name]]
        assert norms == pytest.approx([norm for _, norm in expected.seen], rel=1e-9)
