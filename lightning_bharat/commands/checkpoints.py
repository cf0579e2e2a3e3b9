"""What `bharat checkpoint list`, `verify`, `diff` and `prune` run, on folders of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lightning_bharat.checkpoints import directory
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.fetched import opened
from lightning_bharat.checkpoints.manifest import COMMIT
from lightning_bharat.checkpoints.opened import open_any, reader
from lightning_bharat.checkpoints.remote import Place, Remote, StoreError, place_of
from lightning_bharat.checkpoints.stored import StoredTensor
from lightning_bharat.checkpoints.whole import checkpoints_in, problems
from lightning_bharat.commands.table import size, table


def list_all(folder: str | Path) -> None:
    """List the checkpoints in and below a folder: step, layout, size, and whether their files are there.

    Example:
        bharat checkpoint list lightning_logs

    Args:
        folder: where to look, also a URL; directories only, no plain .ckpt files.
    """
    rows = []
    for path in _some(folder):
        name = str(path.relative_to(place_of(folder)))  # type: ignore[arg-type]
        try:
            checkpoint = opened(path)
            checkpoint.look()
        except StoreError:
            raise
        except CheckpointError as error:
            rows.append([name, "", "", "", str(error)])
            continue
        found = checkpoint.manifest
        layout = ", ".join(f"{axis} {n}" for axis, n in found.layout.items() if n > 1) or "one device"
        bytes = sum(file["bytes"] for file in found.files.values())
        rows.append([name, str(found.step), layout, size(bytes), "all files there"])
    print(table(["checkpoint", "step", "saved on", "size", "state"], rows))


def verify(folder: str | Path) -> int:
    """Read every byte of a checkpoint, or of all in and below a folder, and say which files are not as written.

    Example:
        bharat checkpoint verify lightning_logs/version_0/checkpoints/last.ckpt

    Args:
        folder: a checkpoint directory, or a folder with some; or its URL.

    Returns:
        0 if all are whole, else 1.
    """
    bad = 0
    for path in _some(folder):
        found = list(problems(path))
        print(f"{path}: {'damaged' if found else 'whole'}")
        for problem in found:
            print(f"  {problem}")
        bad += bool(found)
    return int(bad > 0)


def diff(first: str | Path, second: str | Path, *, tolerance: float = 0.0) -> int:
    """Compare the weights and optimizer states of two checkpoints, on whatever layouts they were saved.

    Example:
        bharat checkpoint diff step=100.ckpt step=200.ckpt

    Args:
        first, second: checkpoint directories, or plain Lightning .ckpt files; or their URLs.
        tolerance: differences up to this are none.

    Returns:
        0 if they hold the same, else 1.
    """
    one, other = _tensors(first), _tensors(second)
    rows = [[name, "only in the first", ""] for name in one.keys() - other.keys()]
    rows += [[name, "only in the second", ""] for name in other.keys() - one.keys()]
    for name in one.keys() & other.keys():
        if difference := _difference(one[name], other[name], tolerance):
            rows.append([name, *difference])
    if not rows:
        print(f"the same: {len(one)} tensors")
        return 0
    print(table(["tensor", "how it differs", "at most"], sorted(rows)))
    print(f"{len(rows)} of {len(one.keys() | other.keys())} tensors differ")
    return 1


def prune(folder: str | Path, *, keep: int = 1, dry_run: bool = False) -> None:
    """Remove all checkpoints in and below a folder but those of the last steps.

    What is kept is read first, every byte: a damaged one does not count, and is left for you to look at. So the last
    whole checkpoint is never removed.

    Example:
        bharat checkpoint prune lightning_logs --keep 2 --dry_run true

    Args:
        folder: where to look, also a URL; directories only, no plain .ckpt files.
        keep: how many whole ones stay.
        dry_run: only say what would be removed.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least one checkpoint stays; write keep=1 or more")
    kept = 0
    for path in reversed(_some(folder)):
        if kept < keep:
            damaged = any(problems(path))
            kept += not damaged
            print(f"{path}: {'damaged, left as it is' if damaged else 'kept'}")
            continue
        if not dry_run:
            path.remove(COMMIT) if isinstance(path, Remote) else directory.remove(path)
        print(f"{path}: {'would be ' if dry_run else ''}removed")


def _some(folder: str | Path) -> Sequence[Place]:
    found = checkpoints_in(place_of(folder))
    if not found:
        raise CheckpointError(f"{folder} has no checkpoint directory in it; write a folder that has")
    return found


def _tensors(path: str | Path) -> dict[str, Tensor | StoredTensor]:
    """All of a checkpoint's tensors, by where they are in Lightning's dict."""
    found: dict[str, Tensor | StoredTensor] = {}

    def walk(node: object, name: str) -> None:
        if isinstance(node, (Tensor, StoredTensor)):
            found[name] = node
        elif isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}/{key}" if name else str(key))
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                walk(value, f"{name}/{i}")

    content = open_any(path).content
    for part in ("state_dict", "optimizer_states"):
        walk(content.get(part, {}), "" if part == "state_dict" else part)
    return found


def _difference(one: Tensor | StoredTensor, other: Tensor | StoredTensor, tolerance: float) -> tuple[str, str] | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        kinds = (f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (one, other))
        return " and ".join(kinds), ""
    a, b = (reader(value)() for value in (one, other))
    if a.equal(b) or not a.numel():
        return None
    apart = (a.double() - b.double()).abs()
    if float(apart.max()) <= tolerance:
        return None
    return f"{int((apart > tolerance).sum())} of {a.numel()} values", f"{float(apart.max()):.3g}"
