"""Private names of Lightning's DeepSpeedStrategy: its config, and how its ranks meet."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from lightning.fabric.strategies.deepspeed import _format_precision_config
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

# Of Lightning's DeepSpeedStrategy, with their defaults. "config" and "stage" are arguments of its child.
DEEPSPEED_ARGUMENTS = {
    name: parameter.default
    for name, parameter in signature(DeepSpeedStrategy.__init__).parameters.items()
    if name not in ("self", "config", "stage")
}
_OF_ZERO = ["stage", "contiguous_gradients", "overlap_comm", "allgather_partitions", "reduce_scatter"]
_OF_ZERO += ["allgather_bucket_size", "reduce_bucket_size", "sub_group_size"]


def is_of_config(argument: str) -> bool:
    """Whether an argument of DeepSpeedStrategy becomes a part of DeepSpeed's config."""
    return argument in _OF_ZERO or argument in signature(DeepSpeedStrategy._create_default_config).parameters


def deepspeed_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The config that Lightning's DeepSpeedStrategy makes of its arguments; defaults for those that are left out."""
    every = {"stage": 2, **DEEPSPEED_ARGUMENTS, **arguments}
    known = {name: value for name, value in every.items() if is_of_config(name)}
    return DeepSpeedStrategy._create_default_config(None, **known)  # type: ignore[arg-type]


def add_precision(config: dict[str, Any], precision: str, strategy: DeepSpeedStrategy) -> None:
    """Ask DeepSpeed for the type of ``precision``, with the scaler that ``strategy`` has been given, where ``config``
    says nothing of it."""
    names = ("loss_scale", "loss_scale_window", "min_loss_scale", "initial_scale_power", "hysteresis")
    _format_precision_config(config, precision, **{name: getattr(strategy, name) for name in names})


def meet_by_deepspeed(strategy: Any) -> None:
    """As Lightning's DeepSpeedStrategy lets ranks meet, which also asks whether their devices are all GPUs."""
    reset_seed()
    strategy.set_world_ranks()
    strategy._init_deepspeed_distributed()
