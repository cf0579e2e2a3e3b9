"""A disk that loses what was not synced: what the package really does to files is recorded, and then played again up
to a crash, with any of what no fsync had brought to disk missing.

The model is POSIX's, which promises less than any file system does: a file has after a crash any content that it had
since its last fsync, or a torn one; the entries of a directory (a new name, a removed one, a rename, which is all or
nothing) are there if the directory was synced after, and else each of them is there or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightning_bharat.checkpoints import directory

ROOT = 0


@dataclass
class Recording:
    """What was done in ``folder``, in order.

    Attributes:
        done: ("name", directory, name, inode), ("remove", directory, name), ("rename", directory, from, to),
            ("exchange", directory, one, other), ("write", inode, content), ("sync", inode).
        ends: how much of ``done`` belongs to each of the calls that were recorded.
    """

    folder: Path
    done: list[tuple[Any, ...]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers, self._contents = {self.folder: ROOT}, dict[int, bytes]()
        self._made = ROOT

    def look(self) -> None:
        """Notice files that were made or written since."""
        for path in sorted(self.folder.rglob("*")):
            if path not in self._numbers:
                self._name(path)
            if path.is_file() and not path.is_symlink():
                number, content = self._numbers[path], path.read_bytes()
                if self._contents.get(number, b"") != content:
                    self._contents[number] = content
                    self.done.append(("write", number, content))

    def _name(self, path: Path, number: int | None = None) -> None:
        if number is None:
            self._made = number = self._made + 1
        self._numbers[path] = number
        self.done.append(("name", self._numbers[path.parent], path.name, number))

    def sync(self, path: Path) -> None:
        self.look()
        self.done.append(("sync", self._numbers[path]))

    def before(self, kind: str, *paths: Path) -> None:
        """Note what is about to be done."""
        self.look()
        first, second = paths[0], paths[-1]
        parent = self._numbers[first.parent]
        assert kind == "link" or first.parent == second.parent, "between directories"
        if kind == "link":
            self._name(second, self._numbers[first])
        elif kind == "remove":
            self.done.append((kind, parent, first.name))
            del self._numbers[first]
        else:
            self.done.append((kind, parent, first.name, second.name))
            self._move(first, second, kind == "exchange")

    def _move(self, first: Path, second: Path, both: bool) -> None:
        def moved(path: Path) -> Path:
            for one, other in [(first, second), (second, first)][: 1 + both]:
                if path == one or one in path.parents:
                    return other / path.relative_to(one)
            return path

        kept = {path: number for path, number in self._numbers.items() if both or path != second}
        self._numbers = {moved(path): number for path, number in kept.items()}


@contextmanager
def recorded(folder: Path) -> Iterator[Recording]:
    """Record what is done to files below ``folder``."""
    found = Recording(folder)

    def path_of(path: Any, dir_fd: int | None = None) -> Path:
        if isinstance(path, int):
            return Path(os.readlink(f"/proc/self/fd/{path}"))
        return Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else Path(path)

    def inside(*paths: Path) -> bool:
        return all(folder in path.parents or folder == path for path in paths)

    def watching(name: str, kind: str) -> Callable:
        function = getattr(os, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            paths = [path_of(arg, kwargs.get("dir_fd")) for arg in args[: 2 if kind in ("rename", "link") else 1]]
            if inside(*paths) and paths[0].exists():
                if kind == "sync":
                    found.sync(paths[0])
                else:
                    found.before(kind, *paths)
            return function(*args, **kwargs)

        return watched

    exchange = directory._exchange

    def exchanged(one: Path, other: Path) -> bool:
        done = exchange(one, other)
        if done:
            found.done.append(("exchange", found._numbers[one.parent], one.name, other.name))
            found._move(one, other, both=True)
        return done

    with pytest.MonkeyPatch.context() as patch:
        for name, kind in [("fsync", "sync"), ("rename", "rename"), ("replace", "rename"), ("unlink", "remove")]:
            patch.setattr(os, name, watching(name, kind))
        for name, kind in [("rmdir", "remove"), ("link", "link")]:
            patch.setattr(os, name, watching(name, kind))
        patch.setattr(directory, "_exchange", exchanged)
        yield found


def after_crash(done: list[tuple[Any, ...]], choose: Callable[[int], int], folder: Path) -> None:
    """Make ``folder`` what a crash leaves after ``done``.

    Args:
        choose: one of so many possibilities.
    """
    synced = {number: i for i, (kind, number, *_) in enumerate(done) if kind == "sync"}
    entries: dict[int, dict[str, int]] = {ROOT: {}}
    contents: dict[int, list[bytes]] = {}
    for i, (kind, where, *what) in enumerate(done):
        is_kept = synced.get(where, -1) > i
        if kind == "write":
            contents[where] = [*([] if is_kept else contents.get(where, [b""])), what[0]]
        elif kind not in ("sync", "nothing") and (is_kept or choose(2)):
            _apply(entries.setdefault(where, {}), kind, *what)
    _build(ROOT, folder, entries, contents, choose)


def _apply(names: dict[str, int], kind: str, first: str, second: Any = None) -> None:
    if kind == "name":
        names[first] = second
    elif kind == "remove":
        names.pop(first, None)
    elif kind == "rename" and first in names:
        names[second] = names.pop(first)
    elif kind == "exchange" and first in names and second in names:
        names[first], names[second] = names[second], names[first]


def _build(number: int, path: Path, entries: dict, contents: dict, choose: Callable[[int], int]) -> None:
    if number in contents:
        versions = contents[number]
        if len(versions) > 1:
            versions = [*versions, versions[-1][: len(versions[-1]) // 2]]  # torn
        path.write_bytes(versions[choose(len(versions))] if len(versions) > 1 else versions[0])
        return
    path.mkdir(exist_ok=True)
    for name, child in entries.get(number, {}).items():
        _build(child, path / name, entries, contents, choose)
