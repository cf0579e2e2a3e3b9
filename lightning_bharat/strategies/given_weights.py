"""Weights that a run starts from, of which each rank reads what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_bharat.plan.shards import TensorSlice, pieces, shape_of_whole


class WeightsError(ValueError):
    """Weights that are not those of the module; the message names what differs."""


class GivenWeights:
    """Tensors by name, on disk or in memory, opened without being read.

    Args:
        source: a ``.safetensors`` file, a folder of them, a file of a state dict (read with ``weights_only=True``), or a
            state dict. A Lightning ``.ckpt`` gives its ``state_dict``.

    Raises:
        WeightsError: there is nothing of that kind at ``source``.
    """

    def __init__(self, source: Any) -> None:
        self._open = ExitStack()
        self.tensors: dict[str, Any] = dict(self._read(source))

    def _read(self, source: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(source, Mapping):
            yield from ((name, value) for name, value in source.items() if isinstance(value, Tensor))
            return
        path = Path(source)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not path.exists():
            raise WeightsError(f"weights={str(source)!r}: there is no file, and no folder with .safetensors files")
        for file in files:
            if file.suffix == ".safetensors":
                opened = self._open.enter_context(safe_open(file, framework="pt"))
                yield from ((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118 - not a dict
            else:
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                yield from self._read(state.get("state_dict", state))

    def match(self, module: nn.Module) -> dict[str, Any]:
        """By the module's own names of parameters and persistent buffers: the tensors.

        The names may be those of a part of the module (``self.model``), as in a folder of Hugging Face's.

        Raises:
            WeightsError: names are missing or unknown, or shapes differ.
        """
        state = dict(module.state_dict())
        prefixes = [f"{name}." if name else "" for name, _ in module.named_modules()]
        prefix = max(prefixes, key=lambda p: sum(f"{p}{name}" in state for name in self.tensors))
        found = {f"{prefix}{name}": tensor for name, tensor in self.tensors.items()}
        tied: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        for names in tied.values():
            present = [name for name in names if name in found]
            found.update({name: found[present[0]] for name in names if present and name not in found})
        missing = [name for name, value in state.items() if name not in found and isinstance(value, Tensor)]
        unknown = [name for name in found if name not in state]
        if missing or unknown:
            raise WeightsError(
                f"weights are of another model: {len(missing)} are missing ({', '.join(missing[:5])}), "
                f"{len(unknown)} unknown ({', '.join(unknown[:5])})"
            )
        for name, value in found.items():
            if _shape(value) != tuple(state[name].shape):
                raise WeightsError(f"weights: {name} is {_shape(value)}, and the module has {tuple(state[name].shape)}")
        return found

    def close(self) -> None:
        """Close the files."""
        self._open.close()


@torch.no_grad()
def read_into(tensor: Tensor, cut: TensorSlice | None, stored: Any) -> None:
    """Fill what this rank holds of a parameter from ``stored``, reading no more than that."""
    for piece in pieces(tensor, cut):
        index = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.local.shape, strict=True))
        piece.local.copy_(stored[index] if index or isinstance(stored, Tensor) else stored[:])
    assert _shape(stored) == shape_of_whole(tensor, cut)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape if isinstance(value, Tensor) else value.get_shape())
