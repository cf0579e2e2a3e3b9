"""What `bharat checkpoint ...` runs: export, convert, show."""

from __future__ import annotations

import shutil
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_bharat.checkpoints import directory, folder, plain, stored
from lightning_bharat.checkpoints.compressed_file import SUFFIX
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.manifest import FORMAT, Manifest
from lightning_bharat.checkpoints.opened import Opened, dtype_after, open_any, reader
from lightning_bharat.checkpoints.safetensors_file import Entry
from lightning_bharat.checkpoints.share import Share

DType = Literal["float32", "float64", "bfloat16", "float16"]
T = TypeVar("T")
# What a directory stores tensor by tensor; "current_model_state" is Lightning's key for weights beside their averages.
WEIGHTS = ("state_dict", "current_model_state", "optimizer_states")


def export(
    checkpoint: str | Path,
    out: Path,
    *,
    prefix: str | None = None,
    dtype: DType | None = None,
    max_shard_size: str = "5GB",
    config: Path | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write the weights of a checkpoint as a folder of safetensors that Hugging Face or plain torch loads.

    Tensors are read and written one at a time. Where the module held one Hugging Face model, the folder has its names
    and its config.json: ``AutoModelForCausalLM.from_pretrained(out)`` loads it. For other modules
    ``load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))`` does.

    Example:
        bharat checkpoint export checkpoints/last.ckpt exported --dtype bfloat16 --tokenizer data/tokenizer.json

    Args:
        checkpoint: a checkpoint directory, also one that DeepSpeed wrote, or a plain Lightning .ckpt; or its URL.
        out: the folder to write.
        prefix: beginning of the names that are exported, which is taken off; what has another name is left out.
            By default that of the module's Hugging Face model, else none: all names as in the LightningModule.
        dtype: type of floating point weights; by default as stored.
        max_shard_size: files become at most as large.
        config: a config.json to add in place of the one in the checkpoint.
        tokenizer: a tokenizer.json, or a folder with a tokenizer's files, to add.
        overwrite: replace what is at ``out``.
    """
    _free(out, overwrite)
    found = open_any(checkpoint)
    model = found.about.get("hugging_face")
    if prefix is None:
        prefix = model["prefix"] if model else ""
    kept = _named(found, prefix, drop_tied=model is not None)
    cast = getattr(torch, dtype) if dtype else None
    entries = [
        Entry(name, dtype_after(value, cast), tuple(value.shape), reader(value, cast)) for name, value in kept.items()
    ]
    with directory.own_directory(directory.local_path(out)) as staging:
        folder.write_weights(staging, entries, folder.size_in_bytes(max_shard_size))
        if config is not None:
            shutil.copyfile(config, staging / "config.json")
        elif model is not None and prefix == model["prefix"]:
            folder.write_config(staging, model, _one_dtype(entries))
        if tokenizer is not None:
            folder.copy_tokenizer(tokenizer, staging)


def convert(checkpoint: str | Path, out: Path, *, overwrite: bool = False) -> None:
    """Turn a checkpoint directory into one plain Lightning .ckpt, or a .ckpt or DeepSpeed's directory into one of ours.

    Weights, optimizers, loops and callbacks all go along; training continues from either, on any layout. Needs host
    memory for all of it, but where a .ckpt is read.

    Example:
        bharat checkpoint convert checkpoints/last.ckpt whole.ckpt

    Args:
        checkpoint: a checkpoint directory, a plain Lightning .ckpt, or a directory that DeepSpeed wrote; or its URL.
        out: the file or directory to write, the other of the first two.
        overwrite: replace what is at ``out``.
    """
    _free(out, overwrite)
    found = open_any(checkpoint)
    about = {f.name: found.about[f.name] for f in fields(Manifest) if f.name in found.about and f.name != "files"}
    if found.kind == "directory":
        content = _map(found.content, stored.StoredTensor, _reading_once())
        states = [_by_index(state) for state in content.get("optimizer_states", [])]
        if "optimizer_states" in content:
            content["optimizer_states"] = states
        if out.is_dir():
            directory.remove(out)
        plain.write(directory.local_path(out), {**content, FORMAT: about})
        return
    content = {
        key: _map(_map(value, stored.StoredTensor, _reading_once()), Tensor, _sharing_once())
        if key in WEIGHTS
        else value
        for key, value in found.content.items()
    }
    stored.save(directory.local_path(out), content, Manifest(**about) if about else Manifest.of(content))


def show(checkpoint: str | Path, *, tensors: bool = False) -> None:
    """Print what a checkpoint is: step, layout, versions, sizes.

    Example:
        bharat checkpoint show checkpoints/last.ckpt --tensors true

    Args:
        checkpoint: a checkpoint directory, also one that DeepSpeed wrote, or a plain Lightning .ckpt; or its URL.
        tensors: also print each weight's name, type and shape.
    """
    print(describe(open_any(checkpoint), tensors))


def describe(found: Opened, tensors: bool = False) -> str:
    """The text that :func:`show` prints."""
    about, weights = found.about, found.weights()
    layout = ", ".join(f"{axis} {n}" for axis, n in about.get("layout", {}).items() if n > 1) or "one device"
    model = about.get("hugging_face")
    distinct = {getattr(v, "name", None) or v.data_ptr(): v for v in weights.values()}  # type: ignore[union-attr]
    lines = {
        "checkpoint": f"{found.path} ({found.kind})",
        "step": f"{found.content.get('global_step', 0)} (epoch {found.content.get('epoch', 0)})",
        "data": _data(about),
        "saved on": layout if about else "unknown (not written there)",
        "weights": f"{sum(prod(v.shape) for v in distinct.values()):,} in {len(distinct)} tensors",
        "optimizers": str(len(found.content.get("optimizer_states", []))),
        "Hugging Face": f"{model['class']} at {model['prefix'] or 'the top'}" if model else "no model",
        "versions": ", ".join(f"{name} {v}" for name, v in about.get("versions", {}).items()) or "unknown",
    }
    if packed := sum(file["bytes"] for name, file in about.get("files", {}).items() if name.endswith(SUFFIX)):
        lines["compressed"] = f"{found.nbytes() / packed:.2f} times smaller"
    text = [f"{name + ':':<14}{value}" for name, value in lines.items()]
    if tensors:
        text += [f"  {name}  {str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for name, v in weights.items()]
    return "\n".join(text)


def _data(about: dict[str, Any]) -> str:
    """How far it is."""
    batch, samples = about.get("batch"), about.get("samples")
    said = [f"{batch} batches of epoch {about['epoch']}"] if batch is not None else []
    said += [f"{samples:,} samples in all"] if samples is not None else []
    return ", ".join(said) or "unknown"


def _named(found: Opened, prefix: str, drop_tied: bool) -> dict[str, Tensor | stored.StoredTensor]:
    """Weights that begin with ``prefix``, without it; of tied ones only the first where the loader ties them again."""
    weights = found.weights()
    kept = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not kept:
        tops = sorted({name.split(".")[0] + "." for name in weights})
        raise CheckpointError(f"prefix={prefix!r}: no weight has such a name; names begin with {', '.join(tops)}")
    if not drop_tied:
        return kept
    seen: dict[Any, str] = {}
    for name, value in kept.items():
        same = value.name if isinstance(value, stored.StoredTensor) else (value.data_ptr(), value.shape, value.numel())
        seen.setdefault(same, name)
    return {name: kept[name] for name in seen.values()}


def _one_dtype(entries: list[Entry]) -> str | None:
    kinds = {entry.dtype for entry in entries if entry.dtype.is_floating_point}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None


def _free(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise CheckpointError(f"out={str(out)!r} exists; write another place, or overwrite=True to replace it")


def _map(tree: Any, kind: type[T], function: Any) -> Any:
    """``tree`` with ``function`` applied to everything of type ``kind`` in dicts, lists and tuples."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, kind, function) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_map(value, kind, function) for value in tree)
    return tree


def _reading_once() -> Any:
    """Reads stored tensors; what has one name becomes one tensor (tied weights stay tied)."""
    read: dict[str, Tensor] = {}

    def once(value: stored.StoredTensor) -> Tensor:
        if value.name not in read:
            read[value.name] = value.read()
        return read[value.name]

    return once


def _sharing_once() -> Any:
    """Shares of whole tensors; what is one memory becomes one share."""
    made: dict[tuple[Any, ...], Share] = {}

    def once(value: Tensor) -> Share:
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        return made.setdefault(key, Share.of(value)) if value.numel() else Share.of(value)

    return once


def _by_index(state: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state by names in torch's own form, by numbers in the groups' order."""
    order = {name: i for i, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    groups = [{**group, "params": [order[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[name]: value for name, value in state["state"].items()}, "param_groups": groups}
