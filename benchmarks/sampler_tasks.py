"""What samplers are compared on: functions with known minima, and two fits of a Trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, exp, log10, pi

import lightning as L
import torch
from optuna import Trial
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bharat.models import GPTConfig, GPTModule

_ALPHA = (1.0, 1.2, 3.0, 3.2)
_A = ((10, 3, 17, 3.5, 1.7, 8), (0.05, 10, 17, 0.1, 8, 14), (3, 3.5, 1.7, 10, 17, 8), (17, 8, 0.05, 10, 0.1, 14))
_P = (
    (0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886),
    (0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991),
    (0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.6650),
    (0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381),
)
SEED = 11  # of the data and the first weights of a fit: trials differ by what they suggest alone


@dataclass(frozen=True)
class Task:
    """Something to minimize.

    Attributes:
        objective: as Optuna's.
        minimum: the least value there is; 0 where nobody knows it, and then values stand for regrets.
    """

    objective: Callable[[Trial], float]
    minimum: float


def hartmann6(trial: Trial) -> float:
    """Six numbers, six local minima (Dixon and Szegő, Towards global optimization 2, 1978)."""
    return hartmann6_at([trial.suggest_float(f"x{i}", 0, 1) for i in range(6)])


def hartmann6_at(x: Sequence[float]) -> float:
    """Its value at a point of the unit cube."""
    return -sum(
        alpha * exp(-sum(a * (value - p) ** 2 for a, value, p in zip(row, x, points, strict=True)))
        for alpha, row, points in zip(_ALPHA, _A, _P, strict=True)
    )


def branin(trial: Trial) -> float:
    """Two numbers, three global minima (the same book)."""
    return branin_at(trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1))


def branin_at(x: float, y: float) -> float:
    """Its value at a point of the unit square, which stands for [-5, 10] × [0, 15]."""
    x, y = 15 * x - 5, 15 * y
    return (y - 5.1 / (4 * pi**2) * x**2 + 5 / pi * x - 6) ** 2 + 10 * (1 - 1 / (8 * pi)) * cos(x) + 10


def conditional(trial: Trial) -> float:
    """A model that is dense or has experts; each kind has numbers of its own, and the minimum is with experts."""
    lr = log10(trial.suggest_float("lr", 1e-5, 1e-1, log=True))
    if trial.suggest_categorical("kind", ["dense", "experts"]) == "dense":
        return 0.3 + (lr + 2) ** 2 + (trial.suggest_int("width", 64, 512, step=64) - 320) ** 2 / 1e5
    experts, capacity = trial.suggest_int("experts", 4, 32, step=4), trial.suggest_float("capacity", 1, 2)
    return (lr + 3) ** 2 + (experts - 20) ** 2 / 200 + 4 * (capacity - 1.25) ** 2


class _Classifier(L.LightningModule):
    def __init__(self, lr: float, width: int, dropout: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 4))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class _Decoder(GPTModule):
    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("val_loss", self.training_step(batch, _))


def mlp(trial: Trial) -> float:
    """Points of sixteen numbers that a random network of other sizes puts into four classes: 2 epochs of SGD."""
    lr = trial.suggest_float("lr", 1e-4, 1, log=True)
    width, dropout = trial.suggest_int("width", 8, 128, log=True), trial.suggest_float("dropout", 0, 0.5)
    draw = torch.Generator().manual_seed(SEED)
    x, first, second = (torch.randn(*size, generator=draw) for size in ((1024, 16), (16, 24), (24, 4)))
    data = TensorDataset(x, (torch.tanh(x @ first / 2) @ second).argmax(1))
    return _fit(lambda: _Classifier(lr, width, dropout), data, 32, 2)


def gpt(trial: Trial) -> float:
    """Sequences in which each token follows from the two before it, but for noise: 3 epochs of a small decoder."""
    lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    decay, blocks = trial.suggest_float("weight_decay", 1e-3, 1, log=True), trial.suggest_int("blocks", 1, 3)
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(32, (256, 24), generator=draw)
    for i in range(2, 24):
        known = torch.rand(256, generator=draw) < 0.9
        ids[known, i] = (3 * ids[known, i - 1] + ids[known, i - 2]) % 32
    rows = [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]
    config = GPTConfig(32, 32, num_hidden_layers=blocks, num_attention_heads=2)
    return _fit(lambda: _Decoder(config, learning_rate=lr, weight_decay=decay), rows, 8, 3)


def _fit(make: Callable[[], L.LightningModule], data: object, batch: int, epochs: int) -> float:
    """The loss on the last quarter of ``data`` after training on the rest; a large one where it is no number."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(SEED)
    rows: list = [data[i] for i in range(len(data))]  # type: ignore[arg-type,index]
    cut = 3 * len(rows) // 4
    plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=epochs, enable_model_summary=False, num_sanity_val_steps=0, **plain
        )
        trainer.fit(make(), DataLoader(rows[:cut], batch), DataLoader(rows[cut:], len(rows) - cut))  # type: ignore
    loss = float(trainer.callback_metrics["val_loss"])
    return min(loss, 20.0) if loss == loss else 20.0


FUNCTIONS = {
    "hartmann6": Task(hartmann6, -3.32236801),
    "branin": Task(branin, 0.39788736),
    "conditional": Task(conditional, 0.0),
}
FITS = {"mlp": Task(mlp, 0.0), "gpt": Task(gpt, 0.0)}
