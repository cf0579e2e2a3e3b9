"""Weights that a run starts from, under the names that the module has for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_bharat.checkpoints import CheckpointError, StoredTensor, load_weights
from lightning_bharat.checkpoints.errors import together
from lightning_bharat.models.weights import read_weights
from lightning_bharat.plan.shards import TensorSlice


class GivenWeights:
    """What a module starts from in place of its own values; it stays on disk until it is used.

    Names may be those of a part of the module, as in a folder of Hugging Face's for ``self.model``.

    Args:
        module: not cut yet; may be on ``meta``.
        source: a state dict, or a path for :func:`~lightning_bharat.models.weights.read_weights`. ``None``: what the
            module's own ``initial_weights()`` gives, if it has one.

    Attributes:
        tensors: by the module's full names; none if nothing is given.
        words: where they are from; "" if nothing is given.

    Raises:
        CheckpointError: on every rank: there are no weights.
    """

    def __init__(self, module: nn.Module, source: Any) -> None:
        own = getattr(module, "initial_weights", None)
        self.tensors: dict[str, Tensor | StoredTensor] = {}
        self._module = module
        if source is not None:
            self._shown = repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "a state dict"
            self.tensors = together(lambda: _named(module, source, self._shown))
        elif own is not None and (given := own()):
            self._shown = "what initial_weights() returns"
            self.tensors = together(lambda: _named(module, given, self._shown))
        self.words = f"read from {self._shown}, {len(self.tensors)} tensors" if self.tensors else ""

    def fill(self, slices: Mapping[str, TensorSlice]) -> None:
        """Put them into the module, which is cut by now: each rank reads its pieces. ``strict_loading = False`` of a
        LightningModule lets names be missing, or more than the module has.

        Raises:
            CheckpointError: on every rank: they are those of another model.
        """
        if self.tensors:
            together(self._load(slices))

    def _load(self, slices: Mapping[str, TensorSlice]) -> Any:
        strict = getattr(self._module, "strict_loading", True)

        def load() -> None:
            try:
                load_weights(self._module, slices, self.tensors, strict)
            except CheckpointError as error:
                raise CheckpointError(f"weights={self._shown}: {error}") from None

        return load


def _named(module: nn.Module, source: Any, shown: str) -> dict[str, Tensor | StoredTensor]:
    if isinstance(source, (str, os.PathLike)):
        found: dict[str, Any] = dict(read_weights(source))  # type: ignore[arg-type]
    elif isinstance(source, Mapping):
        found = dict(source)
    else:
        raise CheckpointError(f"weights={source!r}: write a path or a state dict, not a {type(source).__name__}")
    if isinstance(found.get("state_dict"), Mapping):
        raise CheckpointError(
            f'weights={shown} is a whole checkpoint, of {", ".join(found)}; write weights=checkpoint["state_dict"]'
        )
    tensors = {name: value for name, value in found.items() if isinstance(value, (Tensor, StoredTensor))}
    if not tensors:
        raise CheckpointError(f"weights={shown} has no tensors: leave weights out to start from the module's own")
    known = module.state_dict().keys()
    prefixes = [f"{name}." if name else "" for name, _ in module.named_modules()]
    prefix = max(prefixes, key=lambda p: sum(f"{p}{name}" in known for name in tensors))
    return {f"{prefix}{name}": value for name, value in tensors.items()}
