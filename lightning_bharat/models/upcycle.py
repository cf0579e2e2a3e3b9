"""A model with experts from a dense one: each expert begins as the dense feed-forward (Komatsuzaki et al., 2022,
https://arxiv.org/abs/2212.05055), so the model begins with the dense one's outputs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_bharat.checkpoints import CheckpointError, StoredTensor

if TYPE_CHECKING:
    from lightning_bharat.models.config import GPTConfig
    from lightning_bharat.models.weights import Weights

_DENSE = re.compile(r"^(?P<mlp>.*layers\.(?P<layer>\d+)\.mlp)\.(gate|up|down)_proj\.weight$")


def is_dense(weights: Weights) -> bool:
    """Whether there are feed-forwards without experts in ``weights``."""
    return any(map(_DENSE.match, weights))


def upcycled(weights: Weights, config: GPTConfig) -> dict[str, Tensor | StoredTensor]:
    """``weights`` of a dense decoder as those of one with the experts of ``config``, by full names.

    All experts of a block are one tensor's memory. Routers are drawn anew, the same on all ranks.

    Raises:
        CheckpointError: with this ``config`` the outputs would not be those of the dense model; names what to write.
    """
    found: dict[str, Tensor | StoredTensor] = {}
    for name, tensor in weights.items():
        match = _DENSE.match(name)
        if match is None:
            found[name] = tensor
        elif match[3] == "gate":  # of the three, one for all
            found |= _experts(weights, match["mlp"], int(match["layer"]), config)
    return found


def _experts(weights: Weights, mlp: str, layer: int, config: GPTConfig) -> dict[str, Tensor]:
    gate, up, down = (_read(weights, f"{mlp}.{kind}_proj.weight") for kind in ("gate", "up", "down"))
    _refuse_other_outputs(config, gate.shape[0])
    assert config.num_experts is not None
    experts = config.num_experts
    draw = torch.Generator().manual_seed(layer)
    scores = torch.randn(experts, gate.shape[1], generator=draw) * config.initializer_range
    made = {
        f"{mlp}.experts.gate_up_proj": torch.cat((gate, up)).expand(experts, -1, -1),
        f"{mlp}.experts.down_proj": down.expand(experts, -1, -1),
        f"{mlp}.gate.weight": scores.to(gate.dtype),
    }
    if config.bias_update_speed is not None:
        made[f"{mlp}.gate.bias_steps"] = torch.zeros(experts, dtype=torch.int64)
    return made


def _read(weights: Weights, name: str) -> Tensor:
    if name not in weights:
        raise CheckpointError(f"{name} is missing: a dense feed-forward has gate_proj, up_proj and down_proj")
    tensor = weights[name]
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def _refuse_other_outputs(config: GPTConfig, inner: int) -> None:
    for name, value, wanted in (
        ("router_choice", config.router_choice, "token"),
        ("moe_intermediate_size", config.expert_size, inner),
        ("num_shared_experts", config.num_shared_experts, None),
        ("norm_topk_prob", config.norm_topk_prob, True),
        ("routed_scaling_factor", config.routed_scaling_factor, 1.0),
    ):
        if value != wanted:
            raise CheckpointError(
                f"a dense model, whose feed-forwards are {inner} wide, begins a model with experts only where these "
                f"compute the same at first: write {name}={wanted}, not {value}"
            )
