"""A module as it was before it was cut: what the cut put into it is taken out again, and what a person's code has
changed since stays.

Cuts change a module's class, its attributes and its registries (parameters, hooks), and nothing else: a shallow copy of
these from before and one from after say what was the cut's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bharat.strategies._torch import forget_divided

_ABSENT = object()
# Each nn.Module has these dicts, which change in place: children, buffers, hooks of all kinds.
_REGISTRIES = frozenset(key for key, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
_REFILLED = frozenset({"_parameters", "_buffers"})  # handled by name, below


class WholeForm:
    """How the parts of ``module`` are, to be made so again by :meth:`restore`. It keeps no weight alive.

    Args:
        module: before the cut; real or on ``meta``.
    """

    def __init__(self, module: nn.Module) -> None:
        whole: dict[int, nn.Parameter] = {}
        self._parts = [_Part(part, whole) for part in module.modules()]

    def cut(self) -> None:
        """The module is cut now: what differs was done by the cut."""
        for part in self._parts:
            part.cut()

    def restore(self) -> None:
        """Take the cut out. Parameters are then whole, on ``meta``, and train where they train now; buffers and all
        that was changed since :meth:`cut` are as they are now."""
        for part in self._parts:
            part.restore()


class _Part:
    """One module of a tree.

    Args:
        module: as it is before the cut.
        whole: by the ids of parameters, what stands for them; tied ones share it.
    """

    def __init__(self, module: nn.Module, whole: dict[int, nn.Parameter]) -> None:
        self._module, self._kind = module, type(module)
        self._before: _Attributes | None = _Attributes(module)
        self._change: _Change | None = None
        held = {name: p for name, p in module._parameters.items() if p is not None}
        self._parameters = {name: whole.setdefault(id(p), _on_meta(p)) for name, p in held.items()}

    def cut(self) -> None:
        if self._before is not None:
            self._change = _Change(self._before, _Attributes(self._module))
            self._before = None

    def restore(self) -> None:
        self.cut()
        module, held = self._module, dict(self._module._parameters)
        module.__class__ = self._kind
        assert self._change is not None
        self._change.undo(module)
        forget_divided(module)
        for name, whole in self._parameters.items():
            if (now := held.get(name)) is not None:
                whole.requires_grad_(now.requires_grad)
            module._parameters.pop(name, None)
            setattr(module, name, whole)  # nn.LSTM keeps a list beside


class _Attributes:
    """What a module has of its own: its attributes, and what its registries hold."""

    def __init__(self, part: nn.Module) -> None:
        self.plain = {key: value for key, value in vars(part).items() if key not in _REGISTRIES}
        self.registries = {key: _entries(vars(part)[key]) for key in _REGISTRIES - _REFILLED}


class _Change:
    """From one :class:`_Attributes` to another, backwards."""

    def __init__(self, before: _Attributes, after: _Attributes) -> None:
        keys = before.plain.keys() | after.plain.keys()
        pairs = {key: (before.plain.get(key, _ABSENT), after.plain.get(key, _ABSENT)) for key in keys}
        self._plain = {key: pair for key, pair in pairs.items() if pair[0] is not pair[1]}
        self._added = {key: after.registries[key].keys() - entries.keys() for key, entries in before.registries.items()}
        self._removed = {
            key: {name: entries[name] for name in entries.keys() - after.registries[key].keys()}
            for key, entries in before.registries.items()
        }

    def undo(self, part: nn.Module) -> None:
        attributes = vars(part)
        for key, (was, then) in self._plain.items():
            if attributes.get(key, _ABSENT) is not then:
                continue
            if was is _ABSENT:
                del attributes[key]
            else:
                attributes[key] = was
        for key, names in self._added.items():
            registry = attributes[key]
            for name in names:
                registry.discard(name) if isinstance(registry, set) else registry.pop(name, None)
            registry.update(self._removed[key])


def _entries(registry: Any) -> Mapping[Any, Any]:
    """Of a dict, one of torch.jit's that stands for one, or a set."""
    return dict(registry.items()) if hasattr(registry, "items") else dict.fromkeys(registry)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(torch.empty_like(parameter.detach(), device="meta"), requires_grad=parameter.requires_grad)
    made.__dict__.update({key: value for key, value in vars(parameter).items() if not isinstance(value, Tensor)})
    return made
