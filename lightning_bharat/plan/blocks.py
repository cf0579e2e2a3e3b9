"""The repeated blocks of a model, found from its structure alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

UNCUT = "write tensor_parallel_size=1 and pipeline_parallel_size=1"


class PlanError(ValueError):
    """A model that cannot be cut as asked; the message names the module, what was tried and what to write."""


def block_list(module: nn.Module) -> str | None:
    """Name of the list of repeated blocks: the outermost ``ModuleList`` or ``Sequential`` of two or more modules of one
    class with parameters; the one with most parameters where there are several. ``None`` where there is none."""
    found: dict[str, int] = {}
    for name, child in module.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if not nested and isinstance(child, (nn.ModuleList, nn.Sequential)) and _alike(child):
            found[name] = sum(p.numel() for p in child.parameters())
    return max(found, key=lambda name: found[name], default=None)


def single_block(module: nn.Module) -> str:
    """Name of the smallest module that holds every parameter: the one block of a model without a list of blocks."""
    name, here = "", module
    while True:
        children = [(n, c) for n, c in here.named_children() if next(c.parameters(), None) is not None]
        own = next(here.parameters(recurse=False), None) is not None
        if own or len(children) != 1 or _is_leaf(children[0][1]):
            return name
        name, here = f"{name}.{children[0][0]}".lstrip("."), children[0][1]


def block_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the blocks, in order; one name for a model without a list of blocks."""
    name = block_list(module)
    if name is None:
        return (single_block(module),)
    return tuple(f"{name}.{child}" for child, _ in module.get_submodule(name).named_children())


def find_units(module: nn.Module) -> list[str]:
    """Names of the modules to gather one at a time: the members of each outermost list of two or more modules of one
    class that have parameters and children, where no parameter is also used elsewhere."""
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    found: list[str] = []
    for name, container in module.named_modules():
        nested = any(name.startswith(f"{unit}.") or name == unit for unit in found)
        if nested or not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        members = [(n, m) for n, m in container.named_children() if next(m.parameters(), None) is not None]
        alike = len(members) > 1 and len({type(m) for _, m in members}) == 1
        if alike and all(_is_unit(m, uses) for _, m in members):
            found += [f"{name}.{n}".lstrip(".") for n, _ in members]
    return found


def _is_unit(module: nn.Module, uses: Counter[int]) -> bool:
    inside = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return next(module.children(), None) is not None and all(uses[p] == inside[p] for p in inside)


def kinds_of(blocks: list[nn.Module]) -> tuple[str, ...]:
    """A letter for each block; blocks with the same letter have the same modules, shapes and settings."""
    signatures = [dict(_signature(block)) for block in blocks]
    index = {  # settings that only count the blocks ("layer_idx")
        key
        for key in signatures[0]
        if len(blocks) > 1
        and all(s.get(key) == i for i, s in enumerate(signatures))
        and type(signatures[0][key]) is int
    }
    letters: dict[Any, str] = {}
    kinds = []
    for signature in signatures:
        key = tuple((k, v) for k, v in signature.items() if k not in index)
        kinds.append(letters.setdefault(key, chr(ord("a") + len(letters))))
    return tuple(kinds)


def _signature(block: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in block.named_modules():
        yield f"{name}:class", type(module)
        for leaf, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{leaf}:shape", (tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, bool, type(None))) and key != "training":
                yield f"{name}.{key}", value
            elif isinstance(value, (tuple, list)) and all(isinstance(v, (int, float, str)) for v in value):
                yield f"{name}.{key}", tuple(value)


def _alike(container: nn.Module) -> bool:
    children = list(container.children())
    with_parameters = children and next(children[0].parameters(), None) is not None
    return len(children) > 1 and bool(with_parameters) and len({type(child) for child in children}) == 1


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
