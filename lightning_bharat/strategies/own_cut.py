"""A module that its own ``configure_model`` has cut, as for Lightning's ModelParallelStrategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_bharat.strategies.refusals import ModuleError

if TYPE_CHECKING:
    from lightning_bharat.strategies.options import Options

# What changes a module when the strategy cuts it, and with which values it changes nothing.
_NOTHING: dict[str, tuple] = {
    "activation_checkpointing": (None,),
    "compile": (False,),
    "offload": (False,),
    "weights": (None,),
    "plan": (None,),
    "reshard_after_forward": (None,),
    "reduce_dtype": (None,),
    "gradient_compression": (None,),
    "replicate_size": (1,),
    "pipeline_parallel_size": ("auto", 1),
    "context_parallel_size": (1,),
    "expert_parallel_size": (1,),
    "sequence_parallel": ("auto", False),
    "loss_parallel": ("auto", False),
}


def is_cut(module: nn.Module) -> bool:
    """Whether any part of ``module`` is distributed."""
    return any(isinstance(m, FSDPModule) for m in module.modules()) or any(
        isinstance(p, DTensor) for p in module.parameters()
    )


def refuse_undone(module: nn.Module, options: Options, data_ranks: Iterable[int]) -> None:
    """Refuse what nobody would do: the strategy changes nothing in such a module.

    Raises:
        ModuleError: an option that asks for a change, or parameters whose gradients data ranks would not exchange.
    """
    for name, values in _NOTHING.items():
        if not any(getattr(options, name) is value or getattr(options, name) == value for value in values):
            raise ModuleError(
                f"{name}={getattr(options, name)!r}: configure_model has cut the module itself, and the strategy takes "
                "it as it is. Do that there too, or leave the cuts to the strategy: build the model there without "
                "parallelize_module and fully_shard"
            )
    ranks = set(data_ranks)
    apart = [name for name, p in module.named_parameters() if p.requires_grad and not ranks <= _ranks(p)]
    if len(ranks) > 1 and apart:
        more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
        raise ModuleError(
            f"configure_model has cut the module, and has not divided {apart[0]}{more} over the data ranks: each would "
            'train alone. Write fully_shard(..., mesh=self.device_mesh["data_parallel"]) there too, or leave all cuts '
            "to the strategy"
        )


def _ranks(parameter: nn.Parameter) -> set[int]:
    return set(parameter.device_mesh.mesh.flatten().tolist()) if isinstance(parameter, DTensor) else set()
