"""Values for weights that exist on ``meta`` alone: leaf by leaf, the same on one rank as on any number.

A leaf (a module with parameters or buffers of its own) is built whole on the CPU under a seed made of the run's seed
and the leaf's name, and each rank keeps its pieces of it. So no rank ever holds more than its pieces and one leaf.
Modules around the leaf have their say in how it begins (GPT-2's attention scales the projection in it): they are run
after it, with everything but the leaf on ``meta``.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.plan.shards import TensorSlice, fill
from lightning_bharat.strategies.given_weights import GivenWeights


class InitializeError(ValueError):
    """A module on ``meta`` that does not say how its weights begin; the message says what to write."""


_RESETS = ("reset_parameters", "_reset_parameters")


@dataclass
class _Leaf:
    """A module with tensors on ``meta``, in a copy of the whole tree as it was before any cut.

    Attributes:
        around: the modules from itself to the root, each with the nearest module around it, or itself, that has an
            ``_init_weights``.
        kept: its tensors that have values.
    """

    name: str
    around: list[tuple[nn.Module, nn.Module | None]]
    kept: dict[str, Tensor]

    @property
    def shell(self) -> nn.Module:
        return self.around[0][0]

    @property
    def missing(self) -> list[str]:
        """Names of its tensors without values."""
        return [name for name in _own(self.shell) if name not in self.kept]

    def build(self, seed: int) -> dict[str, Tensor]:
        """What is missing, whole and on the CPU.

        Raises:
            InitializeError: nothing around it sets all of it.
        """
        values = self._initialized(seed, 0)
        left = [name for name, tensor in values.items() if tensor.is_floating_point() and tensor.isnan().any()]
        whole_numbers = [name for name, tensor in values.items() if not tensor.is_floating_point()]
        if whole_numbers:  # what nothing sets is as it was
            other = self._initialized(seed, 1)
            left += [name for name in whole_numbers if not torch.equal(values[name], other[name])]
        if left:
            raise InitializeError(self._what_to_write(left))
        return values

    def _initialized(self, seed: int, fill: int) -> dict[str, Tensor]:
        shell, before = self.shell, (self.shell._parameters, self.shell._buffers)
        shell._parameters, shell._buffers = before[0].copy(), before[1].copy()
        for name, tensor in _own(shell).items():
            filled = torch.nan if tensor.is_floating_point() or tensor.is_complex() else fill
            made = self.kept[name].clone() if name in self.kept else torch.full_like(tensor, filled, device="cpu")
            if name in shell._parameters:
                shell._parameters[name] = nn.Parameter(made, requires_grad=tensor.requires_grad)
            else:
                shell._buffers[name] = made
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.default_generator.manual_seed(_seed_of(seed, self.name))
                self._run()
            return {name: tensor.detach() for name, tensor in _own(shell).items() if name not in self.kept}
        finally:
            shell._parameters, shell._buffers = before

    def _run(self) -> None:
        try:
            for module, _ in self.around:
                for reset in [getattr(module, name) for name in _RESETS if hasattr(module, name)][:1]:
                    reset()
            for module, initializer in self.around:
                if initializer is not None:
                    cast(Any, initializer)._init_weights(module)
        except Exception as error:  # a person's code, which may look for values in what is on meta
            raise InitializeError(f"{self._what_to_write(self.missing)} ({type(error).__name__}: {error})") from error

    def _what_to_write(self, tensors: list[str]) -> str:
        kind = type(self.shell).__name__
        return (
            f"{self.name or kind} ({kind}) was built on meta, and nothing says how {', '.join(tensors)} begin: write "
            f"{kind}.reset_parameters(self), which sets the parameters and buffers of this module, or build it with "
            "real weights"
        )


class Initializer:
    """What the weights of ``module`` begin with. Made before the module is cut.

    Args:
        module: with some, all or none of its tensors on ``meta``.
        weights: see :class:`~lightning_bharat.HybridStrategy`; ``None`` for the module's own.

    Attributes:
        given: names of what is read from elsewhere.
        words: what it is going to do; "" if the module's own values are there and stay.
    """

    def __init__(self, module: nn.Module, weights: Any) -> None:
        self.module = module
        self._given = GivenWeights(module, weights)
        self.given = self._given.tensors.keys()
        self._leaves = list(_leaves(module))
        self.words = self._given.words
        if self._leaves and not self._given.tensors:
            self.words = f"{len(self._leaves)} modules on meta, each begun by its own initialization and name"

    def fill(self, slices: dict[str, TensorSlice], device: torch.device, offload: bool = False) -> None:
        """Give the cut module its memory and values.

        Raises:
            InitializeError: see :class:`_Leaf`.
            CheckpointError: the given weights are not the module's.
        """
        _materialize(self.module, torch.device("cpu") if offload else device, device)
        current = {
            **dict(self.module.named_parameters(remove_duplicate=False)),
            **dict(self.module.named_buffers(remove_duplicate=False)),
        }
        filling = _Filling(current, slices, {id(current[name]) for name in self.given if name in current})
        seed = _seed() if self._leaves else 0
        for leaf in self._leaves:
            filling.take(leaf, seed)
        self._leaves.clear()
        self._given.fill(slices)


class _Filling:
    """Puts what leaves begin with into the pieces of a rank.

    Args:
        current: the module's tensors by all of their names.
        slices: which part of a parameter this tensor rank holds.
        given: ids of those that get their values from elsewhere.
    """

    def __init__(self, current: dict[str, Tensor], slices: dict[str, TensorSlice], given: set[int]) -> None:
        self._current, self._slices, self._given = current, slices, given
        self._uses = Counter(map(id, current.values()))
        self._tied: dict[int, _Start] = {}

    def take(self, leaf: _Leaf, seed: int) -> None:
        """Build ``leaf`` and let it go again: no other is there meanwhile."""
        names = {f"{leaf.name}.{own}".lstrip("."): own for own in leaf.missing}
        here = [name for name in names if not is_elsewhere(self._current[name])]
        wanted = [name for name in here if id(self._current[name]) not in self._given]
        whole = leaf.build(seed) if wanted else {}
        for name in wanted:
            target, values = self._current[name], whole[names[name]]
            if self._uses[id(target)] > 1:
                start = _Start(name, values.float().std(correction=0).item(), values.numel())
                if self._tied.setdefault(id(target), start) is not start:
                    self._tied[id(target)].refuse_another(start)
                    continue
            fill(target, self._slices.get(name), values)


@dataclass
class _Start:
    """How one name of a tied weight says that it begins."""

    name: str
    spread: float
    count: int

    def refuse_another(self, other: _Start) -> None:
        """Raise if ``other``'s numbers are spread differently."""
        low, high = sorted((self.spread, other.spread))
        if high > low * (1.1 + 4 / max(self.count, 1) ** 0.5):
            raise InitializeError(
                f"{self.name} and {other.name} are one tensor, built on meta, and begin differently (standard "
                f"deviations of {self.spread:.3g} and {other.spread:.3g}): which one counts can't be known. Let both "
                "modules begin alike, by reset_parameters or an _init_weights around them, or give initial_weights()"
            )


def _leaves(module: nn.Module) -> Iterator[_Leaf]:
    """The leaves with something on ``meta``, in a copy of the tree that later cuts do not reach.

    Raises:
        InitializeError: a tensor on meta is neither parameter nor buffer.
    """
    originals = dict(module.named_modules(remove_duplicate=False))
    copies = (
        dict(_copied(module, {}).named_modules(remove_duplicate=False))
        if any(map(_on_meta, originals.values()))
        else {}
    )
    seen = set[int]()
    for name, shell in copies.items():
        original = originals[name]
        for attribute, value in vars(original).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise InitializeError(
                    f"{name or type(original).__name__}.{attribute} is a plain tensor on meta, which nothing gives "
                    "values: make it a buffer (register_buffer) that reset_parameters sets, or compute it in forward"
                )
        if id(shell) in seen or not _on_meta(original):
            continue
        seen.add(id(shell))
        kept = {own: tensor.detach() for own, tensor in _own(original).items() if not tensor.is_meta}
        yield _Leaf(name, list(_around(copies, name)), kept)


def _on_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in _own(module).values())


def _copied(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    """The tree of modules with all tensors on ``meta``; what is shared stays shared."""

    def of(value: Any, make: Callable[[Any], Any]) -> Any:
        if value is not None and id(value) not in made:
            made[id(value)] = make(value)
        return made.get(id(value))

    shell = made[id(module)] = copy(module)
    tensors = {
        kind: {name: of(tensor, _meta) for name, tensor in getattr(module, kind).items()}
        for kind in ("_parameters", "_buffers")
    }
    shell.__dict__.update(tensors, _modules={})
    shell._modules.update({name: of(child, lambda c: _copied(c, made)) for name, child in module._modules.items()})
    return shell


def _meta(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor.detach(), device="meta")
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _around(names: dict[str, nn.Module], name: str) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """From ``name`` to the root."""
    path = [name, *(name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)), *([""] if name else [])]
    for i, inner in enumerate(path):
        yield names[inner], next((names[outer] for outer in path[i:] if hasattr(names[outer], "_init_weights")), None)


def _own(module: nn.Module) -> dict[str, Tensor]:
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _materialize(module: nn.Module, parameters_on: torch.device, buffers_on: torch.device) -> None:
    """Memory for what is on ``meta`` (``Module.to_empty`` would untie weights and empty what has values)."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    memory = torch.empty_like(parameter.detach(), device=parameters_on)
                    made[id(parameter)] = parameter, nn.Parameter(memory, requires_grad=parameter.requires_grad)
                setattr(owner, name, made[id(parameter)][1])  # nn.LSTM keeps a list beside
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
