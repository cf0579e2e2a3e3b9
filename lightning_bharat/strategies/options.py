"""The arguments of HybridStrategy: which values this version does, and the sizes that "auto" stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_bharat.plan.copies import copy_module
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.strategies.arguments import check
from lightning_bharat.strategies.memory import device_bytes, fitting_tensor_size

Auto: TypeAlias = int | Literal["auto"]


@dataclass(frozen=True)
class Options:
    """See :class:`~lightning_bharat.HybridStrategy`.

    Raises:
        ValueError: names the argument, its value and what to write instead.
    """

    data_parallel_size: Auto
    tensor_parallel_size: Auto
    pipeline_parallel_size: Auto
    context_parallel_size: int
    expert_parallel_size: int
    replicate_size: int
    num_microbatches: int | None
    schedule: str
    sequence_parallel: bool | Literal["auto"]
    loss_parallel: bool | Literal["auto"]
    token_weighted: bool
    microbatch_fn: Callable | None
    plan: Any
    reshard_after_forward: bool | int | None
    reduce_dtype: str | None
    gradient_compression: str | None
    activation_checkpointing: str | None
    offload: bool
    compile: bool | Mapping[str, Any]
    weights: Any
    save_distributed_checkpoint: bool
    checkpoint_compression: str | None
    checkpoint_read_back: bool
    process_group_backend: str | None
    timeout: timedelta | None

    def __post_init__(self) -> None:
        check(vars(self))

    def layout(
        self, devices: int, devices_on_host: int, module: nn.Module, device: torch.device, choices: dict[str, str]
    ) -> Layout:
        """The sizes of all axes for ``devices`` ranks; adds to ``choices`` why.

        Raises:
            LayoutError: the sizes do not multiply to ``devices``.
        """
        pipeline = 1 if self.pipeline_parallel_size == "auto" else self.pipeline_parallel_size
        if devices % pipeline:
            raise LayoutError(
                f"pipeline_parallel_size={pipeline} does not divide the {devices} devices; "
                f"sizes that do: {_divisors(devices)}"
            )
        devices //= pipeline
        those = f"{devices} devices" + (f" of each of the {pipeline} pipeline stages" if pipeline > 1 else "")
        context = self.context_parallel_size
        if devices % context:
            raise LayoutError(
                f"context_parallel_size={context} does not divide the {those}; sizes that do: {_divisors(devices)}"
            )
        devices //= context
        those = f"{devices} groups of {context} context ranks of the {those}" if context > 1 else those
        tensor = self.tensor_parallel_size
        if tensor == "auto":
            tensor, choices["tensor_parallel_size"] = self._auto_tensor(devices, those, devices_on_host, module, device)
        data = self.data_parallel_size
        if data == "auto":
            if devices % tensor:
                raise LayoutError(
                    f"tensor_parallel_size={tensor} does not divide the {those}; sizes that do: {_divisors(devices)}"
                )
            data = devices // tensor
        if data * tensor != devices:
            raise LayoutError(
                f"data_parallel_size={data} × tensor_parallel_size={tensor} = {data * tensor} ranks, and there are "
                f'{those}; write data_parallel_size="auto" or devices={data * tensor * pipeline * context}'
            )
        if data % self.replicate_size:
            raise LayoutError(
                f"replicate_size={self.replicate_size} does not divide the {data} data ranks; "
                f"sizes that do: {_divisors(data)}"
            )
        expert = self.expert_parallel_size
        if data * context % expert:
            over = f"{data} data ranks" + (f" × {context} context ranks" if context > 1 else "")
            raise LayoutError(
                f"expert_parallel_size={expert} does not divide the {over}, over which experts are spread; "
                f"sizes that do: {_divisors(data * context)}"
            )
        if expert > 1 and self.replicate_size > 1:
            raise LayoutError(
                f"expert_parallel_size={expert} with replicate_size={self.replicate_size}: experts are divided over "
                "all data ranks; write replicate_size=1"
            )
        return Layout(data, tensor, pipeline, context, expert, self.replicate_size)

    def _auto_tensor(
        self, devices: int, those: str, devices_on_host: int, module: nn.Module, device: torch.device
    ) -> tuple[int, str]:
        if self.data_parallel_size != "auto":
            if devices % self.data_parallel_size:
                raise LayoutError(
                    f"data_parallel_size={self.data_parallel_size} does not divide the {those}; "
                    f'write data_parallel_size="auto"'
                )
            size = devices // self.data_parallel_size
            return size, f"{size}, what data_parallel_size={self.data_parallel_size} leaves of {those}"
        shapes = _on_meta(module)
        if shapes is None:
            return 1, "1: configure_model could not be run on meta to see whether the model fits"
        memory = device_bytes(device, devices_on_host)
        size, need = fitting_tensor_size(shapes, devices, devices_on_host, memory)
        return size, f"{size}: {need}"


def sizes(layout: Layout) -> dict[str, Any]:
    """The arguments that are the sizes of ``layout``."""
    return {
        "data_parallel_size": layout.data,
        "tensor_parallel_size": layout.tensor,
        "pipeline_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_parallel_size": layout.expert,
        "replicate_size": layout.replicate,
    }


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _on_meta(module: nn.Module) -> nn.Module | None:
    """The module's parameters, also when ``configure_model`` is yet to make them."""
    if not is_overridden("configure_model", module):
        return module
    try:
        with isolate_rng(), torch.device("meta"):
            copy: Any = copy_module(module)
            copy.configure_model()
        return copy
    except Exception:  # a person's code, that may ask for what is only there later
        return None
