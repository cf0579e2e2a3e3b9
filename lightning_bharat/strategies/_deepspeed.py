"""All of DeepSpeed's private names that this package touches; test_private_names.py fails when one moves."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch


def deepspeed() -> ModuleType:
    """DeepSpeed, imported.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
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
