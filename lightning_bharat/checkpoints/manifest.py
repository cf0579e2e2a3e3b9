"""`MANIFEST.json`: what a checkpoint is, for people and for checks, without opening its tensors.

`COMMIT` beside it holds the manifest's own digest and is written last: where both agree, all that the manifest lists
was on disk before.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_bharat.checkpoints import host_memory
from lightning_bharat.checkpoints.digest import DIGEST, check_digest, digest_of
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.index import read_json, write_json
from lightning_bharat.plan.layout import Layout
from lightning_bharat.plan.model_plan import ModelPlan

MANIFEST, COMMIT = "MANIFEST.json", "COMMIT"
FORMAT = "lightning_bharat"
VERSION = 3  # 1 had no digests, 2 no compressed tensors
READS = (2, 3)


@dataclass(frozen=True)
class Manifest:
    """What is written down about a checkpoint.

    Attributes:
        step, epoch: the trainer's ``global_step`` and ``current_epoch``.
        layout: sizes of the :class:`Layout` that saved it.
        plan: the :class:`ModelPlan` it was cut by (:meth:`ModelPlan.to_dict`), or ``None``.
        hugging_face: :func:`hugging_face` of the module, or ``None``.
        batches: of each training loader the sizes of its batches, where they are known.
        versions: of Python, torch and the libraries around.
        files: each file's size in bytes and digest: ``{"rank_00000.safetensors": {"bytes": 4096, "xxh3": "1f…"}}``.
        id: of this checkpoint, and no other.
        parent: id of the one that the run saved before, or went on from; "" if there is none.
        samples: that all data ranks have trained on, where that is known.
        batch: how many batches of ``epoch`` were trained on on each data rank; ``None`` outside of training.
        loss: of the last batch on rank 0, where that is known.
        format, version: of the checkpoint's form.
    """

    step: int = 0
    epoch: int = 0
    layout: dict[str, int] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    hugging_face: dict[str, Any] | None = None
    batches: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    id: str = ""
    parent: str = ""
    samples: int | None = None
    batch: int | None = None
    loss: float | None = None
    format: str = FORMAT
    version: int = VERSION

    @classmethod
    def of(
        cls,
        checkpoint: dict[str, Any],
        layout: Layout | None = None,
        plan: ModelPlan | None = None,
        module: torch.nn.Module | None = None,
        batches: list[dict[str, Any]] | None = None,
    ) -> Manifest:
        """What is known before the files are: ``checkpoint`` is Lightning's dict."""
        return cls(
            step=int(checkpoint.get("global_step", 0)),
            epoch=int(checkpoint.get("epoch", 0)),
            layout=asdict(layout or Layout()),
            plan=plan.to_dict() if plan else None,
            hugging_face=hugging_face(module) if module else None,
            batches=batches or [],
            batch=_batch(checkpoint),
            versions=_versions(),
        )

    def write(self, folder: Path, known: Mapping[str, dict[str, Any]]) -> None:
        """Write it to ``folder``, with the sizes and digests of all files that are there, and bring it to disk.

        Args:
            folder: where the files are.
            known: sizes and digests as in ``files``, of those whose writers know them; others are read.
        """
        files = {
            path.name: {"bytes": path.stat().st_size, DIGEST: digest_of(path)}
            for path in folder.iterdir()
            if path.name not in (MANIFEST, COMMIT, *known)
        }
        write_json(folder / MANIFEST, {**asdict(self), "files": dict(sorted({**files, **known}.items()))})
        write_json(folder / COMMIT, {DIGEST: digest_of(folder / MANIFEST)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the checkpoint in ``folder``, whose files it checks to be there with the right sizes.

        Digests are checked where a file is read (:meth:`check_file`).

        Raises:
            CheckpointError: not a checkpoint of ours, of another form, damaged, or an incomplete copy.
        """
        found = cls.alone(folder)
        found.check_files(folder)
        return found

    @classmethod
    def alone(cls, folder: Path) -> Manifest:
        """As :meth:`read`, from a folder that may have none of the files that the manifest lists."""
        content = read_json(folder / MANIFEST)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{folder / MANIFEST} is not the manifest of a lightning_bharat checkpoint")
        version = content.get("version")
        if type(version) is not int or version not in READS:
            newer = "a newer form than" if type(version) is int and version > VERSION else "another form than"
            raise CheckpointError(
                f"{folder} is a checkpoint of {newer} this lightning_bharat reads ({version!r}, not {VERSION}): use "
                f"the version that wrote it, {content.get('versions')}"
            )
        commit = read_json(folder / COMMIT)
        check_digest(folder / MANIFEST, commit.get(DIGEST, "") if isinstance(commit, dict) else "")
        try:
            _check_content(content)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from None
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in content.items() if key in known})

    def check_file(self, path: Path) -> None:
        """Compare the bytes of ``path`` with what was written.

        Raises:
            CheckpointError: they differ, or the file is none of this checkpoint's.
        """
        said = self.files.get(path.name)
        if said is None:
            raise CheckpointError(f"{path} is not among the files that {path.parent / MANIFEST} lists")
        host_memory.check(path, said[DIGEST])

    def check_files(self, folder: Path) -> None:
        """Compare the files in ``folder`` with the list.

        Raises:
            CheckpointError: one is missing, or has another size.
        """
        for name, said in self.files.items():
            path = folder / name
            if path.is_symlink():
                raise CheckpointError(
                    f"{path} is a symbolic link, and a checkpoint's files lie in its directory: put the file there"
                )
            if not path.is_file():
                if host_memory.is_elsewhere(path):
                    continue
                raise CheckpointError(f"{path} is missing: {folder} is an incomplete copy of a checkpoint")
            if (size := path.stat().st_size) != said["bytes"]:
                raise CheckpointError(
                    f"{path} has {size} bytes and was written with {said['bytes']}: {folder} is damaged"
                )


_KINDS: dict[str, tuple[type, ...]] = {
    **{"step": (int,), "epoch": (int,), "layout": (dict,), "batches": (list,), "versions": (dict,), "files": (dict,)},
    **{"plan": (dict, type(None)), "hugging_face": (dict, type(None))},
    **{
        "id": (str,),
        "parent": (str,),
        "samples": (int, type(None)),
        "batch": (int, type(None)),
        "loss": (float, int, type(None)),
    },
}


def _batch(checkpoint: Mapping[str, Any]) -> int | None:
    """How many batches of its epoch a checkpoint of Lightning's loops has behind it."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return progress.get("current", {}).get("processed")


def _check_content(content: dict[str, Any]) -> None:
    """See that a manifest, which anyone may have written, names files of its own folder alone.

    Raises:
        ValueError: it does not, or is of other types than what is written.
    """
    for name, kinds in _KINDS.items():
        if name in content and not isinstance(content[name], kinds):
            raise ValueError(f"{name} is {content[name]!r}")
    for name, said in content.get("files", {}).items():
        if name != os.path.basename(name) or name in ("", ".", "..", MANIFEST, COMMIT) or "\0" in name:
            raise ValueError(f"{name!r} is not the name of a file in this directory")
        known = isinstance(said, dict) and type(said.get("bytes")) is int and isinstance(said.get(DIGEST), str)
        if not known:
            raise ValueError(f"of {name} are no size and no digest")


def hugging_face(module: torch.nn.Module) -> dict[str, Any] | None:
    """What an export needs of the one Hugging Face model in ``module``: the prefix of its names, its class and config.

    ``None`` where there is none, or more than one.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or "transformers.modeling_utils" not in sys.modules:
        return None
    kind = transformers.PreTrainedModel
    tops: dict[str, Any] = {}
    for name, part in module.named_modules():  # outer modules come first
        if isinstance(part, kind) and not any(not top or name.startswith(f"{top}.") for top in tops):
            tops[name] = part
    if len(tops) != 1:
        return None
    name, model = next(iter(tops.items()))
    generation = getattr(model, "generation_config", None)
    return {
        "prefix": f"{name}." if name else "",
        "class": _class_name(model),
        "config": json.loads(model.config.to_json_string()),
        "generation_config": json.loads(generation.to_json_string()) if generation else None,
    }


def _class_name(model: torch.nn.Module) -> str:
    """Name of the model's class; FSDP2 puts a class of its own with the prefix ``FSDP`` in front of it."""
    names = [c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")]
    return names[0] if names else type(model).__name__


@cache  # to look one up reads and parses its metadata
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "lightning", "lightning-bharat", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
