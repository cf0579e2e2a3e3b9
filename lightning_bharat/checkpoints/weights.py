"""A module's state by full names: to shares, and from stored or whole tensors into a module that is cut in any way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from lightning_bharat.checkpoints.document import PLAIN
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.share import Share
from lightning_bharat.checkpoints.stages import Stages
from lightning_bharat.checkpoints.stored import StoredTensor, load_into
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.shards import TensorSlice, gather, shape_of_whole

Slices = Mapping[str, TensorSlice]
SHOWN = 8  # names in an error


class LikeWeights(dict[str, Any]):
    """Tensors by the module's names that lie as its weights do: each rank has the part that it has of the weight.

    :func:`with_shares` finds them anywhere in a checkpoint; a plain dict of them would be taken for whole tensors.
    """


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Full name of each parameter by its ``id``; the first name of tied ones."""
    in_place(module)
    return {id(parameter): name for name, parameter in module.named_parameters()}


def in_place(module: nn.Module) -> None:
    """Have the sharded parameters in the module: after an evaluation the root may hold gathered ones, which are other
    objects."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def first_names(module: nn.Module) -> dict[str, str]:
    """For each name of a parameter or buffer the first name that the same tensor has."""
    return _firsts([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _firsts(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    found: dict[int, str] = {}
    return {name: found.setdefault(id(tensor), name) for name, tensor in named}


def names_elsewhere(module: nn.Module) -> set[str]:
    """All names of parameters that other pipeline stages hold."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if is_elsewhere(p)}


@torch.no_grad()
def as_shares(
    state: Mapping[str, Any], module: nn.Module, slices: Slices, first_replica: bool, stages: Stages | None = None
) -> dict[str, Any]:
    """A module's ``state_dict`` with a :class:`Share` for each tensor, the same object for tied ones.

    Buffers are stored as the first replica (``first_replica``: data and tensor rank 0) of their stage has them.

    Raises:
        CheckpointError: the module is cut and ``state`` has a tensor under a name that isn't the module's, so that it
            can't be known how it is cut.
    """
    in_place(module)
    named = list(module.named_parameters(remove_duplicate=False))
    firsts, parameters = _firsts([*named, *module.named_buffers(remove_duplicate=False)]), dict(named)
    known, gone = module.state_dict().keys() if slices else (), {name for name, p in named if is_elsewhere(p)}
    made: dict[str, Share] = {}
    shares: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            shares[name] = value
            continue
        if slices and name not in known:
            raise CheckpointError(
                f"state_dict[{name!r}] is not a name of the module, whose weights are cut over tensor ranks: whether "
                f"this tensor is a part can't be known. Keep the module's names in on_save_checkpoint; extra tensors "
                f"go under a key of their own"
            )
        first = firsts.get(name, name)
        if first not in made:
            cut = slices.get(first, slices.get(name))
            if first in gone:
                made[first] = Share.nothing(value, cut)
            else:
                owns = first_replica and (stages is None or stages.owner(first, module) == stages.rank)
                frozen = name in parameters and not parameters[name].requires_grad
                made[first] = Share.of(value, cut, name in parameters or owns, frozen)
        shares[name] = made[first]
    return shares


def with_shares(tree: Any, module: nn.Module, slices: Slices, first_replica: bool, stages: Stages | None = None) -> Any:
    """``tree`` with :func:`as_shares` of each :class:`LikeWeights` in it."""
    if type(tree) in PLAIN or type(tree) is Share:
        return tree
    if isinstance(tree, LikeWeights):
        return as_shares(tree, module, slices, first_replica, stages)
    if type(tree) is dict or isinstance(tree, Mapping):
        return {key: with_shares(value, module, slices, first_replica, stages) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(with_shares(value, module, slices, first_replica, stages) for value in tree)
    return tree


def whole_state(
    module: nn.Module,
    slices: Slices,
    tensor_group: ProcessGroup | None,
    keep: bool,
    state: Mapping[str, Any],
    stages: Stages | None = None,
) -> dict[str, Any]:
    """``state`` (the module's, or one that lies like it) gathered tensor by tensor to host memory; ``{}`` where not
    ``keep``.

    Tied weights are gathered once and stay one tensor. All ranks must call it.
    """
    parameter_names(module)
    firsts, gone = first_names(module), names_elsewhere(module)
    found: dict[str, Any] = {}
    for name, value in state.items():
        first = firsts.get(name, name)
        if first in found or (not keep and first != name):
            found[name] = found.get(first)
            continue
        if isinstance(value, Tensor):
            cut = slices.get(first)
            whole = None if first in gone else gather(value, cut, tensor_group)
            if stages is not None:
                whole = stages.tell(stages.owner(first, module), whole, shape_of_whole(value, cut), value.dtype)
            value = whole.cpu() if keep and whole is not None else None
        found[name] = value
    return found if keep else {}


def load_weights(
    module: nn.Module, slices: Slices, values: Mapping[str, StoredTensor | Tensor | Any], strict: bool = True
) -> None:
    """Fill ``module`` from ``values`` by full names: stored tensors or whole tensors (memory-mapped ones are read where
    needed). A rank reads its own parts. Where a weight is tied, any of its names will do.

    What is neither parameter nor buffer (extra state, metrics' states) goes through ``module.load_state_dict``.

    Raises:
        CheckpointError: names are missing or unexpected and ``strict``; a shape differs, or a type other than in its
            precision. It lists them.
    """
    parameter_names(module)
    entries, firsts = module.state_dict(), first_names(module)
    present = {firsts.get(name, name) for name in values}
    missing = [name for name in entries if name not in values and firsts.get(name, name) not in present]
    unexpected = [name for name in values if name not in entries]
    differ = []
    targets: dict[str, tuple[Share, StoredTensor | Tensor]] = {}
    others = {}
    gone = names_elsewhere(module)
    for name in entries.keys() & values.keys():
        entry, value = entries[name], values[name]
        first = firsts.get(name, name)
        if name not in firsts or not isinstance(value, (Tensor, StoredTensor)):
            others[name] = value.read() if isinstance(value, StoredTensor) else value
            continue
        cut = slices.get(first, slices.get(name))
        whole = shape_of_whole(entry, cut)
        if tuple(value.shape) != whole:
            differ.append(f"{name} is {list(value.shape)} in the checkpoint and {list(whole)} here")
        elif not _same_kind(value.dtype, entry.dtype):
            differ.append(f"{name} is {value.dtype} in the checkpoint and {entry.dtype} here")
        elif name not in gone and (first not in targets or name == first):
            targets[first] = (Share.of(entry, cut), value)
    refuse_other_model(missing if strict else [], unexpected if strict else [], differ)
    load_into(targets.values())
    if others:
        device = next((t.device for t in entries.values() if isinstance(t, Tensor)), torch.device("cpu"))
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in others.items()}
        module.load_state_dict(moved, strict=False)


def refuse_other_model(missing: list[str], unexpected: list[str], differ: list[str], of: str = "") -> None:
    """Say what differs between a checkpoint and what it is loaded into.

    Raises:
        CheckpointError: anything does.
    """
    found = []
    if missing:
        found.append(f"it lacks {_some(missing)}")
    if unexpected:
        found.append(f"it has {_some(unexpected)}, unknown here")
    if differ:
        found.append(_some(differ))
    if found:
        hint = "" if of or not (missing or unexpected) else " (strict_loading = False loads what fits)"
        raise CheckpointError(f"This is a checkpoint of another model{of}: {'; '.join(found)}{hint}")


def _same_kind(stored: torch.dtype, here: torch.dtype) -> bool:
    """Whether numbers keep their meaning: integers in the place of floats are quantized, and of no use without their
    scales."""
    return torch.can_cast(stored, here) and stored.is_floating_point == here.is_floating_point


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more
