"""What the tests of populations train: a module that writes down what it begins and ends with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lightning_bharat.plan.elsewhere import is_elsewhere
from tests.tuning.tuned import Tuned


class Written(Tuned):
    """Writes ``rank0.json`` and others: digests of its weights and its optimizer's state, and the options of its steps.

    Args:
        schedule: ``"steps"``, ``"milestones"``, ``"one cycle"``; ``""``: none.
        decay: of the weights.
    """

    def __init__(
        self, lr: float = 0.05, decay: float = 0.0, schedule: str = "", trouble: str = "", width: int = 8
    ) -> None:
        super().__init__(lr, width=width, trouble=trouble)
        self.save_hyperparameters()
        self.decay, self.schedule = decay, schedule
        self.written: dict[str, Any] = {"steps": []}

    def digest(self) -> str:
        """Of this rank's part, in 32 bits, to which some strategies of Lightning's round when they load."""
        states = self.trainer.optimizers[0].state.values()
        tensors = [*self.parameters(), *(value for state in states for value in state.values())]
        tensors = [one for one in tensors if not is_elsewhere(one)]  # other stages'
        parts = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
        return hashlib.sha256(b"".join(p.detach().float().contiguous().numpy().tobytes() for p in parts)).hexdigest()

    def on_train_start(self) -> None:
        self.written["start"] = self.digest()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        group = optimizer.param_groups[0]
        self.written["steps"].append([self.global_step, float(group["lr"]), float(group["weight_decay"])])
        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_train_end(self) -> None:
        self.written |= {"end": self.digest(), "epochs": self.current_epoch, "steps_in_all": self.global_step}
        Path(self.trainer.default_root_dir, f"rank{self.global_rank}.json").write_text(json.dumps(self.written))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.decay)
        scheduler = schedule_of(self.schedule, optimizer, self.lr)
        return [optimizer], ([] if scheduler is None else [{"scheduler": scheduler, "interval": "step"}])


def schedule_of(name: str, optimizer: torch.optim.Optimizer, lr: float) -> Any:
    """Over six steps."""
    if name == "steps":
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
    if name == "milestones":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.5)
    if name == "one cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=7)
    return None
