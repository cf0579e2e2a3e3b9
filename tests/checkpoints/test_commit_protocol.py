"""Whatever a machine had not yet brought to disk when it lost its power: a checkpoint that is listed is whole, and one
that was saved is there."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_bharat.checkpoints import Share, directory, plain, save
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.saving import Saver
from lightning_bharat.checkpoints.whole import checkpoints_in, problems
from tests.checkpoints.lossy_disk import Recording, after_crash, recorded

# What a run does to its checkpoints: ("save", name, step), ("link", name, to), ("remove", name), ("point", name, to);
# ("frozen", name, step) saves weights, too, that change at step 3 only.
RUNS = {
    "one after another": [("save", "a", 1), ("save", "b", 2), ("remove", "a"), ("save", "c", 3), ("remove", "b")],
    "the same name": [("save", "last", 1), ("save", "last", 2), ("save", "last", 3)],
    "the same name without an exchange": [("save", "last", 1), ("save", "last", 2)],
    "a name for the newest": [("save", "a", 1), ("link", "a", "last"), ("save", "b", 2), ("link", "b", "last")],
    "linked and removed": [("save", "a", 1), ("link", "a", "last"), ("remove", "a")],
    "anew": [("save", "a", 1), ("remove", "a"), ("save", "a", 2)],
    "frozen weights": [("frozen", "a", 1), ("frozen", "b", 2), ("remove", "a"), ("frozen", "c", 3), ("remove", "b")],
    "frozen weights under the same name": [("frozen", "last", 1), ("frozen", "last", 2), ("frozen", "last", 3)],
    "a file": [("file", "a", 1), ("file", "a", 2), ("file", "b", 3), ("remove", "a")],
}


SAVERS: dict[Path, Saver] = {}


def do(folder: Path, kind: str, name: str, other: object = None) -> None:
    path = folder / "run" / "checkpoints" / f"{name}.ckpt"
    if kind == "save":
        tensor = torch.full((40,), float(other))  # type: ignore[arg-type]
        save(path, {"state_dict": {"w": Share.of(tensor)}, "global_step": other}, Manifest.of({"global_step": other}))
    elif kind == "frozen":
        base, tensor = torch.full((40,), float(other >= 3)), torch.full((4,), float(other))  # type: ignore[arg-type, operator]
        state = {"base": Share.of(base, frozen=True), "w": Share.of(tensor)}
        saver = SAVERS.setdefault(folder, Saver())
        saver.save(path, {"state_dict": state, "global_step": other}, Manifest.of({"global_step": other}))
    elif kind == "file":
        plain.write(path, {"state_dict": {}, "global_step": other})
    elif kind == "link":
        directory.link(path, path.with_name(f"{other}.ckpt"))
    else:
        directory.remove(path)


def there(folder: Path) -> dict[str, int]:
    """The steps of all checkpoints, by name, after a look at each that it is whole."""
    found = {}
    for path in checkpoints_in(folder):
        assert list(problems(path)) == []
        found[path.name] = Manifest.read(path).step
    for path in folder.rglob("[!.]*.ckpt"):
        if path.is_file():
            found[path.name] = plain.read(path)["global_step"]
    return found


@cache
def recording(name: str) -> tuple[Recording, list[dict[str, int]]]:
    """What is done to the disk, and what is there after each call."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as temporary:
        if name.endswith("without an exchange"):
            patch.setattr(directory, "_exchange", lambda *_: False)
        folder, states = Path(temporary), [{}]
        with recorded(folder) as found:
            for call in RUNS[name]:
                do(folder, *call)
                found.look()
                found.ends.append(len(found.done))
                states.append(there(folder))
        return found, states


def check(name: str, done: list, crash: int, choose: Callable[[int], int]) -> None:
    """Look at what a crash after ``crash`` operations leaves."""
    found, states = recording(name)
    with tempfile.TemporaryDirectory() as temporary:
        after_crash(done[:crash], choose, Path(temporary))
        now = there(Path(temporary))
    calls = sum(end <= crash for end in found.ends)
    before, after = states[calls], states[min(calls + 1, len(states) - 1)]
    # Where names can't be exchanged a name is gone for a moment.
    replacing = name.endswith("without an exchange") and calls < len(found.ends)
    for path in before.keys() & after.keys():
        assert replacing or now.get(path) in (before[path], after[path]), path


@pytest.mark.parametrize("name", RUNS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_what_is_listed_is_whole_and_what_was_saved_is_there(name: str, data: st.DataObject) -> None:
    found, _ = recording(name)
    crash = data.draw(st.integers(0, len(found.done)), "operations before the crash")
    kept = iter(data.draw(st.lists(st.integers(0, 5), max_size=60), "what of it was kept"))
    check(name, found.done, crash, lambda n: next(kept, 0) % n)


@pytest.mark.parametrize("of", ["files", "a checkpoint's directory", "the directory above"])
def test_each_fsync_is_needed(of: str) -> None:
    """The simulation sees what would be lost without it."""
    name, draw = "one after another", random.Random(0)
    found, _ = recording(name)
    files = {what for kind, what, *_ in found.done if kind == "write"}
    inside = {what for kind, what, _, inode in filter(lambda op: op[0] == "name", found.done) if inode in files}

    def is_left_out(number: int) -> bool:
        kinds = {"files": number in files, "a checkpoint's directory": number in inside}
        return kinds.get(of, number not in files | inside)

    done = [("nothing", -1) if op[0] == "sync" and is_left_out(op[1]) else op for op in found.done]
    with pytest.raises(AssertionError):
        for _ in range(300):
            check(name, done, draw.randrange(len(done) + 1), draw.randrange)
