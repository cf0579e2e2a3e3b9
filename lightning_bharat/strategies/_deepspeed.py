"""All of DeepSpeed's private names that this package touches; test_private_names.py fails when one moves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Find = Callable[[Tensor], Tensor | None]


def deepspeed() -> ModuleType:
    """DeepSpeed, imported.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it says on every rank that it has found no other
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ModuleNotFoundError(
            'strategy="bharat_deepspeed" needs DeepSpeed; write: pip install "lightning-bharat[deepspeed]"',
            name="deepspeed",
        ) from None
    return deepspeed


def use_device(device: torch.device) -> None:
    """Let DeepSpeed compute on ``device``, and not on what it has found on this machine."""
    from deepspeed.accelerator import real_accelerator

    if real_accelerator.get_accelerator().device_name() == device.type or device.type != "cpu":
        return
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    real_accelerator.set_accelerator(CPU_Accelerator())


def use_no_compiler() -> None:
    """Leave collectives on the CPU to gloo.

    DeepSpeed compiles a kernel for them with ninja and g++ when ranks first meet, fails where one is missing, and uses
    it in inference alone.
    """
    # Not "from deepspeed.comm import torch", which gives torch itself.
    import_module("deepspeed.comm.torch").build_shm_op = _nothing  # type: ignore[attr-defined]


def _nothing() -> Any:
    return None


def engine(**arguments: Any) -> tuple[Any, Any]:
    """DeepSpeed's engine around a module, and its optimizer."""
    made, optimizer, _, _ = deepspeed().initialize(args=None, dist_init_required=False, **arguments)
    return made, optimizer


# ---- what ranks have divided: filled from whole tensors


def is_divided(parameter: Tensor) -> bool:
    """Whether ranks hold parts of ``parameter`` itself, as in stage 3."""
    return hasattr(parameter, "ds_id")


def shape_of_whole(parameter: Tensor) -> tuple[int, ...]:
    """Of a parameter, divided or not."""
    return tuple(parameter.ds_shape) if is_divided(parameter) else tuple(parameter.shape)  # type: ignore[attr-defined]


def base_of(optimizer: Any) -> Any:
    """The optimizer that steps, in DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


@torch.no_grad()
def fill_parameter(parameter: nn.Parameter, whole: Tensor) -> None:
    """Give a parameter that ranks have divided its values. All ranks must call it, with the same."""
    with deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(whole)


@torch.no_grad()
def fill_masters(optimizer: Any, find: Find) -> None:
    """Give the float32 weights that DeepSpeed steps on their values.

    Args:
        find: the whole value of a parameter; ``None`` leaves what there is.
    """
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()
    for flat, parts in flats(optimizer):
        _fill(flat.data, parts, find)


@torch.no_grad()
def fill_state(optimizer: Any, key: str, find: Find) -> None:
    """Give the state ``key`` its values, zeros where ``find`` has none; see :func:`fill_masters`."""
    for flat, parts in flats(optimizer):
        if any(find(parameter) is not None for parameter, *_ in parts):
            state = torch.zeros_like(flat.data)
            _fill(state, parts, find)
            base_of(optimizer).state[flat][key] = state


def groups(optimizer: Any) -> list[list[Tensor]]:
    """The module's parameters by the optimizer's groups, as the module made them."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return [list(group) for group in optimizer.bit16_groups]
    found: list[list[Tensor]] = [[] for _ in base_of(optimizer).param_groups]
    for part, group in enumerate(optimizer.fp16_groups):
        found[optimizer.sub_group_to_group_id[part]] += group
    return found


def flats(optimizer: Any) -> Iterator[tuple[Tensor, list[tuple[Tensor, int, int, int]]]]:
    """What DeepSpeed's optimizer steps on: flat tensors, and for each parameter with a part in one: the parameter,
    where its part begins there, where the part begins in the flattened parameter, and how long it is."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            yield flat, [_own_part(optimizer, parameter) for parameter in group]
    else:
        for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
            mapped = [(p, p._hp_mapping) for p in group if p._hp_mapping is not None]
            yield (
                flat,
                [
                    (p, m.hp_fragment_address.start, m.lp_fragment_address.start, m.hp_fragment_address.numel)
                    for p, m in mapped
                ],
            )


def _own_part(optimizer: Any, parameter: Any) -> tuple[Tensor, int, int, int]:
    _, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    begin = size * torch.distributed.get_rank()
    return parameter, start, begin, max(0, min(size, parameter.ds_numel - begin))


def _fill(flat: Tensor, parts: list[tuple[Tensor, int, int, int]], find: Find) -> None:
    for parameter, start, begin, size in parts:
        whole = find(parameter) if size else None
        if whole is not None:
            flat.narrow(0, start, size).copy_(whole.flatten().narrow(0, begin, size))
