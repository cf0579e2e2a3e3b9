"""Pruning under DDP by Optuna's callback for Lightning, and by ours: docs/tuning-pruning.md shows what comes of it.

python examples/pruning_ddp.py --callback optuna
python examples/pruning_ddp.py --callback ours
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import optuna
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bharat.callbacks import OptunaPruning
from lightning_bharat.tuning import tune

N_TRIALS, STORAGE = 4, "sqlite:///pruning.db"


class Regression(L.LightningModule):
    """Learns sums of eight numbers, and says with which learning rate each rank does."""

    def __init__(self, trial: Any) -> None:
        super().__init__()
        self.number, self.lr = trial.number, trial.suggest_float("lr", 1e-3, 0.1, log=True)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))

    def on_train_start(self) -> None:
        print(f"rank {self.global_rank} trains for trial {self.number} with lr={self.lr:.5f}\n", end="", flush=True)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(self.layers(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def batches() -> DataLoader:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def objective(trial: Any, pruning: Any) -> float:
    """As one writes it for ``study.optimize``; both callbacks have these arguments."""
    L.seed_everything(1, verbose=False)
    module, callback = Regression(trial), pruning(trial, monitor="val_loss")
    trainer = L.Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        max_epochs=4,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(), batches())
    if hasattr(callback, "check_pruned"):  # Optuna's asks for it
        callback.check_pruned()
    return trainer.callback_metrics["val_loss"].item()


def with_optunas(trial: Any) -> float:
    from optuna_integration import PyTorchLightningPruningCallback

    return objective(trial, PyTorchLightningPruningCallback)


def with_ours(trial: Any) -> float:
    return objective(trial, OptunaPruning)


OBJECTIVES = {"optuna": with_optunas, "ours": with_ours}


def optimize(callback: str) -> None:
    """A study of this process. Lightning's ``ddp`` starts the script once more for rank 1, with a study of its own."""
    sampler, pruner = optuna.samplers.RandomSampler(), optuna.pruners.MedianPruner(n_startup_trials=1)
    study = optuna.create_study(
        study_name=callback, storage=STORAGE, sampler=sampler, pruner=pruner, load_if_exists=True
    )
    study.optimize(OBJECTIVES[callback], n_trials=N_TRIALS)


def table(study: optuna.Study) -> str:
    """What a study knows of its trials."""
    lines = []
    for trial in study.trials:
        reports = ", ".join(f"{value:.3f}" for value in trial.intermediate_values.values()) or "none"
        value = "none" if trial.value is None else f"{trial.value:.3f}"
        rate = trial.params["lr"]
        lines.append(f"trial {trial.number}: {trial.state.name:8} lr={rate:.5f} value={value} reports: {reports}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--callback", choices=OBJECTIVES, required=True)
    parser.add_argument("--by", choices=["optimize", "tune"], help="what calls the objective; tune for ours")
    parser.add_argument("--show", action="store_true", help="only what the study that optimize made has in the end")
    options = parser.parse_args(words)
    if options.show:
        print(table(optuna.load_study(study_name=options.callback, storage=STORAGE)))
    elif (options.by or {"optuna": "optimize", "ours": "tune"}[options.callback]) == "optimize":
        optimize(options.callback)
    else:
        pruner = {"name": "median", "n_startup_trials": 1}
        study = tune(OBJECTIVES[options.callback], n_trials=N_TRIALS, ranks=2, sampler="random", pruner=pruner)
        print(table(study))


if __name__ == "__main__":
    main()
