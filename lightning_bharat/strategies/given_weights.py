"""Weights that a run starts from, under the names that the module has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_bharat.checkpoints import StoredTensor
from lightning_bharat.models.weights import read_weights

Weights = Mapping[str, Tensor | StoredTensor]


def weights_for(module: nn.Module, source: Any) -> dict[str, Tensor | StoredTensor]:
    """The tensors of ``source`` by the module's full names; they stay on disk until they are used.

    Their names may be those of a part of the module, as in a folder of Hugging Face's for ``self.model``.

    Args:
        module: not cut yet; may be on ``meta``.
        source: a state dict, or a path for :func:`~lightning_bharat.models.weights.read_weights`. ``None``: what the
            module's own ``initial_weights()`` gives, if it has one and is on ``meta``.

    Raises:
        CheckpointError: there are no weights at that path.
    """
    if source is None:
        own = getattr(module, "initial_weights", None)
        on_meta = any(p.is_meta for p in module.parameters())
        return dict(own() or {}) if own is not None and on_meta else {}
    if isinstance(source, Mapping):
        found = {name: value for name, value in source.items() if isinstance(value, (Tensor, StoredTensor))}
    else:
        found = read_weights(source)
    known = module.state_dict().keys()
    prefixes = [f"{name}." if name else "" for name, _ in module.named_modules()]
    prefix = max(prefixes, key=lambda p: sum(f"{p}{name}" in known for name in found))
    return {f"{prefix}{name}": value for name, value in found.items()}
