"""Checkpoints that DeepSpeed wrote, read without DeepSpeed and without running code from them.

A directory names its newest checkpoint in ``latest``. That holds one file of the module and Lightning's state
(``mp_rank_00_model_states.pt``; in stage 3 one of each rank, with placeholders for weights), and from stage 1 on one of
each rank with the float32 weights and optimizer states that it divides (``*_optim_states.pt``): all parameters of a
group one after another, cut into as many parts as ranks (stages 1 and 2), or each parameter cut by itself (stage 3).
What the pieces are called stands in ``param_shapes``. As ``zero_to_fp32.py`` reads them (DeepSpeed 0.19).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bharat.checkpoints.document import safe_load
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.stored import StoredTensor

LATEST = "latest"
# DeepSpeed's own entries beside Lightning's.
_ITS_OWN = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
    *("shared_params", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps"),
    *("global_steps", "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions"),
    *("ds_config", "ds_version"),
}


class _Inert:
    """In the place of DeepSpeed's objects in a file: keeps their attributes, and has nothing that could run."""


# What DeepSpeed writes beside plain data. A stage is a number.
_STAND_INS = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Inert,
    "deepspeed.utils.tensor_fragment.fragment_address": _Inert,
}


@dataclass(frozen=True, eq=False)
class Fragments(StoredTensor):
    """A tensor whose pieces lie in the files of several ranks.

    Attributes:
        pieces: flat views of the files; one after another they begin with the tensor's values, and may end in padding.
    """

    pieces: tuple[Tensor, ...] = ()

    def read(self) -> Tensor:
        """The whole tensor, in host memory."""
        return torch.cat(self.pieces).detach()[: self.shape.numel()].view(self.shape)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a directory that DeepSpeed wrote."""
    return any(_tag(path).glob("*_model_states.pt")) if (path / LATEST).is_file() else False


def read(path: Path) -> dict[str, Any]:
    """Lightning's dict, with weights and optimizer states by full names; they stay on disk until they are read.

    Weights are DeepSpeed's float32 ones where it has them. No code from the files is run.

    Raises:
        CheckpointError: damaged, incomplete, with objects that only code can build, or of a kind that is not read here
            (several model-parallel ranks, DeepSpeed's experts, states on NVMe); the message says which.
    """
    folder = _tag(path)
    _refuse_kinds(folder)
    models = [_load(file) for file in _by_rank(folder, "*_model_states.pt")]
    parts = [_load(file)["optimizer_state_dict"] for file in _by_rank(folder, "*_optim_states.pt")]
    first = models[0]
    content = {key: value for key, value in first.items() if key not in _ITS_OWN}
    content.setdefault("global_step", first.get("global_steps", 0))
    if not parts:
        return {**content, "state_dict": dict(first["module"]), "optimizer_states": _listed(first.get("optimizer"))}
    zero = _Zero(folder, first["param_shapes"], parts)
    state = _of_module(models, zero.stage) | zero.weights()
    state |= {name: state[same] for name, same in first["shared_params"].items() if same in state}
    return {**content, "state_dict": state, "optimizer_states": [zero.optimizer()]}


class _Zero:
    """What ranks have divided among them.

    Args:
        shapes: of each group of parameters, by names, in the order in which they lie.
        parts: the ranks' files.
    """

    def __init__(self, folder: Path, shapes: list[Mapping[str, torch.Size]], parts: list[dict[str, Any]]) -> None:
        self.folder, self.shapes, self.parts = folder, shapes, parts
        first = parts[0]
        if "zero_stage" not in first:
            raise CheckpointError(
                f"{folder} is by DeepSpeed's optimizer for bfloat16 weights with float32 gradients, not read here"
            )
        self.stage: int = first["zero_stage"]
        count = first["partition_count"]
        ranks = max(count) if isinstance(count, list) else count
        if ranks != len(parts):
            raise CheckpointError(
                f"{folder} is incomplete: {ranks} ranks have written it, and files of {len(parts)} are there"
            )
        self.base = [p["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"] for p in parts]
        if not isinstance(self.base[0], dict):
            raise CheckpointError(f"{folder} is an elastic checkpoint of DeepSpeed (elastic_checkpoint), not read here")
        self.paddings = first.get("param_alignment_paddings")

    def weights(self) -> dict[str, Fragments]:
        """The float32 weights."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        found: dict[str, Fragments] = {}
        for group in range(len(self.shapes)):
            found |= dict(self._named(group, [part[key][group] for part in self.parts]))
        return found

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's state by names, as :mod:`lightning_bharat.checkpoints.optimizers` has it."""
        groups: list[dict[str, Any]] = []
        state: dict[str, dict[str, Any]] = {}
        for options in self.base[0]["param_groups"]:
            names = [name for flat in options["params"] for name in self.shapes[flat]]
            groups.append({**options, "params": names})
            for flat in options["params"]:
                self._add_state(flat, state)
        return {"param_groups": groups, "state": state, "dtypes": dict.fromkeys(state, torch.float32)}

    def _add_state(self, flat: int, state: dict[str, dict[str, Any]]) -> None:
        of_ranks = [base["state"].get(flat, {}) for base in self.base]
        for key, value in of_ranks[0].items():
            if isinstance(value, Tensor) and value.ndim:
                entries = dict(self._named(flat, [own[key] for own in of_ranks]))
            else:
                entries = dict.fromkeys(self.shapes[flat], value)
            for name, entry in entries.items():
                state.setdefault(name, {})[key] = entry

    def _named(self, group: int, flats: list[Tensor]) -> Iterator[tuple[str, Fragments]]:
        """The parameters of a group, out of what each rank has of it."""
        offset = 0
        for i, (name, shape) in enumerate(self.shapes[group].items()):
            size = prod(shape)
            if self.stage == 3:
                each = -(-size // len(flats))
                pieces = [flat.narrow(0, offset, each) for flat in flats]
                offset += each
            else:
                pieces = list(_between(flats, offset, offset + size))
                offset += size + (self.paddings[group][i] if self.paddings else 0)
            if sum(piece.numel() for piece in pieces) < size:
                raise CheckpointError(f"{self.folder} is damaged: {name} is cut off")
            yield name, Fragments(name, torch.Size(shape), flats[0].dtype, None, tuple(pieces))


def _between(flats: list[Tensor], begin: int, end: int) -> Iterator[Tensor]:
    """The part from ``begin`` to ``end`` of what tensors are one after another."""
    start = 0
    for flat in flats:
        low, high = max(begin - start, 0), min(end - start, flat.numel())
        if low < high:
            yield flat.narrow(0, low, high - low)
        start += flat.numel()


def _of_module(models: list[dict[str, Any]], stage: int) -> dict[str, Any]:
    """What the files of the module hold beside what ranks have divided: buffers, and weights that do not train."""
    first = models[0]
    if stage < 3:
        return dict(first["module"])
    trained = {name for group in first["param_shapes"] for name in group} | set(first["shared_params"])
    frozen = first.get("frozen_param_shapes") or {}
    state = {name: value for name, value in first["module"].items() if name not in trained and name not in frozen}
    for name, shape in frozen.items():
        pieces = tuple(model["frozen_param_fragments"][name].flatten() for model in models)
        state[name] = Fragments(name, torch.Size(shape), pieces[0].dtype, None, pieces)
    return state


def _listed(optimizer: Any) -> list[Any]:
    """Of stage 0: torch's own form."""
    if not isinstance(optimizer, dict):
        return []
    if "state" not in optimizer:
        raise CheckpointError(
            "the checkpoint is of DeepSpeed's stage 0 in 16 bits, whose float32 weights have no names in it; train in "
            "stage 1, or in 32 bits"
        )
    return [optimizer]


def _tag(path: Path) -> Path:
    # Only a name: what a file says must not lead out of the directory.
    return path / Path((path / LATEST).read_text().strip()).name


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda file: [int(digits) for digits in re.findall(r"\d+", file.name)])


def _refuse_kinds(folder: Path) -> None:
    kinds = {
        "*mp_rank_01*": "of several model-parallel ranks",
        "*expert*": "with DeepSpeed's own experts",
        "offloaded_tensors": "with states on NVMe",
        "zero": "a universal one",
    }
    for pattern, kind in kinds.items():
        if any(folder.glob(pattern)):
            raise CheckpointError(f"{folder} is a checkpoint of DeepSpeed {kind}, which is not read here")


def _load(file: Path) -> dict[str, Any]:
    return safe_load(file, mmap=zipfile.is_zipfile(file), stand_ins=_STAND_INS)
