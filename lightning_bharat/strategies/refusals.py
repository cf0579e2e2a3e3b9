"""What a module may hold that goes wrong, mostly without a word, where weights are divided or cut: refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_bharat.strategies._torch import has_gradient_hooks, is_compiled

_WRAPPERS = (nn.DataParallel, DistributedDataParallel, FullyShardedDataParallel)


class ModuleError(ValueError):
    """A module that can't be divided or cut as it is; the message names the part and what to write instead."""


def refuse_module(module: nn.Module, units: Iterable[str], divided: bool) -> None:
    """Refuse what would not be computed as on one rank.

    Args:
        module: before it is cut, on more than one rank.
        units: names of the modules that are gathered one at a time.
        divided: whether parameters are divided over data ranks, or offloaded.

    Raises:
        ModuleError: the same on all ranks.
    """
    refuse_lazy(module)
    problems = chain(_of_modules(module, divided), _of_parameters(module), _mixed_types(module, units, divided))
    for problem in problems:
        raise ModuleError(problem)
    refuse_gradient_hooks(module.named_parameters(remove_duplicate=False))


def refuse_lazy(module: nn.Module) -> None:
    """Refuse parameters that get their shape with the first batch: memory and cuts are known before.

    Raises:
        ModuleError: names the first one.
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ModuleError(
                f"parameter {name} has no shape yet: call the lazy module once, on zeros, where you build it"
            )


def refuse_gradient_hooks(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse hooks on the gradients of parameters that ranks hold in pieces, or whose place pieces will take.

    Raises:
        ModuleError: names the first parameter that has one.
    """
    for name, parameter in parameters:
        if has_gradient_hooks(parameter):
            raise ModuleError(
                f"parameter {name} has a hook on its gradient (register_hook), which would see this rank's piece, or "
                "never be called; change p.grad in on_after_backward or on_before_optimizer_step instead, or use "
                "parameter groups of the optimizer with rates of their own"
            )


def refuse_compiled_parent(module: nn.Module, blocks: str) -> None:
    """Refuse that a module around ``blocks`` is compiled: its program has the blocks of other stages in it.

    Raises:
        ModuleError: names it.
    """
    path = blocks.split(".")
    for name in (".".join(path[:i]) for i in range(len(path))):
        part = module.get_submodule(name)
        if is_compiled(part):
            raise ModuleError(
                f"{name or 'the module'} ({type(part).__name__}) is compiled as a whole, with the blocks of all "
                "pipeline stages; leave its compile() out and write HybridStrategy(compile=True), which compiles each "
                "block"
            )


def _of_modules(module: nn.Module, divided: bool) -> Iterator[str]:
    for name, part in module.named_modules():
        where = f"{name or 'the module'} ({type(part).__name__})"
        if isinstance(part, _WRAPPERS):
            yield f"{where} distributes by itself; write the module inside of it in its place"
        if isinstance(part, torch.jit.ScriptModule):
            yield f"{where} is compiled by torch.jit, and its weights can't be exchanged; use the Python module"
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            if part.sparse and part.weight.requires_grad:
                yield f"{where} has sparse gradients, which ranks can't divide; write sparse=False"
            if part.max_norm is not None and divided:
                yield (
                    f"{where} has max_norm={part.max_norm}, by which its forward changes the weight: data ranks would "
                    "lose the change. Leave max_norm out and normalize what it returns (F.normalize), or use "
                    "data_parallel_size=1"
                )


def _of_parameters(module: nn.Module) -> Iterator[str]:
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            yield (
                f"parameter {name} is {parameter.dtype}: hold its real and imaginary parts in two parameters, and "
                "write torch.complex(real, imaginary) where it is used"
            )


def _mixed_types(module: nn.Module, units: Iterable[str], divided: bool) -> Iterator[str]:
    """Data ranks exchange the gradients of a block together, and of what is outside of blocks."""
    found: dict[str, dict[torch.dtype, str]] = {}
    for name, parameter in module.named_parameters():
        if divided and parameter.requires_grad and parameter.ndim and parameter.numel():
            unit = next((u for u in units if name.startswith(f"{u}.")), "")
            found.setdefault(unit, {}).setdefault(parameter.dtype, name)
    for unit, dtypes in found.items():
        if len(dtypes) > 1:
            some = " and ".join(f"{name} ({dtype})" for dtype, name in dtypes.items())
            yield (
                f"trainable parameters of {unit or 'the module outside of its blocks'} are of several types: {some}; "
                "make them one, for instance by Trainer(precision=...)"
            )
