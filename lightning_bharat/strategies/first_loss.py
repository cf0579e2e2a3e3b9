"""Whether a run that goes on is the run that it goes on from: the loss of its first step, against the one that followed
the checkpoint then.

A checkpoint can't hold it, for it is written before. So the run writes it down after the next batch, in a file beside
the checkpoint, under its id; one number a save. Where a run was killed before that batch, nothing is compared.
On the layout that saved, losses are the same bit for bit; on others ranks have other rows, and nothing is compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_bharat import events
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.plan.layout import Layout

LOSSES = ".first_losses.jsonl"
_ABOVE = 4  # folders above a checkpoint, of which a copy may lie elsewhere


@dataclass
class FirstLoss:
    """Of rank 0, whose rows they are.

    Attributes:
        newest: id of the checkpoint that was saved or read last.
        last: the loss of the last step.
    """

    newest: str = ""
    last: Tensor | None = None
    _saved: tuple[str, Path] | None = None
    _expected: tuple[str, float] | None = None

    def save(self, id: str, path: Path) -> None:
        """The next step's loss follows this checkpoint."""
        self.newest, self._saved = id, (id, path.parent)

    def read(self, path: Path, manifest: Manifest, layout: Layout) -> None:
        """The next step is the first after this checkpoint."""
        self.newest, self._expected = manifest.id, None
        if manifest.id and manifest.layout == asdict(layout):
            known = _recorded(list(path.parents)[:_ABOVE], manifest.id)
            self._expected = None if known is None else (manifest.id, known)

    def step(self, out: Any, step: int, folder: Path) -> None:
        """A batch was trained on, and ``out`` is what the step has returned; ``folder`` has the run's events."""
        loss = out.get("loss") if isinstance(out, dict) else out
        self.last = loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None
        if self._expected is not None:
            self._compare(step, folder)
        if self._saved and self.last is not None:
            id, beside = self._saved
            line = json.dumps({"checkpoint": id, "step": step, "loss": float(self.last)}) + "\n"
            with suppress(OSError), (beside / LOSSES).open("a") as file:  # a full disk is for the next save to tell
                file.write(line)
        self._saved = None

    def _compare(self, step: int, folder: Path) -> None:
        assert self._expected is not None
        (id, expected), self._expected = self._expected, None
        found = None if self.last is None else float(self.last)
        same = found == expected or (found != found and expected != expected)
        if found is None:
            return
        if not same:
            events.append(folder, "other_loss", checkpoint=id, step=step, loss=found, expected=expected)
            rank_zero_warn(
                f"The first batch after checkpoint {id} (step {step}) has the loss {found!r}, and had {expected!r} "
                "when the checkpoint was written: this is not the same run. Other data, another order, another program "
                "or other random numbers go on here; compare versions and arguments with bharat checkpoint show"
            )


def _recorded(folders: Iterable[Path], id: str) -> float | None:
    for folder in folders:
        path = folder / LOSSES
        for line in path.read_text(errors="replace").splitlines() if os.access(path, os.R_OK) else []:
            try:
                said = json.loads(line)
                if said["checkpoint"] == id:
                    return float(said["loss"])
            except (ValueError, KeyError, TypeError):  # the torn last line of a machine that lost its power
                continue
    return None
