"""A folder of safetensors with the whole weights, as Hugging Face's libraries and plain torch load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_bharat.checkpoints import safetensors_file
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.index import write_json
from lightning_bharat.checkpoints.safetensors_file import Entry

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
# What Hugging Face's tokenizers are made of, by the names that their libraries look for.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def size_in_bytes(text: str) -> int:
    """Bytes of ``"5GB"``, ``"200MB"`` (powers of ten, as in Hugging Face's libraries).

    >>> size_in_bytes("1.5KB")
    1500

    Raises:
        CheckpointError: it isn't a positive number with a unit.
    """
    unit = next((unit for unit in UNITS if text.upper().endswith(unit)), "")
    try:
        size = int(float(text[: -len(unit)]) * UNITS[unit])
    except (ValueError, KeyError):
        size = 0
    if size < 1:
        raise CheckpointError(f"max_shard_size={text!r} is not a size; write for example '5GB' or '200MB'")
    return size


def write_weights(folder: Path, entries: Sequence[Entry], max_shard: int) -> None:
    """Write ``model.safetensors``, or files of at most ``max_shard`` bytes (a larger tensor has one of its own) with
    ``model.safetensors.index.json``; one tensor at a time is read."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > max_shard:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        safetensors_file.write(folder / "model.safetensors", shards[0], {"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        safetensors_file.write(folder / name, shard, {"format": "pt"})
    where = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.nbytes for entry in entries)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_config(folder: Path, about: dict[str, Any], dtype: str | None) -> None:
    """Write ``config.json`` (and ``generation_config.json``) of :func:`manifest.hugging_face`."""
    config = {**about["config"], "architectures": [about["class"]]}
    if dtype is not None:
        config["dtype"] = dtype
    write_json(folder / "config.json", config)
    if about.get("generation_config"):
        write_json(folder / "generation_config.json", about["generation_config"])


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy a tokenizer's files from a folder, or one ``tokenizer.json``, such that ``AutoTokenizer`` loads them.

    Raises:
        CheckpointError: there are none.
    """
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    else:
        found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
        if not found:
            raise CheckpointError(f"tokenizer={str(tokenizer)!r} holds none of {', '.join(TOKENIZER_FILES)}")
        for path in found:
            shutil.copyfile(path, folder / path.name)
    if not (folder / "tokenizer_config.json").exists() and (folder / "tokenizer.json").exists():
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
