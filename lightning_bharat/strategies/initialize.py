"""Values for weights that exist on ``meta`` alone: leaf by leaf, the same on one rank as on any number.

A leaf (a module with parameters or buffers of its own) is built whole on the CPU under a seed made of the run's seed
and the leaf's name, and each rank keeps its pieces of it. So no rank ever holds more than its pieces and one leaf.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bharat.checkpoints import load_weights
from lightning_bharat.plan.shards import TensorSlice, fill
from lightning_bharat.strategies.given_weights import weights_for


class InitializeError(ValueError):
    """A module on ``meta`` that does not say how its weights begin; the message says what to write."""


@dataclass
class _Leaf:
    """A module's own tensors as they were before any cut, and who can initialize them."""

    name: str
    shell: nn.Module
    ancestor: nn.Module | None

    def build(self, seed: int) -> nn.Module:
        """The whole leaf on the CPU.

        Raises:
            InitializeError: it has neither ``reset_parameters`` nor an ancestor's ``_init_weights`` that sets all of
            it.
        """
        shell = self.shell
        for name, tensor in [*shell._parameters.items(), *shell._buffers.items()]:
            if tensor is not None:
                values = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0, device="cpu")
                if name in shell._parameters:
                    shell._parameters[name] = nn.Parameter(values, requires_grad=tensor.requires_grad)
                else:
                    shell._buffers[name] = values
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(_seed_of(seed, self.name))
            self._initialize(shell)
        left = [name for name, tensor in _own(shell).items() if tensor.is_floating_point() and tensor.isnan().any()]
        if left or not self._says_how:
            raise InitializeError(self._what_to_write(left or list(_own(shell))))
        return shell

    @property
    def _says_how(self) -> bool:
        return self.ancestor is not None or any(hasattr(self.shell, name) for name in _RESETS)

    def _initialize(self, shell: nn.Module) -> None:
        reset = next((getattr(shell, name) for name in _RESETS if hasattr(shell, name)), None)
        if reset is not None:
            try:
                reset()
            except AttributeError as error:  # it looks for its children, which are leaves of their own
                raise InitializeError(f"{self._what_to_write(list(_own(shell)))} ({error})") from error
        if self.ancestor is not None:
            cast(Any, self.ancestor)._init_weights(shell)

    def _what_to_write(self, tensors: list[str]) -> str:
        kind = type(self.shell).__name__
        return (
            f"{self.name or kind} ({kind}) was built on meta, and nothing says how {', '.join(tensors)} begin: write "
            f"{kind}.reset_parameters(self), which sets the parameters and buffers of this module alone (not those of "
            f"its children), or build it with real weights"
        )


_RESETS = ("reset_parameters", "_reset_parameters")


class Initializer:
    """What the weights of ``module`` begin with. Made before the module is cut.

    Args:
        module: with some, all or none of its tensors on ``meta``.
        weights: see :class:`~lightning_bharat.HybridStrategy`; ``None`` for the module's own.

    Attributes:
        words: what it is going to do; "" if the module's own values are there and stay.
    """

    def __init__(self, module: nn.Module, weights: Any) -> None:
        self.module = module
        self._given = weights_for(module, weights)
        self._leaves = list(_leaves(module))
        self.words = f"read from {_shown(weights)}" if self._given else ""
        if self._leaves and not self._given:
            self.words = f"{len(self._leaves)} modules on meta, each begun by its own initialization and name"

    def fill(self, slices: dict[str, TensorSlice], device: torch.device, offload: bool = False) -> None:
        """Give the cut module its memory and values.

        Raises:
            InitializeError: see :class:`_Leaf`.
            CheckpointError: the given weights are not the module's.
        """
        _materialize(self.module, torch.device("cpu") if offload else device, device)
        current = {**dict(self.module.named_parameters(remove_duplicate=False)), **dict(self.module.named_buffers())}
        given = {id(current[name]) for name in self._given if name in current}
        seed = _seed() if self._leaves else 0
        done = set[int]()
        for leaf in self._leaves:
            names = {f"{leaf.name}.{own}".lstrip("."): own for own in _own(leaf.shell)}
            wanted = [n for n in names if id(current[n]) not in given | done]
            if wanted:
                whole = _own(leaf.build(seed))
                for name in wanted:
                    fill(current[name], slices.get(name), whole[names[name]])
                    done.add(id(current[name]))
            leaf.shell._parameters.clear()
            leaf.shell._buffers.clear()
        if self._given:
            load_weights(self.module, slices, self._given)


def _leaves(module: nn.Module) -> Iterator[_Leaf]:
    names = dict(module.named_modules())
    for name, leaf in names.items():
        if any(tensor.is_meta for tensor in _own(leaf).values()):
            shell = copy(leaf)
            shell.__dict__.update(_parameters=dict(leaf._parameters), _buffers=dict(leaf._buffers), _modules={})
            yield _Leaf(name, shell, _ancestor(names, name))


def _ancestor(names: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The nearest module around ``name``, or itself, with a ``_init_weights``."""
    while True:
        if hasattr(names[name], "_init_weights"):
            return names[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def _own(module: nn.Module) -> dict[str, Tensor]:
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _materialize(module: nn.Module, parameters_on: torch.device, buffers_on: torch.device) -> None:
    """Memory for what is on ``meta`` (``Module.to_empty`` would untie weights and empty what has values)."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    memory = torch.empty_like(parameter.detach(), device=parameters_on)
                    made[id(parameter)] = parameter, nn.Parameter(memory, requires_grad=parameter.requires_grad)
                owner._parameters[name] = made[id(parameter)][1]
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_meta:
                owner._buffers[name] = torch.empty_like(buffer, device=buffers_on)


def _seed() -> int:
    """The run's seed on all ranks: ``seed_everything``'s, else rank 0's."""
    box = [int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**63))]
    dist.broadcast_object_list(box)
    return box[0]


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") % 2**63


def _shown(weights: Any) -> str:
    if weights is None:
        return "what the module's initial_weights() gives"
    return str(weights) if isinstance(weights, (str, os.PathLike)) else "the given state dict"
